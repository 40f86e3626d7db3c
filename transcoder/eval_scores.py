"""What the model predicts under each condition, summed by sequence, and figures from these sums.

What is defined where, under the SUBS parameterisation of masked diffusion:
- NELBO: masked positions only, -log p(x_0 | x_t) / t each; an unmasked position adds exactly zero. A figure is the
  mean over all positions, masked or not, as the bound is per token.
- KL(original || condition) and top-1 agreement: masked positions, without the mask token. At unmasked positions SUBS
  copies the token whatever the logits say: the KL is zero and the agreement complete by definition, so no figure.
- Raw KL at unmasked positions: of the logits before SUBS, again without the mask token. No loss was ever taken of
  them and no sampler reads them; it tells how far a replacement moves the last residual stream there.

All sequences of a t-bin share no position with another, so by t is by sequence. Every figure is a ratio of two sums
over sequences, total / size. Sequences of one text, noised at several times, are no independent observations: the
sampled units are the n texts, whose sequences are added up first, and the standard error is that of a ratio estimator,

    sqrt(n / (n - 1) * sum over texts of (total_i - value * size_i)^2) / sum of size_i

It so holds however the sequences of a text depend on each other (cluster-robust), and since each sequence is noised
alike under all conditions, differences are paired.

Source:
    Cochran, Sampling Techniques, 3rd edition, section 2.11 (ratio estimator) and 9A.1 (clusters of unequal sizes).
"""

# Axes: seq, pos, vocab (without the mask token), row (positions of a batch)

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.shapes import Bool, Float, Int64
from transcoder.metrics import t_bin_of

Kind: TypeAlias = Literal["original", "replaced", "zero", "mean"]
Ablation: TypeAlias = Literal["zero", "mean"]
ABLATIONS: tuple[Ablation, ...] = ("zero", "mean")

LEAST_COST = 0.02
"""Nats per token that an ablation must cost for the share of it that is recovered to be a figure."""
PIECE_ELEMENTS = 2**19
"""Logits that are normalised at a time: they should stay in the processor's cache."""


class Condition(NamedTuple):
    """What is put in the place of MLPs."""

    kind: Kind
    layer: int | None = None
    """The one MLP; None for all."""

    def __str__(self) -> str:
        """As a report names it."""
        if self.kind == "original":
            return "original"
        what = {"replaced": "replaced", "zero": "zero ablation", "mean": "mean ablation"}[self.kind]
        return f"{'all MLPs' if self.layer is None else f'MLP {self.layer}'}: {what}"


ORIGINAL = Condition("original")
REPLACED, ZERO, MEAN = Condition("replaced"), Condition("zero"), Condition("mean")


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error over texts."""

    value: float
    """nan where `undefined` says why."""
    se: float
    """nan if there is no value, or one text only."""
    undefined: str | None = None
    """Why there is no value, or no standard error."""


@dataclass(frozen=True)
class SequenceSums:
    """One condition's sums over the positions of each sequence."""

    nelbo: NDArray[np.float64]
    """-log p(x_0 | x_t) / t in nats, masked positions."""
    kl: NDArray[np.float64]
    """KL(original || this) in nats, masked positions."""
    raw_kl: NDArray[np.float64]
    """The same of logits before SUBS, unmasked positions."""
    agreed: NDArray[np.float64]
    """Masked positions whose likeliest token is the original's; nan if a prediction is not finite."""

    @classmethod
    def empty(cls, n_sequences: int) -> SequenceSums:
        """To be filled."""
        return cls(*(np.full(n_sequences, np.nan) for _ in range(4)))

    def fill(self, sequences: NDArray[np.int64], found: tuple[NDArray[np.float64], ...]) -> None:
        """Enter the sums of some sequences, in the order of the fields."""
        for sums, values in zip((self.nelbo, self.kl, self.raw_kl, self.agreed), found, strict=True):
            sums[sequences] = values


@dataclass(frozen=True)
class Scores:
    """The sums of every condition over the same noised sequences."""

    t: NDArray[np.float64]
    text: NDArray[np.int64]
    """Number of each sequence's text, from 0: the unit of standard errors."""
    n_positions: NDArray[np.float64]
    n_masked: NDArray[np.float64]
    sums: Mapping[Condition, SequenceSums]
    t_bins: int

    def chosen(self, t_bin: int | None = None) -> NDArray[np.bool_]:
        """Which sequences are in a t-bin; in any, without one."""
        if t_bin is None:
            return np.ones(len(self.t), dtype=np.bool_)
        return np.asarray(t_bin_of(torch.from_numpy(self.t), self.t_bins).numpy() == t_bin)

    def n_texts(self, t_bin: int | None = None) -> int:
        """Different texts among the sequences in a t-bin."""
        return len(np.unique(self.text[self.chosen(t_bin)]))

    def nelbo(self, condition: Condition, t_bin: int | None = None) -> Estimate:
        """Bound on the negative log-likelihood, nats per token."""
        return self._ratio(self.sums[condition].nelbo, self.n_positions, t_bin)

    def delta_nelbo(self, condition: Condition, t_bin: int | None = None) -> Estimate:
        """Increase of the bound over the original, nats per token."""
        increase = self.sums[condition].nelbo - self.sums[ORIGINAL].nelbo
        return self._ratio(increase, self.n_positions, t_bin)

    def kl(self, condition: Condition, t_bin: int | None = None) -> Estimate:
        """KL(original || this), nats, mean over masked positions."""
        return self._ratio(self.sums[condition].kl, self.n_masked, t_bin)

    def raw_kl(self, condition: Condition, t_bin: int | None = None) -> Estimate:
        """KL of logits before SUBS, nats, mean over unmasked positions."""
        return self._ratio(self.sums[condition].raw_kl, self.n_positions - self.n_masked, t_bin)

    def top1_agreement(self, condition: Condition, t_bin: int | None = None) -> Estimate:
        """Share of masked positions whose likeliest token is the original's."""
        return self._ratio(self.sums[condition].agreed, self.n_masked, t_bin)

    def recovered(self, layer: int | None, against: Ablation, t_bin: int | None = None) -> Estimate:
        """(ablated - replaced) / (ablated - original) in the bound, of all MLPs or one alone.

        1 loses nothing, 0 is as bad as the ablation.
        """
        ablated = self.sums[Condition(against, layer)].nelbo
        replaced = self.sums[Condition("replaced", layer)].nelbo
        cost = self.delta_nelbo(Condition(against, layer), t_bin)
        if not cost.value > LEAST_COST:
            reason = cost.undefined if math.isnan(cost.value) else None
            return Estimate(
                math.nan,
                math.nan,
                reason
                or f"ablation to {against} changes the NELBO by {cost.value:+.4f} nats per token, which is not "
                f"above {LEAST_COST:g}: there is next to nothing to recover",
            )
        chosen = self.chosen(t_bin)
        return self._over_texts(ablated - replaced, ablated - self.sums[ORIGINAL].nelbo, chosen)

    def _ratio(self, total: NDArray[np.float64], size: NDArray[np.float64], t_bin: int | None) -> Estimate:
        return self._over_texts(total, size, self.chosen(t_bin) & (size != 0))

    def _over_texts(
        self, total: NDArray[np.float64], size: NDArray[np.float64], chosen: NDArray[np.bool_]
    ) -> Estimate:
        texts, unit = np.unique(self.text[chosen], return_inverse=True)
        totals, sizes = np.zeros(len(texts)), np.zeros(len(texts))
        np.add.at(totals, unit.reshape(-1), total[chosen])
        np.add.at(sizes, unit.reshape(-1), size[chosen])
        return ratio(totals, sizes)


def ratio(total: NDArray[np.float64], size: NDArray[np.float64]) -> Estimate:
    """Sum of totals over sum of sizes, with its standard error over these units, which must be independent.

    >>> found = ratio(np.array([1.0, 3.0]), np.array([2.0, 2.0]))
    >>> found.value, found.se
    (1.0, 0.5)
    """
    n = len(size)
    if n == 0:
        return Estimate(math.nan, math.nan, "there are no such positions")
    if not np.isfinite([*total, *size]).all():
        return Estimate(math.nan, math.nan, "the model's prediction is not finite")
    value = total.sum() / size.sum()
    if n == 1:
        return Estimate(float(value), math.nan, "one text has no standard error")
    spread = math.sqrt(n / (n - 1) * float(np.square(total - value * size).sum()))
    return Estimate(float(value), spread / abs(float(size.sum())))


class Scorer:
    """Compares the predictions of every condition on one batch with the original's.

    Args:
        logits: The original's.
        clean: The tokens that were masked, x_0.
    """

    def __init__(
        self,
        logits: Float[Tensor, "seq pos vocab_and_mask"],
        clean: Int64[Tensor, "seq pos"],
        is_masked: Bool[Tensor, "seq pos"],
        t: Float[Tensor, " seq"],
        mask_id: int,
    ) -> None:
        self._clean, self._is_masked, self._t = clean.flatten(), is_masked, t
        self._mask_id = mask_id
        self._reference = torch.empty_like(logits.flatten(0, 1)[:, :mask_id])
        for piece in self._pieces():
            self._reference[piece] = logits.flatten(0, 1)[piece, :mask_id].log_softmax(-1)
        self._best = self._reference.argmax(-1)

    @torch.no_grad()
    def sums(self, logits: Float[Tensor, "seq pos vocab_and_mask"]) -> tuple[NDArray[np.float64], ...]:
        """The four entries of `SequenceSums` for each sequence of the batch."""
        rows = logits.flatten(0, 1)
        nats, kl, agreed = (torch.empty(len(rows), dtype=torch.float64, device=rows.device) for _ in range(3))
        for piece in self._pieces():
            log_probs = rows[piece, : self._mask_id].log_softmax(-1)
            nats[piece] = -log_probs.gather(-1, self._clean[piece, None])[:, 0].double()
            reference = self._reference[piece]
            agreed[piece] = (log_probs.argmax(-1) == self._best[piece]).double()
            kl[piece] = (reference.exp() * (reference - log_probs)).sum(-1).double()
        nats, kl, agreed = (values.reshape(self._is_masked.shape) for values in (nats, kl, agreed))
        masked = self._is_masked.any(1)
        nelbo = torch.where(masked, self._over(nats, self._is_masked) / self._t, 0.0)
        kl_masked = self._over(kl, self._is_masked)
        agreeing = torch.where(kl_masked.isfinite(), self._over(agreed, self._is_masked), torch.nan)
        found = (nelbo, kl_masked, self._over(kl, ~self._is_masked), agreeing)
        return tuple(values.cpu().numpy() for values in found)

    def _over(self, values: Tensor, where: Tensor) -> Float[Tensor, " seq"]:
        # Not a product with zeros: a value that is not finite counts only where it is asked for.
        return torch.where(where, values, 0.0).sum(1)

    def _pieces(self) -> list[slice]:
        n_rows, size = self._is_masked.numel(), max(1, PIECE_ELEMENTS // self._mask_id)
        return [slice(start, start + size) for start in range(0, n_rows, size)]
