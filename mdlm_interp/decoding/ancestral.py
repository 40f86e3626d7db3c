"""Ancestral sampling with the SUBS parameterisation.

From t = 1 down to 0 on a linear grid: each masked position is revealed with probability (t - s) / t, its
token drawn from the model's distribution; a revealed token never changes. The last step reveals the rest.
Draws use the inverse CDF in float64 from numbers keyed by (seed, step, position), so changing one token
or one feature shifts no other draw. (float32 Gumbel noise, as first published, lowers the temperature.)

Source:
    Sahoo et al. 2024, arXiv:2406.07524, section 3.2; Zheng et al. 2024, arXiv:2409.02908 on float32 noise.
"""

# Axes: batch, pos, vocab

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from mdlm_interp.errors import DataError
from mdlm_interp.filling import predict
from mdlm_interp.model import HookedMDLM
from mdlm_interp.randomness import uniforms
from mdlm_interp.shapes import Float64, Int64


def ancestral_sample(
    model: HookedMDLM,
    start: Int64[torch.Tensor, "batch pos"],
    *,
    steps: int,
    seed: int = 0,
    temperature: float = 1.0,
    indices: Sequence[int] | None = None,
    progress: bool = False,
) -> Int64[torch.Tensor, "batch pos"]:
    """Fill the masks of `start`; its other tokens stay (a prompt, or an infilling).

    Args:
        steps: Number of grid steps; with more steps fewer tokens are drawn at once.
        temperature: Divides the log-probabilities; 0 takes the most probable token.
        indices: Number of each sequence, the key of its draws; by default its row.
    """
    if steps < 1:
        raise DataError(f"steps must be at least 1, got {steps}")
    if not 0.0 <= temperature < float("inf"):
        raise DataError(f"temperature must be at least 0 and finite, got {temperature}")
    mask_id = model.config.mask_id
    numbers = list(indices) if indices is not None else list(range(start.shape[0]))
    x = start.clone()
    for step in tqdm(range(steps), desc="denoise", unit="step", disable=None if progress else True):
        is_masked = x == mask_id
        if not bool(is_masked.any()):
            break
        reveal, choose = (
            torch.from_numpy(np.stack([uniforms(seed, f"{what}:{step}", n, x.shape[1]) for n in numbers]))
            for what in ("reveal", "token")
        )
        # With t = 1 - step / steps and s = t - 1 / steps: (t - s) / t, which is 1 in the last step.
        revealed = is_masked & (reveal < 1.0 / (steps - step))
        x = torch.where(revealed, draw(predict(model, x), choose, temperature), x)
    return x


def draw(
    probabilities: Float64[torch.Tensor, "batch pos vocab"],
    uniform: Float64[torch.Tensor, "batch pos"],
    temperature: float = 1.0,
) -> Int64[torch.Tensor, "batch pos"]:
    """One token a position by the inverse CDF: the first whose cumulative probability exceeds the uniform."""
    if temperature == 0.0:
        return probabilities.argmax(-1)
    if temperature != 1.0:
        probabilities = (probabilities.log() / temperature).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    # Scaling by the last sum keeps a uniform near 1 from falling past the end; "right" never picks a zero.
    target = uniform[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True)[..., 0].clamp(max=probabilities.shape[-1] - 1)
