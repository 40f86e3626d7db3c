"""Perplexity of samples under a second model: a causal language model's, or another MDLM's bound.

A judge is a local directory. With a config.json of model type "mdlm", or none but our own fields, it is an MDLM, and
the figure is the NELBO of each text; otherwise transformers' AutoModelForCausalLM loads it (safetensors only, none of
the directory's code is run), and the figure is the chain rule's, from each text's second token on.

Texts are encoded by the judge's own tokenizer and cut at its context. Both figures are sums over all texts divided by
the tokens they are over, and the standard error is that of the ratio. They fall when a text repeats itself, so they
come with `generation.SampleStatistics` or not at all.
"""

# Axes: batch, pos, vocab

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mdlm_interp.checkpoints import resolve_source
from mdlm_interp.errors import CheckpointError, DataError
from mdlm_interp.evaluation.bound import nelbo
from mdlm_interp.evaluation.likelihood import ratio_error
from mdlm_interp.model import HookedMDLM
from mdlm_interp.tokenizers import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class JudgedSamples:
    """What a judge says of some texts."""

    nats_per_token: float
    """In the judge's own tokens."""
    standard_error: float
    """Of nats_per_token, over texts; nan for one text."""
    n_texts: int
    n_tokens: int
    """Scored tokens, in the judge's tokenization."""
    n_cut: int
    """Texts that were longer than the judge's context, of which only the beginning counts."""
    estimator: str
    """What the figure is, in words."""

    @property
    def perplexity(self) -> float:
        """exp of the nats per token; inf where that is beyond float64."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf


def judge_samples(
    texts: Sequence[str],
    judge: str | Path,
    *,
    times_per_sequence: int = 4,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> JudgedSamples:
    """Perplexity of texts under a second model.

    Args:
        judge: Directory of an MDLM or of a causal language model with its tokenizer, or "bundled".
        times_per_sequence: Noise levels for each text, of an MDLM's bound.
        seed: Key of its times and masks.
    Raises:
        CheckpointError: If the directory holds neither.
        DataError: If no text has tokens to score.
    """
    if not texts:
        raise DataError("there must be at least one text to judge; generate some first")
    directory = resolve_source(judge)
    if _is_mdlm(directory):
        return _by_bound(texts, directory, times_per_sequence, seed, device, progress)
    return _by_chain(texts, directory, device, progress)


def _is_mdlm(directory: Path) -> bool:
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} has no readable config.json ({error}); name the directory of a model"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory}/config.json holds no settings; name the directory of a model")
    return bool(config.get("model_type", "mdlm") == "mdlm")


def _by_bound(
    texts: Sequence[str], directory: Path, times: int, seed: int, device: str, progress: bool
) -> JudgedSamples:
    model, tokenizer = HookedMDLM.from_pretrained(directory, device=device), load_tokenizer(directory)
    context = model.config.model_length
    totals: list[float] = []
    counts: list[int] = []
    cut, estimator = 0, ""
    for number, text in enumerate(tqdm(texts, desc="judge", unit="text", disable=None if progress else True)):
        ids = tokenizer.encode(text)
        cut += len(ids) > context
        ids = ids[:context]
        if not ids:
            continue
        bound = nelbo(model, torch.tensor([ids]), seed=seed, first=number, times_per_sequence=times)
        totals.append(bound.nats_per_token * len(ids))
        counts.append(len(ids))
        estimator = bound.estimator
    return _judged(totals, counts, cut, f"{estimator}, of another MDLM")


def _by_chain(texts: Sequence[str], directory: Path, device: str, progress: bool) -> JudgedSamples:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{directory} is judged by transformers, which is not installed; pip install transformers"
        ) from None
    try:
        # No remote code, no pickle.
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
        encoder: Any = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{directory} is no causal language model with a tokenizer that transformers loads: {error}"
        ) from None
    model = model.to(device).eval()
    context = int(getattr(model.config, "max_position_embeddings", 0) or 0) or None
    totals: list[float] = []
    counts: list[int] = []
    cut = 0
    for text in tqdm(texts, desc="judge", unit="text", disable=None if progress else True):
        ids = list(encoder(text, add_special_tokens=False)["input_ids"])
        if (
            text and not ids
        ):  # some versions build an empty tokenizer of a directory that they do not understand
            raise CheckpointError(f"the tokenizer of {directory} gives no token for a text; save it again")
        cut += context is not None and len(ids) > context
        ids = ids[:context]
        if len(ids) < 2:
            continue
        totals.append(_chain_nats(model, torch.tensor([ids], device=device)))
        counts.append(len(ids) - 1)
    return _judged(
        totals, counts, cut, "chain rule of a causal language model, from each text's second token on"
    )


@torch.inference_mode()
def _chain_nats(model: Any, ids: Tensor) -> float:
    log_probs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return -float(log_probs.gather(-1, ids[0, 1:, None]).sum())


def _judged(totals: list[float], counts: list[int], cut: int, estimator: str) -> JudgedSamples:
    if not counts:
        raise DataError("no text has a token that the judge can score; generate longer ones")
    return JudgedSamples(
        nats_per_token=sum(totals) / sum(counts),
        standard_error=ratio_error(totals, counts),
        n_texts=len(counts),
        n_tokens=sum(counts),
        n_cut=cut,
        estimator=estimator,
    )
