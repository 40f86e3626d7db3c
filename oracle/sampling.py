"""Exact sampling: which token is drawn is decided by integers, so a decoded text is the same everywhere.

Definition: SPEC.md, section 6. Probabilities are counts, the exponentials of the exact logits in units of 2^-42;
a draw compares a 64-bit word, a function of (seed, step, sequence, position), with their exact sums.
"""

# Axes: batch, pos, vocab

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.randomness import random_bits
from mdlm_interp.shapes import Float32, Int64
from oracle.elementwise import exp_
from oracle.errors import ExactError
from oracle.guard import exact_operation, require_finite
from oracle.oracle import Oracle
from oracle.recipes import MAX_SUM_TERMS, RINT, SOFTMAX_BITS
from oracle.tables import sigma_of_masked

WORD_BITS = 64


@exact_operation
def counts(
    logits: Float32[Tensor, "row vocab"], excluded: int | None = None, temperature: float = 1.0
) -> Int64[Tensor, "row vocab"]:
    """Probabilities of each row in units that make its largest 2^42; the excluded token has none.

    Raises:
        ExactError: If the temperature is not positive and finite, or a row is too long.
    """
    if not 0.0 < temperature < float("inf"):
        raise ExactError(f"counts: temperature must be positive and finite, got {temperature}")
    if not 1 <= logits.shape[-1] - (excluded is not None) <= MAX_SUM_TERMS:
        raise ExactError(
            f"counts: a row must have 1 to {MAX_SUM_TERMS} tokens to draw from, got {logits.shape[-1]}"
        )
    if excluded is not None and not 0 <= excluded < logits.shape[-1]:
        raise ExactError(f"counts: the excluded token must be in [0, {logits.shape[-1]}), got {excluded}")
    require_finite(logits, "counts: logits")
    values = logits.detach().double()
    if excluded is not None:
        values[:, excluded] = -torch.inf
    distance = values - values.amax(-1, keepdim=True)
    if excluded is not None:
        distance[:, excluded] = 0.0
    # Not a Python number as divisor: on CUDA that would multiply by its reciprocal.
    scaled = exp_(distance / torch.full_like(distance[:1, :1], temperature)) * 2.0**SOFTMAX_BITS
    result = scaled.add_(RINT).sub_(RINT).to(torch.int64)
    if excluded is not None:
        result[:, excluded] = 0
    return result


def draw(weights: Int64[Tensor, "row vocab"], words: Sequence[int]) -> Int64[Tensor, " row"]:
    """One token a row, with probability proportional to its weight, for one 64-bit word each."""
    cumulative = weights.cumsum(-1)
    targets = [
        int(word) * int(total) >> WORD_BITS
        for word, total in zip(words, cumulative[:, -1].tolist(), strict=True)
    ]
    target = torch.tensor(targets, dtype=torch.int64, device=weights.device)[:, None]
    # "right" never picks a token of weight zero.
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def exact_sample(
    oracle: Oracle,
    start: Int64[Tensor, "batch pos"],
    *,
    steps: int,
    seed: int = 0,
    temperature: float = 1.0,
    indices: Sequence[int] | None = None,
    progress: bool = False,
) -> Int64[Tensor, "batch pos"]:
    """Fill the masks of `start` by the reverse process of `mdlm_interp.decoding.ancestral_sample`, exactly.

    Args:
        steps: Number of grid steps; with more steps fewer tokens are drawn at once.
        temperature: Divides the logits; 0 takes the first of the most probable tokens.
        indices: Number of each sequence, the key of its draws; by default its row.
        progress: Show a bar where there is a terminal and tqdm is installed.
    Raises:
        DataError: If an argument is outside its range, whether or not there is a mask to fill.
    """
    if steps < 1:
        raise DataError(f"steps must be at least 1, got {steps}")
    if not 0.0 <= temperature < float("inf"):
        raise DataError(f"temperature must be at least 0 and finite, got {temperature}")
    _require_ids(start, oracle.model.config.vocab_size)
    mask_id, length = oracle.model.config.mask_id, start.shape[1]
    numbers = list(indices) if indices is not None else list(range(start.shape[0]))
    if len(numbers) != start.shape[0]:
        raise DataError(
            f"indices must number each of the {start.shape[0]} sequences, got {len(numbers)}; none for 0, 1, ..."
        )
    for number in numbers:
        random_bits(seed, "range", number, 0)  # refuses a seed or number that is none
    x = start.clone()
    for step in _shown(range(steps)) if progress else range(steps):
        is_masked = x == mask_id
        if not bool(is_masked.any()):
            break
        reveal, choose = (
            np.stack([random_bits(seed, f"{what}:{step}", n, length) for n in numbers]).tolist()
            for what in ("reveal", "token")
        )
        left = steps - step
        places = [
            (row, position)
            for row, position in is_masked.nonzero().tolist()
            if reveal[row][position] * left < 1 << WORD_BITS
        ]
        if not places:
            continue
        sigmas = [sigma_of_masked(int(n), length) for n in is_masked.sum(1)]
        sigma = torch.tensor(sigmas, dtype=torch.float32, device=x.device)
        rows, positions = (torch.tensor(part, device=x.device) for part in zip(*places, strict=True))
        logits = oracle.logits(x, sigma)[rows, positions]
        if temperature == 0.0:
            logits[:, mask_id] = -torch.inf
            tokens = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
        else:
            words = [choose[row][position] for row, position in places]
            tokens = draw(counts(logits, mask_id, temperature), words)
        x[rows, positions] = tokens
    return x


def _require_ids(start: Tensor, vocab_size: int) -> None:
    if start.dtype != torch.int64 or start.dim() != 2 or start.numel() == 0:
        raise DataError(
            f"start must be int64 [batch pos] and not empty, "
            f"got {str(start.dtype).removeprefix('torch.')} {list(start.shape)}"
        )
    low, high = (int(bound) for bound in start.aminmax())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"token ids must be in [0, {vocab_size}), got {low if low < 0 else high}; "
            f"was the text encoded with another tokenizer?"
        )


def _shown(steps: range) -> Iterable[int]:
    """The steps, with a progress bar if there is the library for it: an odd machine may have torch and numpy only."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return steps
    return tqdm(steps, desc="denoise", unit="step", disable=None)
