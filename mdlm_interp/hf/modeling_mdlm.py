"""MDLM for Hugging Face transformers: plain torch, no flash-attn, in the dtype of the weights.

1. Embed the ids; no scaling, no positional table.
2. Map sigma (zero unless time-conditioned) to the vector that every adaLN projection reads.
3. Each block adds attention and MLP to the residual stream, each modulated before and gated after.
4. Modulated final norm and an untied linear map give raw logits: the mask token has a column like any other.

Parameter names are upstream's, so published weights load unchanged. This file and `configuration_mdlm.py`
are also copied into every exported model folder: they import only torch, transformers and each other.

Source:
    kuleshov-group/mdlm, models/dit.py at commit c112c526; modeling_mdlm.py of kuleshov-group/mdlm-owt.
"""

# Axes: batch, pos, d (hidden_dim), c (cond_dim), head, d_head, half (d_head / 2)

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_mdlm import MDLMConfig  # noqa: TID252  (an exported folder has no package to name)

TIME_FEATURES = 256  # fixed upstream, independent of cond_dim
LAYER_NORM_EPS = 1e-5  # torch's default; DiT's 1e-6 moves the logits by 7e-3
HALF_PRECISION = (torch.float16, torch.bfloat16)


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero, so that an untrained block is the identity."""

    def reset_parameters(self) -> None:
        """Called by torch's constructor and by `MDLM._init_weights`."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class EmbeddingLayer(nn.Module):
    """The token embedding; upstream names the parameter `embedding`, not `weight`."""

    def __init__(self, vocab_size: int, d: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, d))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(d)."""
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch pos] to [batch pos d]."""
        return functional.embedding(input_ids, self.embedding)


class TimestepEmbedder(nn.Module):
    """The noise level sigma to a vector of width cond_dim."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        """[batch] to [batch c]. Frequencies divide by half the width, not half - 1; cosines come first."""
        half = TIME_FEATURES // 2
        steps = torch.arange(half, device=sigma.device, dtype=sigma.dtype)
        angles = sigma[:, None] * torch.exp(-math.log(10_000.0) * steps / half)
        features = torch.cat((angles.cos(), angles.sin()), dim=-1)
        embedded: Tensor = self.mlp(features.to(next(self.parameters()).dtype))
        return embedded


class Rotary(nn.Module):
    """Rotary position embedding; upstream stores the inverse frequencies in the checkpoint."""

    inv_freq: Tensor

    def __init__(self, d_head: int) -> None:
        super().__init__()
        self.d_head = d_head
        # Persistent, because the published file holds it; transformers 5 builds the model on the meta device,
        # where only the file or `_init_weights` gives a buffer its values. A buffer is loaded in the dtype it
        # was made with, so this stays float32. (`_keep_in_fp32_modules_strict` is not the way: transformers
        # 4.57 knows only names of parameters there and refuses this one.)
        self.register_buffer("inv_freq", self.exact())

    def exact(self, device: torch.device | None = None) -> Tensor:
        """10000^(-2j / d_head) in float32, whatever torch's default dtype is while a model is loaded."""
        exponents = torch.arange(0, self.d_head, 2, dtype=torch.float32, device=device) / self.d_head
        return 1.0 / (10_000.0**exponents)

    def reset_parameters(self) -> None:
        """Called by `MDLM._init_weights`, needed only for a file without inv_freq."""
        if not getattr(self.inv_freq, "_is_hf_initialized", False):
            self.inv_freq.copy_(self.exact(self.inv_freq.device))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Half precision would misplace tokens, also after a cast back: `.half()` and the like stop here.
        kept = self.inv_freq
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.inv_freq.dtype in HALF_PRECISION:
            self.inv_freq = kept.to(self.inv_freq.device)
        return self

    def forward(self, n_positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [pos half]. Never cached: upstream's cache goes stale when a model moves or is cast."""
        # float32 at least; float64 in a float64 model, whose loader leaves the buffer itself in float32.
        inv_freq = self.inv_freq.to(torch.promote_types(self.inv_freq.dtype, dtype))
        positions = torch.arange(n_positions, device=inv_freq.device, dtype=inv_freq.dtype)
        angles = positions[:, None] * inv_freq
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [batch pos head d_head] in the split-half convention: dimension j pairs with j + d_head / 2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: around 1 + scale, not scale."""
    return x * (1 + scale) + shift


class DDiTBlock(nn.Module):
    """One transformer block."""

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        d = config.hidden_dim
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.norm1 = nn.LayerNorm(d, eps=LAYER_NORM_EPS, bias=False)
        self.attn_qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.norm2 = nn.LayerNorm(d, eps=LAYER_NORM_EPS, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))
        self.adaLN_modulation = ZeroLinear(config.cond_dim, 6 * d)

    def forward(self, x: Tensor, cond: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Residual stream [batch pos d] in and out."""
        parts = self.adaLN_modulation(cond)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        h = self._attention(modulate(self.norm1(x), shift_attn, scale_attn), rotary)
        x = x + gate_attn * functional.dropout(h, self.dropout, self.training)
        h = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        x = x + gate_mlp * functional.dropout(h, self.dropout, self.training)
        return x

    def _attention(self, h: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        # The last axis is (three, head, d_head). No mask of any kind: [MASK] tokens are attended to.
        q, k, v = self.attn_qkv(h).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        q, k, v = rotate(q, *rotary).transpose(1, 2), rotate(k, *rotary).transpose(1, 2), v.transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.attn_out(mixed.transpose(1, 2).flatten(-2))
        return out


class DDitFinalLayer(nn.Module):
    """Final norm, modulation without gate, and the untied output projection."""

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.hidden_dim, eps=LAYER_NORM_EPS, bias=False)
        self.linear = ZeroLinear(config.hidden_dim, config.vocab_size)
        self.adaLN_modulation = ZeroLinear(config.cond_dim, 2 * config.hidden_dim)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """[batch pos d] to raw logits [batch pos vocab]."""
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)
        logits: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return logits


class DITBackbone(nn.Module):
    """The network; its attribute names are the checkpoint's."""

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        self.vocab_embed = EmbeddingLayer(config.vocab_size, config.hidden_dim)
        self.sigma_map = TimestepEmbedder(config.cond_dim)
        self.rotary_emb = Rotary(config.hidden_dim // config.n_heads)
        self.blocks = nn.ModuleList(DDiTBlock(config) for _ in range(config.n_blocks))
        self.output_layer = DDitFinalLayer(config)

    def forward(self, input_ids: Tensor, sigma: Tensor, keep: list[Tensor] | None) -> Tensor:
        """Raw logits; the embedding and every block's output are appended to `keep` if there is one."""
        x = self.vocab_embed(input_ids)
        # This SiLU is the second one on the path: sigma_map ends with a linear map.
        cond = functional.silu(self.sigma_map(sigma))
        rotary = self.rotary_emb(input_ids.shape[1], x.dtype)
        if keep is not None:
            keep.append(x)
        for block in self.blocks:
            x = block(x, cond, rotary)
            if keep is not None:
                keep.append(x)
        logits: Tensor = self.output_layer(x, cond)
        return logits


class MDLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Masked diffusion language model."""

    config_class = MDLMConfig
    base_model_prefix = "mdlm"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__(config)
        self.backbone = DITBackbone(config)
        # Upstream leaves this out, and transformers 5 then fails on `all_tied_weights_keys`.
        self.post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Without this override, post_init would redraw every linear map, the zero ones too, with std 0.02.
        if isinstance(module, (nn.Linear, nn.LayerNorm, EmbeddingLayer, Rotary)):
            module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        timesteps: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Raw logits [batch pos vocab], alone or with the hidden states.

        There is no attention mask: padding is not supported.

        Args:
            timesteps: sigma, the total noise [batch] (not t in [0, 1]); ignored unless
                config.time_conditioning.
            output_hidden_states: Also return [embedding, output of each block], each [batch pos d].
            return_dict: Return a MaskedLMOutput; otherwise the logits or a tuple (logits, hidden states).
        Raises:
            ValueError: If the model is time-conditioned and timesteps are missing or not one a sequence.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:  # not config.use_return_dict, which transformers 5 deprecates
            return_dict = self.config.return_dict
        hidden_states: list[Tensor] | None = [] if output_hidden_states else None
        logits = self.backbone(input_ids, self._sigma(input_ids, timesteps), hidden_states)
        if return_dict:
            return MaskedLMOutput(loss=None, logits=logits, hidden_states=hidden_states)  # type: ignore[arg-type]
        return (logits, hidden_states) if output_hidden_states else logits

    def _sigma(self, input_ids: Tensor, timesteps: Tensor | None) -> Tensor:
        # float32 at least: half precision cannot resolve the sinusoid.
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        batch = input_ids.shape[0]
        if not self.config.time_conditioning:
            return torch.zeros(batch, dtype=dtype, device=input_ids.device)
        if timesteps is None:
            raise ValueError(
                "this model is time-conditioned: pass timesteps, that is sigma (total noise), not t"
            )
        if timesteps.shape not in ((batch,), (batch, 1)):
            shape = list(timesteps.shape)
            raise ValueError(f"timesteps must have shape [{batch}], one sigma a sequence, got {shape}")
        return timesteps.reshape(batch).to(device=input_ids.device, dtype=dtype)
