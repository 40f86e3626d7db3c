"""How good a transcoder is: reconstruction of held-out rows, and the model's bound with it spliced in.

Every condition sees the same noised sequences, so differences between conditions are paired:
1. the model itself, whose activations also give the reconstruction metrics;
2. all MLPs replaced by the transcoder, and each alone;
3. all MLPs ablated, to zero or to their mean, and each alone to zero: what there is to lose.
"""

# Axes: seq, pos, layer, d_model, vocab, chosen (masked positions)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mdlm_interp.diffusion import LogLinearSchedule, corrupt, sequence_times
from mdlm_interp.errors import DataError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float, Float64, Int64
from transcoder.data import RowStore
from transcoder.held_out import held_out_sequences
from transcoder.identity import check_store
from transcoder.metrics import STRATA, LayerMetrics, ReconstructionMetrics
from transcoder.model import CrossLayerTranscoder
from transcoder.replacement import ReplacementModel

ORIGINAL, REPLACED, ZERO, MEAN = "original", "replaced", "zero ablation", "mean ablation"

LEAST_COST = 0.02
"""Nats per token that ablating to zero must cost for the share of it that is recovered to be a figure."""


@dataclass(frozen=True)
class NoisedSequences:
    """What the model reads in an evaluation."""

    x_0: Int64[Tensor, "seq pos"]
    x_t: Int64[Tensor, "seq pos"]
    t: Float64[Tensor, " seq"]

    @classmethod
    def from_store(cls, store: RowStore, sequences: Sequence[int]) -> NoisedSequences:
        """Sequences of a store, as they were when it was captured."""
        x_0, x_t = store.tokens()
        return cls(x_0[list(sequences)], x_t[list(sequences)], store.times()[list(sequences)])

    @classmethod
    def from_tokens(cls, x_0: Int64[Tensor, "seq pos"], mask_id: int, seed: int) -> NoisedSequences:
        """Clean sequences, noised at times spread over (0, 1): a pure function of (seed, number)."""
        numbers = range(x_0.shape[0])
        t = sequence_times(seed, numbers)
        x_t = corrupt(x_0, LogLinearSchedule().move_chance(t), mask_id, seed=seed, indices=numbers)
        return cls(x_0, x_t, t)


@dataclass(frozen=True)
class ConditionScore:
    """The model's prediction under one condition, against the model itself on the same input."""

    nelbo: float
    """Bound on the negative log-likelihood, nats per token: mean over positions of -log p(x_0 | x_t) / t."""
    kl: float
    """KL(original || this) in nats, mean over masked positions."""
    top1_agreement: float
    """Share of masked positions whose likeliest token is the original's."""


@dataclass(frozen=True)
class Evaluation:
    """Everything measured; `report.py` writes it."""

    n_sequences: int
    n_positions: int
    n_masked: int
    n_excluded: int | None
    """Sequences of the store that are left out as training text; None if the caller chose the sequences."""
    layers: Mapping[str, list[LayerMetrics]]
    """Reconstruction by stratum ("all", "unmasked", "masked") and layer."""
    density: NDArray[np.float64]
    """Share of rows in which each feature is active [layer feature]."""
    conditions: Mapping[str, ConditionScore]
    """Original, all replaced, all ablated to zero and to the mean."""
    replaced_alone: list[ConditionScore]
    """Only layer l replaced."""
    zero_alone: list[ConditionScore]
    """Only layer l ablated to zero."""

    @property
    def share_recovered(self) -> float:
        """(zero - replaced) / (zero - original) in the bound: 1 loses nothing, 0 is as bad as no MLPs.

        nan where `undefined` says why.
        """
        return _share(self.conditions[ORIGINAL], self.conditions[REPLACED], self.conditions[ZERO])

    @property
    def share_recovered_alone(self) -> list[float]:
        """The same for each layer replaced alone, against that layer ablated alone."""
        original = self.conditions[ORIGINAL]
        pairs = zip(self.replaced_alone, self.zero_alone, strict=True)
        return [_share(original, replaced, zero) for replaced, zero in pairs]

    @property
    def undefined(self) -> dict[str, str]:
        """Why a share recovered or a bound has no value, by what it is of; empty if all have."""
        conditions = {**self.conditions}
        conditions |= {f"{REPLACED} {layer}": score for layer, score in enumerate(self.replaced_alone)}
        conditions |= {f"{ZERO} {layer}": score for layer, score in enumerate(self.zero_alone)}
        reasons = {
            name: "the model's prediction is not finite"
            for name, score in conditions.items()
            if not all(map(math.isfinite, (score.nelbo, score.kl)))
        }
        zeroed = {"all MLPs": self.conditions[ZERO]}
        zeroed |= {f"MLP {layer}": score for layer, score in enumerate(self.zero_alone)}
        for name, zero in zeroed.items():
            cost = zero.nelbo - self.conditions[ORIGINAL].nelbo
            if cost <= LEAST_COST:
                reasons[f"share recovered, {name}"] = (
                    f"ablation to zero changes the NELBO by {cost:+.4f} nats per token, which is not above "
                    f"{LEAST_COST:g}: there is next to nothing to recover"
                )
        return reasons

    def delta_nelbo(self, condition: str) -> float:
        """Increase of the bound over the original, in nats per token."""
        return self.conditions[condition].nelbo - self.conditions[ORIGINAL].nelbo


def _share(original: ConditionScore, replaced: ConditionScore, zero: ConditionScore) -> float:
    span = zero.nelbo - original.nelbo
    return (zero.nelbo - replaced.nelbo) / span if span > LEAST_COST else math.nan


def evaluate(
    model: HookedMDLM,
    clt: CrossLayerTranscoder,
    data: RowStore | NoisedSequences | Int64[Tensor, "seq pos"],
    *,
    max_sequences: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure a transcoder in its model.

    Args:
        data: A store, of which the sequences are used whose text the transcoder was not trained on; or
            sequences, noised or clean, which are used as they are.
        max_sequences: Use this many, evenly spread.
        seed: Key of times and masks for clean sequences.
    Raises:
        CheckpointError: If the transcoder was trained on another model, or does not record on which text.
        StoreError: If the store was captured with another model or tokenizer, or does not say with which.
        DataError: If nothing of the store is held out, or there is no masked position to measure at.
    """
    n_excluded: int | None = None
    if not isinstance(data, Tensor | NoisedSequences):
        check_store(clt, data)
    replacement = ReplacementModel(model, clt)
    if isinstance(data, Tensor):
        data = NoisedSequences.from_tokens(data, model.config.mask_id, seed)
    elif not isinstance(data, NoisedSequences):
        held_out = held_out_sequences(clt, data).tolist()
        n_excluded = data.n_sequences - len(held_out)
        data = NoisedSequences.from_store(data, held_out)
    data = _thinned(data, max_sequences)
    if not bool((data.x_t == model.config.mask_id).any()):
        raise DataError("no position of the evaluated sequences is masked; capture at times above 0")
    conditions = _conditions(replacement)
    metrics = ReconstructionMetrics(clt)
    scores = {name: _Score() for name in conditions}
    with (
        torch.no_grad(),
        tqdm(total=len(data.x_0), desc="evaluate", unit="seq", disable=None if progress else True) as bar,
    ):
        for batch in _batches(data, batch_size):
            _evaluate_batch(replacement, batch, conditions, metrics, scores)
            bar.update(len(batch.x_0))
    done = {name: score.result() for name, score in scores.items()}
    return Evaluation(
        n_sequences=len(data.x_0),
        n_positions=data.x_0.numel(),
        n_masked=int((data.x_t == model.config.mask_id).sum()),
        n_excluded=n_excluded,
        layers={stratum: metrics.layers(stratum) for stratum in STRATA},
        density=metrics.density(),
        conditions={name: done[name] for name in (ORIGINAL, REPLACED, ZERO, MEAN)},
        replaced_alone=[done[f"{REPLACED} {layer}"] for layer in range(clt.config.n_layers)],
        zero_alone=[done[f"{ZERO} {layer}"] for layer in range(clt.config.n_layers)],
    )


def _conditions(replacement: ReplacementModel) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """What is changed about the model, by name; the original comes first."""
    conditions: dict[str, Callable[[], AbstractContextManager[None]]] = {
        ORIGINAL: nullcontext,
        REPLACED: replacement.spliced,
        ZERO: partial(replacement.ablated, "zero"),
        MEAN: partial(replacement.ablated, "mean"),
    }
    for layer in range(replacement.clt.config.n_layers):
        conditions[f"{REPLACED} {layer}"] = partial(replacement.spliced, [layer])
        conditions[f"{ZERO} {layer}"] = partial(replacement.ablated, "zero", [layer])
    return conditions


def _evaluate_batch(
    replacement: ReplacementModel,
    batch: NoisedSequences,
    conditions: Mapping[str, Callable[[], AbstractContextManager[None]]],
    metrics: ReconstructionMetrics,
    scores: Mapping[str, _Score],
) -> None:
    model, config = replacement.model, replacement.clt.config
    x_t = batch.x_t.to(model.device)
    is_masked = x_t == model.config.mask_id
    sigma = LogLinearSchedule().sigma(batch.t).float().to(model.device)
    clean = batch.x_0.to(model.device)[is_masked]
    # The bound's weight of each masked position.
    weight = (1 / batch.t)[:, None].expand(batch.x_0.shape)[is_masked.cpu()]
    names = [*config.input_hooks, *config.output_hooks]
    reference: Tensor | None = None
    for name, condition in conditions.items():
        with condition():
            if reference is None:
                logits, cache = model.run_with_cache(x_t, names, timesteps=sigma, clone=False)
                x, y = (
                    torch.stack([cache[hook].flatten(0, 1) for hook in hooks])
                    for hooks in (config.input_hooks, config.output_hooks)
                )
                metrics.update(x, y, is_masked.flatten())
            else:
                logits = model(x_t, sigma)
        log_probs = masked_log_probs(logits[is_masked], model.config.mask_id)
        reference = log_probs if reference is None else reference
        scores[name].update(log_probs, reference, clean, weight, n_positions=x_t.numel())


def masked_log_probs(logits: Float[Tensor, "chosen vocab"], mask_id: int) -> Float[Tensor, "chosen vocab"]:
    """Log-probabilities at masked positions: the mask itself is impossible (-inf), as SUBS has it."""
    index = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(index == mask_id, -torch.inf).log_softmax(-1)


class _Score:
    """Running sums of one condition."""

    def __init__(self) -> None:
        self._nelbo = self._kl = 0.0
        self._agreed = self._masked = self._positions = 0

    def update(
        self,
        log_probs: Float[Tensor, "chosen vocab"],
        reference: Float[Tensor, "chosen vocab"],
        clean: Int64[Tensor, " chosen"],
        weight: Float64[Tensor, " chosen"],
        *,
        n_positions: int,
    ) -> None:
        nats = -log_probs.gather(-1, clean[:, None])[:, 0].double().cpu()
        self._nelbo += float((nats * weight).sum())
        # 0 * (-inf - -inf) at the mask token is not a number; its probability is zero, so it adds nothing.
        difference = torch.where(reference.isinf(), 0.0, reference - log_probs)
        self._kl += float((reference.exp() * difference).sum(-1).double().sum())
        self._agreed += int((log_probs.argmax(-1) == reference.argmax(-1)).sum())
        self._masked += len(clean)
        self._positions += n_positions

    def result(self) -> ConditionScore:
        return ConditionScore(
            nelbo=self._nelbo / self._positions,
            kl=self._kl / self._masked,
            top1_agreement=self._agreed / self._masked,
        )


def _thinned(data: NoisedSequences, limit: int | None) -> NoisedSequences:
    count = len(data.x_0)
    if limit is None or limit >= count:
        return data
    chosen = torch.linspace(0, count - 1, limit, dtype=torch.float64).round().long()
    return NoisedSequences(data.x_0[chosen], data.x_t[chosen], data.t[chosen])


def _batches(data: NoisedSequences, size: int) -> Iterator[NoisedSequences]:
    for start in range(0, len(data.x_0), size):
        part = slice(start, start + size)
        yield NoisedSequences(data.x_0[part], data.x_t[part], data.t[part])
