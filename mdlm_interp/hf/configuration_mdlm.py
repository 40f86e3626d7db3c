"""Configuration of MDLM for Hugging Face transformers, under upstream's field names.

This file and `modeling_mdlm.py` are also copied into every exported model folder, where nothing else of
the package is at hand: they import only torch, transformers and each other.

Source:
    configuration_mdlm.py of kuleshov-group/mdlm-owt.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MDLMConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Shape of the network; the mask token's id is `vocab_size - 1`.

    Args:
        vocab_size: Number of token ids, the mask token included.
        model_length: Context the model was trained on, in tokens; the forward pass accepts any length.
        hidden_dim: Width of the residual stream.
        cond_dim: Width of the conditioning vector. Upstream's class default is 129, a typo: every
            published checkpoint has 128.
        n_blocks: Number of transformer blocks.
        n_heads: Attention heads per block.
        dropout: Dropout probability of both branches, in training mode only.
        time_conditioning: Whether sigma reaches the network; otherwise it is replaced by zero.
        return_dict: What `forward` returns unless told; the published config.json says False.
        kwargs: Passed on to transformers.
    """

    model_type = "mdlm"
    # transformers leaves a value out of config.json where it equals its own default, here True; this line
    # makes version 5 compare with ours as well.
    return_dict: bool | None = False

    def __init__(
        self,
        vocab_size: int = 50_258,
        model_length: int = 1024,
        hidden_dim: int = 768,
        cond_dim: int = 128,
        n_blocks: int = 12,
        n_heads: int = 12,
        dropout: float = 0.1,
        time_conditioning: bool = False,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(return_dict=return_dict, **kwargs)
        self.vocab_size = vocab_size
        self.model_length = model_length
        self.hidden_dim = hidden_dim
        self.cond_dim = cond_dim
        self.n_blocks = n_blocks
        self.n_heads = n_heads
        self.dropout = dropout
        self.time_conditioning = time_conditioning
