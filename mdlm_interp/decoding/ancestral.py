"""Ancestral sampling with the SUBS parameterisation, and the two short ways to it.

From t = 1 down to 0 on a linear grid: each masked position is revealed with probability (t - s) / t, its
token drawn from the model's distribution; a revealed token never changes. The last step reveals the rest.
Draws use the inverse CDF in float64 from numbers keyed by (seed, step, position), so changing one token
or one feature shifts no other draw.

Source:
    Sahoo et al. 2024, arXiv:2406.07524, section 3.2.
"""

# Axes: batch, pos, vocab

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mdlm_interp.decoding.denoiser import predict
from mdlm_interp.decoding.draws import Draw, inverse_cdf
from mdlm_interp.decoding.sampler import sample, start_tokens
from mdlm_interp.decoding.schedules import Ancestral
from mdlm_interp.decoding.settings import Sampler
from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.model import HookedMDLM
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
    try:
        sampler = Sampler(schedule=Ancestral(steps=steps), draw=Draw(temperature=temperature))
    except ConfigError as error:
        raise DataError(str(error)) from None
    return sample(
        lambda x, sigma: predict(model, x).log(),
        start,
        sampler,
        seed=seed,
        indices=indices,
        mask_id=model.config.mask_id,
        progress=progress,
    ).final


def generate(
    model: Any,
    seq_len: int,
    num_steps: int = 128,
    top_k: int | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    prompt_ids: Sequence[int] = (),
    mask_id: int | None = None,
) -> Int64[torch.Tensor, "1 pos"]:
    """One sequence by ancestral sampling, called as the flash-attn-free port of MDLM is.

    Args:
        model: A HookedMDLM, an exported one loaded with transformers, or another with its mask_id.
        generator: Gives the seed, and is a different one after each call; torch's default one if none.
        prompt_ids: Tokens that the sequence begins with.
    Source:
        The model card of TheQweaker/mdlm-owt-noflash. Its draws come of other random numbers.
    """
    if seq_len < 1:
        raise DataError(f"seq_len must be at least 1, got {seq_len}")
    seed = int(
        torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else "cpu")
    )
    start = start_tokens(model, seq_len, prompt_ids, mask_id=mask_id)
    sampler = Sampler(schedule=Ancestral(steps=num_steps), draw=Draw(temperature=temperature, top_k=top_k))
    return sample(model, start, sampler, seed=seed, mask_id=mask_id).final


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
    return inverse_cdf(probabilities, uniform)
