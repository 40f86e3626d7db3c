"""The forward pass of a capture: a batch of planned sequences to the activations of its rows."""

# Axes: batch, pos, row (the recorded positions of all sequences)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from capture.checks import check_additions, wanted_hooks
from capture.plan import Batch, PlannedSequence, sigmas
from capture.schema import row_shape
from mdlm_interp.errors import HookError
from mdlm_interp.hooks import HookPoint, select_names
from mdlm_interp.model import HookedMDLM


class StoppedError(Exception):
    """A forward pass ended early, because nobody wants its rows any more."""


class Forward:
    """Runs a model over batches and gathers what its hook points see.

    Args:
        model: In either arithmetic, on the device to run on.
        hooks: Names of the hook points to record, in execution order.
        together: Whether the sequences of a batch run in one pass; else each by itself, at its own length.
    """

    def __init__(self, model: HookedMDLM, hooks: Sequence[str], *, together: bool) -> None:
        self._model, self._hooks, self._together = model, list(hooks), together
        self._device = next(model.parameters()).device
        checked = set(hooks) | set(wanted_hooks(hooks, model.hook_names))
        self._checked = select_names(list(checked), model.hook_names)
        self._starts = select_names("blocks.*.hook_resid_pre", model.hook_names)
        self.stop_at_block = last_block_needed(self._checked)
        self.shapes = {hook: row_shape(hook, model.config) for hook in hooks}
        """Of one row of each."""

    def twin(self) -> Forward:
        """Another that may run at the same time: the same weights, with hook points of its own."""
        weights = [*self._model.parameters(), *self._model.buffers()]
        model = deepcopy(self._model, {id(tensor): tensor for tensor in weights})
        return Forward(model, self._hooks, together=self._together)

    def __call__(
        self,
        batch: Batch,
        *,
        check: bool,
        out: Mapping[str, Tensor] | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Mapping[str, Tensor]:
        """Activations [row, ...] by hook, float32, on the CPU.

        Args:
            check: Whether to compare the sums of the residual stream; see `checks`.
            out: Memory for them, such as a `RowPool` gives; none takes new memory.
            stopping: Asked at every block; once it is true, the pass ends there.
        Raises:
            StoppedError: If it was stopped.
        """
        rows = sum(len(sequence.positions) for sequence in batch.sequences)
        if out is None:
            out = {hook: torch.empty((rows, *shape)) for hook, shape in self.shapes.items()}
        start = 0
        for sequences in [batch.sequences] if self._together else [[one] for one in batch.sequences]:
            stop = start + sum(len(sequence.positions) for sequence in sequences)
            self._run(sequences, check, {hook: acts[start:stop] for hook, acts in out.items()}, stopping)
            start = stop
        return out

    @torch.inference_mode()
    def _run(
        self,
        sequences: Sequence[PlannedSequence],
        check: bool,
        out: Mapping[str, Tensor],
        stopping: Callable[[], bool],
    ) -> None:
        xt = torch.from_numpy(np.stack([sequence.xt for sequence in sequences]))
        rows = flat_rows(sequences, xt.shape[1])
        if rows is not None:
            rows = rows.to(self._device)
        copied: set[str] = set()
        checked: dict[str, Tensor] = {}

        # Copied while they are in the processor's cache; and the model's memory is free for its next operations.
        def keep(acts: Tensor, hook: HookPoint) -> None:
            if stopping():
                raise StoppedError(f"stopped at {hook.name}")
            if hook.name in out:
                _copy(acts, rows, out[hook.name])
                copied.add(hook.name)
            if check and hook.name in self._checked:
                checked[hook.name] = acts

        listened = [*self._starts, *out, *(self._checked if check else ())]
        with self._model.hooks(dict.fromkeys(listened, keep), read_only=True):
            self._model(
                xt.to(self._device), sigmas(sequences).to(self._device), stop_at_block=self.stop_at_block
            )
        if copied != set(out):
            raise HookError(
                f"the forward pass went by {sorted(set(out) - copied)} without a call; this is a bug"
            )
        check_additions(checked)


def _copy(acts: Tensor, rows: Tensor | None, out: Tensor) -> None:
    """Some rows of activations [batch, pos, ...], all if none are named."""
    if acts.dtype != out.dtype:
        raise HookError(
            f"a capture keeps {out.dtype}, and the model computes in {acts.dtype}; load it in float32"
        )
    flat = acts.flatten(0, 1)
    if rows is None:
        out.copy_(flat)
    elif flat.device == out.device:
        torch.index_select(flat, 0, rows, out=out)
    else:
        out.copy_(flat[rows])


def flat_rows(sequences: Sequence[PlannedSequence], length: int) -> Tensor | None:
    """Numbers of the recorded tokens in the flattened batch; None if all are."""
    if all(len(sequence.positions) == length for sequence in sequences):
        return None
    flat = [number * length + sequence.positions for number, sequence in enumerate(sequences)]
    return torch.from_numpy(np.concatenate(flat))


def last_block_needed(hooks: Sequence[str]) -> int | None:
    """`stop_at_block` of the shortest forward pass that reaches all these hook points."""
    tops = [top for top, _ in groupby(hooks, key=lambda hook: hook.partition(".")[0])]
    if any(top not in ("blocks", "hook_embed", "hook_cond") for top in tops):
        return None
    return max((int(hook.split(".")[1]) + 1 for hook in hooks if hook.startswith("blocks.")), default=0)
