"""A linear probe of t: how well the diffusion time can be read from a residual stream, layer by layer.

1. Ridge regression from activations to t, with an intercept that is not penalised; each dimension in units of its
   standard deviation on the training side, so that one penalty fits all layers.
2. Sequences, not rows, are held out: all rows of a sequence share its t, and a probe that saw some of them would know
   the others'. Whether a sequence is held out is a function of (seed, its number) alone.
3. R^2 = 1 - sum (t - predicted)^2 / sum (t - mean t)^2, over held-out rows. 1 is perfect; guessing the mean gives 0.
4. The baseline is the same regression on permuted times, of which there is one for each group: the rows of one sequence
   that have one t (all of its rows in a captured text; those of one step in a trajectory).

Everything comes from sums in float64, one pass over the rows: products over all rows of a side, and one sum for each
group, so memory grows with groups and not with rows.
"""

# Axes: row, d, group, label (t, then each permutation of it)

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.hooks import select_names
from mdlm_interp.model import HookedMDLM
from mdlm_interp.randomness import permutation, uniforms
from mdlm_interp.shapes import Float, Float64, Int64

BLOCK_ROWS = 4096
"""Rows of a store that are in memory at a time."""


@runtime_checkable
class RowSource(Protocol):
    """Rows with their sequence and time, as a capture store has them."""

    def __len__(self) -> int:
        """Rows."""
        ...

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the activations."""
        ...

    def read(self, rows: slice, hooks: Sequence[str]) -> dict[str, Tensor]:
        """Activations [row, ...] by name."""
        ...

    def coords(self, rows: slice, names: Sequence[str]) -> dict[str, Tensor]:
        """`seq` and `t` of the rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows: activations by hook name [row d], and each row's time and sequence."""

    acts: Mapping[str, Tensor]
    t: Float[Tensor, " row"]
    sequence: Int64[Tensor, " row"]


@dataclass(frozen=True, kw_only=True)
class TimeProbe:
    """How well t is predicted from each hook point."""

    hooks: tuple[str, ...]
    r2: tuple[float, ...]
    """On held-out sequences; NaN if all of them have one t."""
    r2_train: tuple[float, ...]
    r2_permuted: tuple[tuple[float, ...], ...]
    """On held-out sequences, of each permutation of the times."""
    n_train: int
    """Sequences."""
    n_held_out: int
    ridge: float

    def table(self) -> list[dict[str, Any]]:
        """A mapping for each hook point."""
        return [
            {
                "hook": hook,
                "r2": self.r2[i],
                "r2_train": self.r2_train[i],
                "r2_permuted_mean": sum(self.r2_permuted[i]) / len(self.r2_permuted[i]),
                "r2_permuted_max": max(self.r2_permuted[i]),
            }
            for i, hook in enumerate(self.hooks)
        ]


def is_held_out(seed: int, sequence: int, fraction: float) -> bool:
    """Whether a sequence is held out."""
    return bool(uniforms(seed, "time-probe:held-out", sequence, 1)[0] < fraction)


def probe_time(
    blocks: Iterable[Rows],
    *,
    ridge: float = 1e-3,
    held_out: float = 0.3,
    n_permutations: int = 5,
    seed: int = 0,
) -> TimeProbe:
    """Probe rows that come block by block; see `probe_store` and `probe_states` for what makes them.

    Args:
        ridge: Penalty on the squared weights, relative to the mean squared error.
        held_out: Share of the sequences to hold out, on average.
        n_permutations: Of the baseline.
    Raises:
        DataError: If a setting is out of range or either side gets too few sequences.
    """
    _check_settings(ridge, held_out, n_permutations)
    groups = _Groups(seed, held_out)
    sums: dict[str, _Sums] = {}
    for rows in blocks:
        number = groups.of(rows)
        tested = torch.tensor(groups.tested)[number]
        for hook, acts in rows.acts.items():
            flat = acts.flatten(1).double().cpu()
            sums.setdefault(hook, _Sums(flat)).add(flat, number, tested)
    groups.check()
    labels = groups.labels(n_permutations)
    found = [one.scores(labels, torch.tensor(groups.tested), ridge) for one in sums.values()]
    return TimeProbe(
        hooks=tuple(sums),
        r2=tuple(float(test[0]) for _, test in found),
        r2_train=tuple(float(train[0]) for train, _ in found),
        r2_permuted=tuple(tuple(test[1:].tolist()) for _, test in found),
        n_train=groups.count(False),
        n_held_out=groups.count(True),
        ridge=ridge,
    )


def probe_store(
    store: RowSource,
    hooks: Sequence[str] | None = None,
    *,
    block_rows: int = BLOCK_ROWS,
    **settings: Any,
) -> TimeProbe:
    """Probe the rows of a capture store.

    Args:
        hooks: All of the store's if none.
        settings: As `probe_time` takes them.
    """
    names = tuple(store.hooks if hooks is None else hooks)

    def blocks() -> Iterator[Rows]:
        for start in range(0, len(store), block_rows):
            part = slice(start, min(start + block_rows, len(store)))
            about = store.coords(part, ("seq", "t"))
            yield Rows(acts=store.read(part, names), t=about["t"], sequence=about["seq"].long())

    return probe_time(blocks(), **settings)


def probe_states(
    model: HookedMDLM,
    states: Int64[Tensor, "state pos"],
    t: Float64[Tensor, " state"],
    sigma: Float[Tensor, " state"],
    sequence: Int64[Tensor, " state"],
    hooks: str | Sequence[str] = "blocks.*.hook_resid_post",
    *,
    batch_size: int = 16,
    **settings: Any,
) -> TimeProbe:
    """Probe the residual streams of some masked states, every position a row.

    Args:
        sigma: As the model takes it.
        sequence: Which text each state is of; states of one text are held out together.
        settings: As `probe_time` takes them.
    """
    names = select_names(hooks if isinstance(hooks, str) else list(hooks), model.hook_names)

    def blocks() -> Iterator[Rows]:
        for start in range(0, len(states), batch_size):
            part = slice(start, start + batch_size)
            x, noise = states[part].to(model.device), sigma[part].to(model.device)
            with torch.no_grad():
                _, cache = model.run_with_cache(x, names, timesteps=noise, clone=False)
            acts = {name: cache[name].flatten(0, 1) for name in names}
            n_pos = states.shape[1]
            yield Rows(
                acts=acts,
                t=t[part].repeat_interleave(n_pos),
                sequence=sequence[part].repeat_interleave(n_pos),
            )

    return probe_time(blocks(), **settings)


class _Groups:
    """Rows of one sequence and one t, numbered as they come."""

    def __init__(self, seed: int, held_out: float) -> None:
        self._seed, self._held_out = seed, held_out
        self._numbers: dict[tuple[int, float], int] = {}
        self.tested: list[bool] = []
        """Of each group."""

    def of(self, rows: Rows) -> Int64[Tensor, " row"]:
        """The group of each row."""
        if not bool(rows.t.isfinite().all()):
            raise DataError("t must be finite to be predicted, got NaN or infinity; is the store incomplete?")
        found = []
        for key in zip(rows.sequence.tolist(), rows.t.tolist(), strict=True):
            if key not in self._numbers:
                self._numbers[key] = len(self._numbers)
                self.tested.append(is_held_out(self._seed, key[0], self._held_out))
            found.append(self._numbers[key])
        return torch.tensor(found)

    def count(self, tested: bool) -> int:
        """Sequences on a side."""
        pairs = zip(self._numbers, self.tested, strict=True)
        return len({sequence for (sequence, _), side in pairs if side == tested})

    def check(self) -> None:
        """Raise DataError if a side has too few."""
        train, held_out = self.count(False), self.count(True)
        if train < 2 or held_out < 1:
            raise DataError(
                f"a probe needs 2 sequences to learn from and 1 held out, got {train} and {held_out}; give more, or "
                f"another held_out or seed"
            )

    def labels(self, n_permutations: int) -> Float64[Tensor, "group label"]:
        """Each group's t, and each permutation of them."""
        t = torch.tensor([time for _, time in self._numbers], dtype=torch.float64)
        orders = [permutation(self._seed, "time-probe:permuted", i, len(t)) for i in range(n_permutations)]
        return torch.stack([t, *(t[torch.from_numpy(order)] for order in orders)], 1)


class _Sums:
    """Sums over the rows of one hook point."""

    def __init__(self, first: Float64[Tensor, "row d"]) -> None:
        # An intercept makes any shift harmless, and small numbers keep the differences below exact.
        self._shift = first.mean(0)
        d = first.shape[1]
        self._products = {side: torch.zeros(d, d, dtype=torch.float64) for side in (False, True)}
        self._totals = torch.zeros(0, d, dtype=torch.float64)
        self._counts = torch.zeros(0, dtype=torch.float64)

    def add(self, acts: Float64[Tensor, "row d"], group: Tensor, tested: Tensor) -> None:
        """More rows."""
        x = acts - self._shift
        for side, products in self._products.items():
            of_side = x[tested == side]
            products += of_side.T @ of_side
        more = int(group.max()) + 1 - len(self._counts)
        if more > 0:
            self._totals = torch.cat([self._totals, self._totals.new_zeros(more, x.shape[1])])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more)])
        self._totals.index_add_(0, group, x)
        self._counts.index_add_(0, group, torch.ones_like(x[:, 0]))

    def scores(self, labels: Tensor, tested: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """R^2 [label] on the training side and on the held-out side."""
        train, held_out = self._side(labels, tested, False), self._side(labels, tested, True)
        scale = train.cov_x.diagonal().clamp(min=0).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)  # what never varies gets no weight
        normal = train.cov_x / (scale[:, None] * scale)
        normal = normal + ridge * torch.eye(len(scale), dtype=torch.float64)
        weights = torch.linalg.solve(normal, train.cov_xy / scale[:, None]) / scale[:, None]
        return train.r2(weights, train), held_out.r2(weights, train)

    def _side(self, labels: Tensor, tested: Tensor, side: bool) -> _Side:
        of_side = tested == side
        counts, totals, y = self._counts[of_side], self._totals[of_side], labels[of_side]
        n = counts.sum()
        mean_x, mean_y = totals.sum(0) / n, counts @ y / n
        return _Side(
            mean_x=mean_x,
            mean_y=mean_y,
            cov_x=self._products[side] / n - mean_x[:, None] * mean_x,
            cov_xy=totals.T @ y / n - mean_x[:, None] * mean_y,
            var_y=counts @ (y - mean_y).square() / n,
        )


@dataclass(frozen=True)
class _Side:
    """Means and covariances over rows."""

    mean_x: Float64[Tensor, " d"]
    mean_y: Float64[Tensor, " label"]
    cov_x: Float64[Tensor, "d d"]
    cov_xy: Float64[Tensor, "d label"]
    var_y: Float64[Tensor, " label"]

    def r2(self, weights: Float64[Tensor, "d label"], train: _Side) -> Float64[Tensor, " label"]:
        """Of predictions mean_y + weights . (x - mean_x) with the training side's means."""
        bias = self.mean_y - train.mean_y - weights.T @ (self.mean_x - train.mean_x)
        error = self.var_y - 2 * (weights * self.cov_xy).sum(0) + (weights * (self.cov_x @ weights)).sum(0)
        # 0 / 0, or anything over a variance of zero, says nothing.
        return torch.where(self.var_y > 0, 1 - (error + bias.square()) / self.var_y, torch.nan)


def _check_settings(ridge: float, held_out: float, n_permutations: int) -> None:
    if not (ridge > 0 and ridge < float("inf")):
        raise DataError(f"ridge must be greater than 0 and finite, got {ridge}")
    if not 0 < held_out < 1:
        raise DataError(f"held_out must be a share in (0, 1), got {held_out}")
    if n_permutations < 1:
        raise DataError(f"n_permutations must be at least 1, got {n_permutations}")
