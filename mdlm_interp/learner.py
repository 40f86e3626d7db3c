"""The learner's masked diffusion language model, with a hook point at every intermediate.

A plainer and more current network than MDLM's, for training from scratch: RMSNorm, SwiGLU, biases, tied
embeddings, no gates, and time as FiLM (shift and scale) of each block. The mask is never predicted: its logit is
-inf. It is a HookedMDLM to everything that reads tokens and gives logits: `run_with_cache`, `hooks`, filling,
sampling, perplexity. It knows torch's arithmetic only; the oracle's has no RMSNorm.

Source:
    scottstts/Learning-Diffusion-LM at commit 72a8358, train_model.ipynb.
"""

# Axes: batch, pos, d (hidden_dim), vocab

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mdlm_interp.arithmetic import Arithmetic, NativeArithmetic
from mdlm_interp.checkpoints import CONFIG, read_tensors, resolve_source, weight_files
from mdlm_interp.devices import usable_device
from mdlm_interp.errors import CheckpointError, DataError, nearest
from mdlm_interp.hooks import HookPoint, HookRegistry
from mdlm_interp.learner_config import LearnerConfig
from mdlm_interp.learner_layers import (
    HEAD_HOOKS,
    Gated,
    LearnerBlock,
    RMSNorm,
    TiedEmbedding,
    block_hooks,
    rotary_tables,
    time_features,
)
from mdlm_interp.model import HookedMDLM, check_timesteps
from mdlm_interp.randomness import uniforms
from mdlm_interp.shapes import Float, Int64


class HookedLearner(HookedMDLM):
    """The learner's variant of a masked diffusion language model.

    Args:
        config: Shape of the network.
        arithmetic: torch's own kernels, if not their default form.
        seed: Key of the initial weights: matrices normal with config.init_std, biases 0, norms 1, each tensor a
            function of (seed, its name).
    Raises:
        DataError: If the arithmetic is another one than torch's.
    """

    config: LearnerConfig  # type: ignore[assignment]  # the fields that others read are MDLMConfig's
    arithmetic: NativeArithmetic

    def __init__(self, config: LearnerConfig, arithmetic: Arithmetic | None = None, seed: int = 0) -> None:
        nn.Module.__init__(self)  # another network than the base class builds
        if not isinstance(arithmetic, NativeArithmetic | None):
            raise DataError(
                f"the learner's network runs in torch's arithmetic only, got {type(arithmetic).__name__}; "
                f"pass NativeArithmetic or none"
            )
        self.config = config
        self.arithmetic = arithmetic if arithmetic is not None else NativeArithmetic()
        self._registry = HookRegistry(HookPoint(name) for name in all_hook_names(config))
        points = self._registry.points
        d = config.hidden_dim
        self.embed = TiedEmbedding(config.vocab_size, d)
        self.time = Gated(d, d, d) if config.time_conditioning else None
        self.blocks = nn.ModuleList(
            LearnerBlock(config, {name: points[f"blocks.{i}.{name}"] for name in block_hooks(config)})
            for i in range(config.n_blocks)
        )
        self.norm_final = RMSNorm(d)
        if self.device.type != "meta":
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
    ) -> HookedLearner:
        """Load a directory that `save_pretrained` wrote, in eval mode.

        Raises:
            CheckpointError: If a file is missing, truncated, not finite, or does not fit the config.
        """
        if not dtype.is_floating_point:
            raise CheckpointError(f"dtype must be a floating point type, got {dtype}")
        place = usable_device(device)
        directory = resolve_source(source, revision)
        with torch.device("meta"):
            model = cls(LearnerConfig.from_json(directory / CONFIG), arithmetic)
        state = _read_state(directory, {name: t.shape for name, t in model.state_dict().items()})
        model.load_state_dict({name: t.to(place, dtype) for name, t in state.items()}, assign=True)
        return model.eval().requires_grad_(True)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.embed.weight.dtype

    def forward(
        self,
        input_ids: Int64[Tensor, "batch pos"],
        timesteps: Tensor | None = None,
        *,
        stop_at_block: int | None = None,
    ) -> Float[Tensor, "batch pos _"]:
        """Logits [batch pos vocab], -inf for the mask.

        Args:
            timesteps: sigma, the total noise [batch], as every model here takes it; the network reads
                t = 1 - exp(-sigma), the probability that a token is masked. None leaves all blocks unmodulated.
            stop_at_block: Skip this block and all that follows, and return the residual stream
                [batch pos d] that it would have read.
        Raises:
            DataError: If ids are outside the vocabulary or shapes are wrong.
        """
        self._check_inputs(input_ids, stop_at_block)
        at = self._registry.points
        x = at["hook_embed"](self.embed.forward(input_ids))
        cond = self._condition(input_ids, timesteps)
        rotary = rotary_tables(self.config.d_head, input_ids.shape[1], x.device, self.dtype)
        for block in self.blocks[:stop_at_block]:
            x = block(x, cond, rotary, self.arithmetic)
        if stop_at_block is not None:
            return x
        h = at["hook_final_in"](self.norm_final.forward(x, at, "ln_final"))
        logits = self.embed.unembed(h, self.arithmetic)
        is_mask = torch.arange(self.config.vocab_size, device=logits.device) == self.config.mask_id
        return at["hook_logits"](logits.masked_fill(is_mask, -torch.inf))

    def _condition(self, input_ids: Tensor, sigma: Tensor | None) -> Float[Tensor, "batch d"] | None:
        batch = input_ids.shape[0]
        check_timesteps(sigma, batch)
        if self.time is None or sigma is None:
            return None
        kind = torch.float64 if self.dtype == torch.float64 else torch.float32
        t = -torch.expm1(-sigma.reshape(batch).to(input_ids.device, kind))
        features = time_features(t, self.config.hidden_dim).to(self.dtype)
        return self._registry.points["hook_cond"](self.time.forward(features, self.arithmetic))

    def _names_before(self, block: int) -> Sequence[str]:
        """Hook points that run before a block; blocks have other ones here than in an MDLM."""
        first = len(self.hook_names) - len(HEAD_HOOKS) - self.config.n_blocks * len(block_hooks(self.config))
        return self.hook_names[: first + block * len(block_hooks(self.config))]


def all_hook_names(config: LearnerConfig) -> list[str]:
    """Every hook point of the network, in execution order."""
    blocks = [f"blocks.{i}.{name}" for i in range(config.n_blocks) for name in block_hooks(config)]
    return ["hook_embed", *(["hook_cond"] if config.time_conditioning else []), *blocks, *HEAD_HOOKS]


@torch.no_grad()
def initialise(model: HookedLearner, seed: int) -> None:
    """Draw the initial weights in place; each tensor is a pure function of (seed, its name).

    Source:
        0.02: scottstts/Learning-Diffusion-LM at commit 72a8358. Without a number: the deviation of torch's own
        torch.nn.Linear, uniform within 1 / sqrt(fan_in), which upstream's MDLM has too.
    """
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        elif parameter.dim() == 1:
            parameter.zero_()
        else:
            # A uniform of exactly 0 would be minus infinity.
            draws = np.maximum(uniforms(seed, "init:" + name, 0, parameter.numel()), 2.0**-54)
            normals = torch.special.ndtri(torch.from_numpy(draws))
            std = model.config.init_std
            std = 1.0 / math.sqrt(3.0 * parameter.shape[1]) if std is None else std
            parameter.copy_((std * normals).reshape(parameter.shape))


def _read_state(directory: Path, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of a model directory, which must be the network's, all of them, and finite."""
    state: dict[str, Tensor] = {}
    for file in weight_files(directory):
        for name, tensor in read_tensors(file):
            if name not in expected:
                raise CheckpointError(
                    f"{file} holds {name!r}, which this network does not have{nearest(name, expected)}"
                )
            if tensor.shape != expected[name]:
                raise CheckpointError(
                    f"{name} in {file} has shape {tuple(tensor.shape)}, config.json implies "
                    f"{tuple(expected[name])}; is it this model's config.json?"
                )
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise CheckpointError(
                    f"{name} in {file} must be finite floating point numbers; the file is damaged or training "
                    f"diverged"
                )
            state[name] = tensor
    missing = [name for name in expected if name not in state]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}; "
            f"is config.json this model's?"
        )
    return state
