"""How good a transcoder is: reconstruction of held-out rows, and the model's bound with it in place of MLPs.

Every condition sees the same noised sequences, so differences between conditions are paired:
1. the model itself, whose activations also give the reconstruction metrics;
2. all MLPs replaced by the transcoder, and each alone;
3. all MLPs ablated to zero and to their mean, and each alone: what there is to lose.
At last the error terms are added back, which must give the model again (`eval_error_terms.py`).

A text that is there at several times is one observation: standard errors are over texts, not over sequences.

`metrics.py` says what the figures of reconstruction are, `eval_scores.py` those in the model.
"""

# Axes: seq, pos, layer, feature, vocab

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from capture.schema import T_BINS
from mdlm_interp.diffusion import LogLinearSchedule, corrupt, sequence_times
from mdlm_interp.errors import DataError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float, Float64, Int64
from transcoder.data import RowStore, store_normalisation
from transcoder.eval_error_terms import ErrorTermCheck, check_error_terms
from transcoder.eval_passes import Passes, all_conditions
from transcoder.eval_scores import ORIGINAL, Condition, Estimate, Scorer, Scores, SequenceSums
from transcoder.held_out import held_out_sequences
from transcoder.identity import check_store
from transcoder.metrics import STRATA, LayerMetrics, ReconstructionMetrics, t_bin_of
from transcoder.model import CrossLayerTranscoder
from transcoder.replacement import ReplacementModel, outputs_of
from transcoder.sequence_choice import text_numbers, well_mixed

ORACLE_SEQUENCES = 2
"""Sequences on which error terms are added back, unless asked for otherwise."""


@dataclass(frozen=True)
class NoisedSequences:
    """What the model reads in an evaluation; token ids are -1 after the end of a shorter sequence."""

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

    @property
    def lengths(self) -> Int64[Tensor, " seq"]:
        """Tokens of each sequence."""
        return (self.x_0 >= 0).sum(1)

    def part(self, numbers: Tensor) -> NoisedSequences:
        """Some sequences of equal length, without what follows their end."""
        length = int(self.lengths[numbers].max())
        return NoisedSequences(self.x_0[numbers, :length], self.x_t[numbers, :length], self.t[numbers])

    def at(self, numbers: Tensor) -> NoisedSequences:
        """Some sequences, as they are here."""
        return NoisedSequences(self.x_0[numbers], self.x_t[numbers], self.t[numbers])

    def mixed(self, limit: int, seed: int) -> Int64[Tensor, " chosen"]:
        """Numbers of at most `limit` sequences with times and texts mixed as in all; see `sequence_choice.py`."""
        return torch.from_numpy(well_mixed(self.t.numpy(), text_numbers(self.x_0), limit, seed))

    def sigma(self) -> Float[Tensor, " seq"]:
        """Total noise, as a time-conditioned model takes it."""
        return LogLinearSchedule().sigma(self.t).float()


@dataclass(frozen=True)
class Evaluation:
    """Everything measured; `report.py` writes it."""

    n_sequences: int
    n_texts: int
    """Different texts among them: the independent observations that standard errors count."""
    n_positions: int
    n_masked: int
    n_excluded: int | None
    """Sequences of the store that are left out as training text; None if the caller chose the sequences."""
    t_bins: int
    """Equal parts of [0, 1] in t that figures are told apart by: those of a store's statistics."""
    layers: Mapping[str, list[LayerMetrics]]
    """Reconstruction by stratum ("all", "unmasked", "masked") and layer."""
    layers_by_t: Mapping[str, list[list[LayerMetrics]]]
    """The same by stratum, t-bin and layer."""
    density: Mapping[str, NDArray[np.float64]]
    """Share of rows in which each feature is active [layer feature], by stratum; nan without rows."""
    scores: Scores
    """What the model predicts, by condition."""
    error_terms: ErrorTermCheck | None
    """The model with error terms added back; None if that was not asked for."""

    @property
    def n_layers(self) -> int:
        """Of the transcoder."""
        return len(self.layers["all"])

    @property
    def share_recovered(self) -> Estimate:
        """(zero - replaced) / (zero - original) in the bound: 1 loses nothing, 0 is as bad as no MLPs."""
        return self.scores.recovered(None, "zero")

    def delta_nelbo(self, condition: Condition) -> Estimate:
        """Increase of the bound over the original, in nats per token."""
        return self.scores.delta_nelbo(condition)


def evaluate(
    model: HookedMDLM,
    clt: CrossLayerTranscoder,
    data: RowStore | NoisedSequences | Int64[Tensor, "seq pos"],
    *,
    max_sequences: int | None = None,
    batch_size: int = 8,
    oracle_sequences: int | None = ORACLE_SEQUENCES,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure a transcoder in its model.

    Args:
        data: A store, of which the sequences are used whose text the transcoder was not trained on; or
            sequences, noised or clean, which are used as they are.
        max_sequences: Use this many: each time in its share, and as many texts as that allows.
        batch_size: Sequences per forward pass; it changes results by rounding only.
        oracle_sequences: Sequences on which error terms are added back, natively and under the oracle; None skips
            that.
        seed: Key of times and masks for clean sequences, and of which sequences are used under a limit.
    Raises:
        CheckpointError: If the transcoder was trained on another model, or does not record on which text.
        StoreError: If the store was captured with another model or tokenizer, or does not say with which.
        DataError: If nothing of the store is held out, there is no masked position to measure at, or a number of
            sequences is below 1.
    """
    for limit, name, none in (
        (max_sequences, "max_sequences", "uses all"),
        (oracle_sequences, "oracle_sequences", "skips them"),
    ):
        if limit is not None and limit < 1:
            raise DataError(f"{name} must be at least 1, got {limit}; None {none}")
    n_excluded: int | None = None
    if not isinstance(data, Tensor | NoisedSequences):
        check_store(clt, data)
    outputs = outputs_of(clt)
    if outputs is None and not isinstance(data, Tensor | NoisedSequences):
        outputs = store_normalisation(data, clt.config.output_hooks)
    replacement = ReplacementModel(model, clt, outputs=outputs)
    if isinstance(data, Tensor):
        data = NoisedSequences.from_tokens(data, model.config.mask_id, seed)
    elif not isinstance(data, NoisedSequences):
        held_out = held_out_sequences(clt, data).tolist()
        n_excluded = data.n_sequences - len(held_out)
        data = NoisedSequences.from_store(data, held_out)
    if max_sequences is not None:
        data = data.at(data.mixed(max_sequences, seed))
    is_masked = data.x_t == model.config.mask_id
    if not bool(is_masked.any()):
        raise DataError("no position of the evaluated sequences is masked; capture at times above 0")
    metrics, sums = _measure(replacement, data, batch_size, progress=progress)
    check = None if oracle_sequences is None else _with_error_terms(replacement, data, oracle_sequences, seed)
    lengths, texts = data.lengths.double().numpy(), text_numbers(data.x_0)
    return Evaluation(
        n_sequences=len(data.x_0),
        n_texts=len(np.unique(texts)),
        n_positions=int(lengths.sum()),
        n_masked=int(is_masked.sum()),
        n_excluded=n_excluded,
        t_bins=T_BINS,
        layers={stratum: metrics.layers(stratum) for stratum in STRATA},
        layers_by_t={
            stratum: [metrics.layers(stratum, t_bin) for t_bin in range(T_BINS)] for stratum in STRATA
        },
        density={stratum: metrics.density(stratum) for stratum in STRATA},
        scores=Scores(data.t.numpy(), texts, lengths, is_masked.sum(1).double().numpy(), sums, T_BINS),
        error_terms=check,
    )


@torch.no_grad()
def _measure(
    replacement: ReplacementModel, data: NoisedSequences, batch_size: int, *, progress: bool
) -> tuple[ReconstructionMetrics, dict[Condition, SequenceSums]]:
    """Every condition on every batch."""
    conditions = all_conditions(replacement.clt.config.n_layers)
    metrics = ReconstructionMetrics(replacement.clt, T_BINS, outputs=replacement.outputs)
    sums = {name: SequenceSums.empty(len(data.x_0)) for name in (ORIGINAL, *conditions)}
    passes = len(data.x_0) * len(sums)
    with tqdm(total=passes, desc="evaluate", unit="pass", disable=None if progress else True) as bar:
        for numbers in _batches(data, batch_size):
            for condition, found in _evaluate_batch(replacement, data.part(numbers), conditions, metrics):
                sums[condition].fill(numbers.numpy(), found)
                bar.update(len(numbers))
    return metrics, sums


def _evaluate_batch(
    replacement: ReplacementModel,
    batch: NoisedSequences,
    conditions: Sequence[Condition],
    metrics: ReconstructionMetrics,
) -> Iterator[tuple[Condition, tuple[NDArray[np.float64], ...]]]:
    """The sums of each condition; the original comes first, and its activations go to the metrics."""
    model = replacement.model
    x_t, t = batch.x_t.to(model.device), batch.t.to(model.device)
    is_masked = x_t == model.config.mask_id
    t_bin = t_bin_of(t, metrics.t_bins)[:, None].expand(x_t.shape)
    members = metrics.add_rows(is_masked.flatten(), t_bin.flatten())

    def look(layer: int, acts: Tensor, y: Tensor, y_hat: Tensor) -> None:
        metrics.add_layer(layer, members, *(rows.flatten(0, 1) for rows in (acts, y, y_hat)))

    passes = Passes(replacement, x_t, batch.sigma().to(model.device), look)
    scorer = Scorer(passes.original, batch.x_0.to(model.device), is_masked, t, model.config.mask_id)
    yield ORIGINAL, scorer.sums(passes.original)
    for condition in conditions:
        yield condition, scorer.sums(passes.logits(condition))


def _with_error_terms(
    replacement: ReplacementModel, data: NoisedSequences, n_sequences: int, seed: int
) -> ErrorTermCheck:
    """On some sequences of the first one's length, of different times and texts."""
    alike = (data.lengths == data.lengths[0]).nonzero()[:, 0]
    part = data.part(alike[data.at(alike).mixed(n_sequences, seed)])
    device = replacement.model.device
    return check_error_terms(replacement, part.x_t.to(device), part.sigma().to(device))


def _batches(data: NoisedSequences, size: int) -> Iterator[Int64[Tensor, " chosen"]]:
    """Numbers of sequences that go through the model together: of one length, in order."""
    lengths = data.lengths
    for length in sorted(set(lengths.tolist())):
        yield from (lengths == length).nonzero()[:, 0].split(size)


def masked_log_probs(logits: Float[Tensor, "chosen vocab"], mask_id: int) -> Float[Tensor, "chosen vocab"]:
    """Log-probabilities at masked positions: the mask itself is impossible (-inf), as SUBS has it."""
    index = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(index == mask_id, -torch.inf).log_softmax(-1)
