"""The masked diffusion language model with a hook point at every intermediate.

`HookedMDLM.forward` reads top to bottom: embed, condition, blocks, output layer. The state dict has
upstream's names (`backbone.blocks.0.attn_qkv.weight`, ...), so published weights load unchanged.
"""

# Axes: batch, pos, d (hidden_dim), vocab

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from mdlm_interp.arithmetic import Arithmetic, NativeArithmetic
from mdlm_interp.config import MDLMConfig
from mdlm_interp.errors import DataError, HookError
from mdlm_interp.hooks import (
    ActivationCache,
    HookFunction,
    HookPoint,
    HookRegistry,
    NameSelection,
    select_names,
)
from mdlm_interp.layers import BLOCK_HOOKS, HEAD_HOOKS, Block, Embedding, OutputLayer, Rotary, SigmaMap
from mdlm_interp.shapes import Float, Int64


class Backbone(nn.Module):
    """The parameters, in upstream's order and under its names."""

    def __init__(self, config: MDLMConfig, points: Mapping[str, HookPoint]) -> None:
        super().__init__()

        def within(prefix: str, names: Iterable[str]) -> dict[str, HookPoint]:
            return {name: points[prefix + name] for name in names}

        self.vocab_embed = Embedding(config.vocab_size, config.hidden_dim)
        self.sigma_map = SigmaMap(config.cond_dim)
        self.rotary_emb = Rotary(config.d_head)
        self.blocks = nn.ModuleList(
            Block(config, within(f"blocks.{i}.", BLOCK_HOOKS)) for i in range(config.n_blocks)
        )
        self.output_layer = OutputLayer(config, within("", HEAD_HOOKS))


def all_hook_names(n_blocks: int) -> list[str]:
    """Every hook point of a model with that many blocks, in execution order."""
    blocks = [f"blocks.{i}.{name}" for i in range(n_blocks) for name in BLOCK_HOOKS]
    return ["hook_embed", "hook_cond", *blocks, *HEAD_HOOKS]


class HookedMDLM(nn.Module):
    """An MDLM whose every intermediate can be read or replaced by name.

    Args:
        config: Shape of the network.
        arithmetic: What each operation means; torch's own kernels by default.
        seed: Key of the initial weights, which are upstream's initialisation: each tensor is a function
            of (seed, its name). adaLN and the output layer start at zero, so all logits are zero.

    Source:
        kuleshov-group/mdlm, models/dit.py at commit c112c526.
    """

    def __init__(self, config: MDLMConfig, arithmetic: Arithmetic | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.arithmetic: Arithmetic = arithmetic if arithmetic is not None else NativeArithmetic()
        self._registry = HookRegistry(HookPoint(name) for name in all_hook_names(config.n_blocks))
        self.backbone = Backbone(config, self._registry.points)
        if self.backbone.vocab_embed.embedding.device.type != "meta":
            initialise(self, seed)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        arithmetic: Arithmetic | None = None,
    ) -> HookedMDLM:
        """Load a model, in eval mode.

        Args:
            source: A directory with config.json and model.safetensors (single or sharded, upstream's
                names), a Hugging Face repository id, or "bundled" for the small model in this package.
            revision: Commit, branch or tag of a repository id.
        Raises:
            CheckpointError: If a file is missing, truncated, not finite, or does not fit the config.
        """
        from mdlm_interp.checkpoints import load_model

        return load_model(source, device=device, dtype=dtype, revision=revision, arithmetic=arithmetic)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors in the published form; see `checkpoints.save_model`."""
        from mdlm_interp.checkpoints import save_model

        save_model(self, Path(directory))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.vocab_embed.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.backbone.vocab_embed.embedding.dtype

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Every hook point, in execution order."""
        return self._registry.names

    def forward(
        self,
        input_ids: Int64[Tensor, "batch pos"],
        timesteps: Tensor | None = None,
        *,
        stop_at_block: int | None = None,
    ) -> Float[Tensor, "batch pos _"]:
        """Raw logits [batch pos vocab]; the mask token's column is included and not suppressed.

        Args:
            timesteps: sigma, the total noise [batch] (not t). Its values are ignored unless
                config.time_conditioning.
            stop_at_block: Skip this block and all that follows, and return the residual stream
                [batch pos d] that it would have read; 0 returns the embedding. Hooks behind it do not run.
        Raises:
            DataError: If ids are outside the vocabulary, shapes are wrong, or sigma is needed and missing.
        """
        self._check_inputs(input_ids, stop_at_block)
        at, arithmetic, backbone = self._registry.points, self.arithmetic, self.backbone
        x = at["hook_embed"](backbone.vocab_embed(input_ids))
        cond = at["hook_cond"](backbone.sigma_map(self._sigma(input_ids, timesteps), arithmetic))
        rotary = arithmetic.rotary_tables(backbone.rotary_emb.inv_freq, input_ids.shape[1])
        for block in backbone.blocks[:stop_at_block]:
            x = block(x, cond, rotary, arithmetic)
        if stop_at_block is not None:
            return x
        return backbone.output_layer.forward(x, cond, arithmetic)

    def _check_inputs(self, input_ids: Tensor, stop_at_block: int | None) -> None:
        if input_ids.dtype != torch.int64 or input_ids.dim() != 2 or input_ids.numel() == 0:
            raise DataError(
                f"input_ids must be int64 [batch pos] and not empty, "
                f"got {str(input_ids.dtype).removeprefix('torch.')} {list(input_ids.shape)}"
            )
        # A data-dependent branch would break a compiled graph; there torch's own index check remains.
        if not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise DataError(
                    f"token ids must be in [0, {self.config.vocab_size}), got {low if low < 0 else high}; "
                    f"was the text encoded with another tokenizer?"
                )
        if stop_at_block is not None:
            self._check_stop(stop_at_block)

    def _check_stop(self, stop_at_block: int) -> None:
        # True and 1.0 equal 1 and are no number of a block.
        if type(stop_at_block) is not int or not 0 <= stop_at_block <= self.config.n_blocks:
            raise DataError(
                f"stop_at_block must be a whole number in [0, {self.config.n_blocks}], got {stop_at_block!r}"
            )

    def _sigma(self, input_ids: Tensor, timesteps: Tensor | None) -> Float[Tensor, " batch"]:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        batch = input_ids.shape[0]
        check_timesteps(timesteps, batch)
        if not self.config.time_conditioning:
            return torch.zeros(batch, dtype=dtype, device=input_ids.device)
        if timesteps is None:
            raise DataError(
                "this model is time-conditioned: pass timesteps, which is sigma (total noise), not t"
            )
        return timesteps.reshape(batch).to(device=input_ids.device, dtype=dtype)

    def hooks(
        self, functions: Mapping[str, HookFunction | Sequence[HookFunction]], *, read_only: bool = False
    ) -> AbstractContextManager[None]:
        """Run functions at hook points for the length of a `with` block.

        Args:
            functions: Hook name or glob to `fn(tensor, hook) -> Tensor | None`, or several, run in order.
                A returned tensor replaces the activation (same shape, dtype and device); so does writing
                in place, because the function gets a private copy.
            read_only: The functions only look: they get the live tensor without a copy and must neither
                write to it nor return anything. Either is an error, but in torch's inference mode a write
                cannot be noticed.
        Raises:
            HookError: If a name matches nothing; nothing is installed then.
        """
        return self._registry.listening(functions, read_only)

    def run_with_cache(
        self,
        input_ids: Int64[Tensor, "batch pos"],
        names: NameSelection = None,
        *,
        timesteps: Tensor | None = None,
        stop_at_block: int | None = None,
        clone: bool = True,
        device: str | torch.device | None = None,
    ) -> tuple[Tensor, ActivationCache]:
        """One forward pass and the chosen activations, as later edits by other hooks leave them.

        Args:
            names: Hook name or glob, several of them, a predicate on names, or None for everything.
            clone: Give the cache its own memory; without it, entries may be views of one another.
            device: Where the cached tensors go; by default they stay.
        Raises:
            HookError: If a name matches nothing, or nothing that is reached before stop_at_block.
        """
        wanted = names if names is None or callable(names) or isinstance(names, str) else list(names)
        chosen = select_names(wanted, self.hook_names)
        if stop_at_block is not None:
            self._check_stop(stop_at_block)
            reached = self._names_before(stop_at_block)
            try:
                chosen = select_names(wanted, reached)
            except HookError:
                late = chosen[-1]
                raise HookError(
                    f"stop_at_block={stop_at_block} ends the pass before {late}; raise it or drop it"
                ) from None
        cache: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook: HookPoint) -> None:
            moved = tensor if device is None else tensor.to(device)
            cache[hook.name] = moved.clone() if clone and moved is tensor else moved

        with self.hooks(dict.fromkeys(chosen, keep), read_only=True):
            output = self(input_ids, timesteps, stop_at_block=stop_at_block)
        return output, ActivationCache(cache)

    def _names_before(self, block: int) -> Sequence[str]:
        """Hook points that run before a block."""
        return self.hook_names[: 2 + block * len(BLOCK_HOOKS)]

    def extra_repr(self) -> str:
        """Shape of the network, for printing."""
        return ", ".join(
            f"{key}={value}" for key, value in self.config.to_mapping().items() if key != "architectures"
        )


def check_timesteps(timesteps: Tensor | None, batch: int) -> None:
    """Raise DataError unless there is one sigma a sequence, or none at all."""
    if timesteps is not None and timesteps.shape not in ((batch,), (batch, 1)):
        raise DataError(
            f"timesteps must have shape [{batch}], one sigma a sequence, got {list(timesteps.shape)}"
        )


@torch.no_grad()
def initialise(model: HookedMDLM, seed: int) -> None:
    """Draw upstream's initial weights in place; each tensor is a pure function of (seed, its name).

    Embedding and linears are uniform within 1 / sqrt(fan_in) (kaiming with a = sqrt 5), norms are one,
    adaLN projections and the output linear are zero.
    """
    from mdlm_interp.randomness import uniforms

    zero = ("adaLN_modulation", "output_layer.linear")
    fan_in = {
        name.removesuffix("weight"): p.shape[-1] for name, p in model.named_parameters() if p.dim() == 2
    }
    for name, parameter in model.named_parameters():
        if any(part in name for part in zero):
            parameter.zero_()
        elif ".norm" in name:
            parameter.fill_(1.0)
        else:
            width = fan_in.get(name.removesuffix("weight").removesuffix("bias"), parameter.shape[-1])
            draws = torch.from_numpy(uniforms(seed, "init:" + name, 0, parameter.numel()))
            bound = 1.0 / math.sqrt(width)
            parameter.copy_(((2.0 * draws - 1.0) * bound).reshape(parameter.shape))
