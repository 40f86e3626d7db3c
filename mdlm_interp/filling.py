"""Filling [MASK] in a sentence: what the model thinks of each, and a greedy completion.

Greedy completion commits one token a step: among all masked positions the one whose best token is most
probable, given everything committed before. [MASK] itself is never predicted (SUBS).
"""

# Axes: batch, pos, vocab

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdlm_interp.decoding.denoiser import predict
from mdlm_interp.errors import DataError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Int64
from mdlm_interp.tokenizers import MASK, Tokenizer

__all__ = ["FillResult", "MaskPrediction", "check_fits", "encode_prompt", "fill_masks", "predict"]


@dataclass(frozen=True)
class MaskPrediction:
    """The most probable tokens at one mask, before anything is filled."""

    position: int
    top: tuple[tuple[str, float], ...]
    """(token text, probability), most probable first."""


@dataclass(frozen=True)
class FillResult:
    """A completed text and the predictions for each mask."""

    text: str
    ids: tuple[int, ...]
    masks: tuple[MaskPrediction, ...]


def check_fits(tokenizer: Tokenizer, model: HookedMDLM) -> None:
    """Raise DataError unless the tokenizer's ids are the model's."""
    if tokenizer.vocab_size != model.config.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}; "
            f"use the tokenizer that the model was trained with"
        )


def encode_prompt(model: HookedMDLM, tokenizer: Tokenizer, text: str) -> Int64[torch.Tensor, "1 pos"]:
    """Token ids of a text with [MASK]s.

    Raises:
        DataError: If the text is empty or longer than the model's context.
    """
    check_fits(tokenizer, model)
    ids = tokenizer.encode_with_masks(text)
    if not ids:
        raise DataError("the text is empty; give a sentence with [MASK] in it")
    if len(ids) > model.config.model_length:
        raise DataError(
            f"the text has {len(ids)} tokens, the model's context is {model.config.model_length}; shorten it"
        )
    return torch.tensor([ids])


def fill_masks(model: HookedMDLM, tokenizer: Tokenizer, text: str, top_k: int = 5) -> FillResult:
    """Predict every [MASK] of a text and fill them greedily, the most confident first.

    Raises:
        DataError: If the text has no [MASK], or does not fit the model.
    """
    x = encode_prompt(model, tokenizer, text)
    mask_id = model.config.mask_id
    if not bool((x == mask_id).any()):
        raise DataError(f"the text has no {MASK}; write {MASK} where the model should fill in")
    if not 1 <= top_k <= mask_id:
        raise DataError(f"top_k must be in [1, {mask_id}], got {top_k}")
    probabilities = predict(model, x)[0]
    masks = []
    for position in (x[0] == mask_id).nonzero()[:, 0].tolist():
        best = probabilities[position].topk(top_k)
        words = [tokenizer.token(int(token)) for token in best.indices]
        masks.append(MaskPrediction(position, tuple(zip(words, best.values.tolist(), strict=True))))
    while bool((x == mask_id).any()):
        confidence, token = predict(model, x)[0].max(-1)
        position = int(confidence.masked_fill(x[0] != mask_id, -1.0).argmax())
        x[0, position] = token[position]
    ids = x[0].tolist()
    return FillResult(tokenizer.decode(ids), tuple(ids), tuple(masks))
