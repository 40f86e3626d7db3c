"""The forward pass of a capture: a batch of planned sequences to the activations of its rows."""

# Axes: batch, pos, row (the recorded positions of all sequences)

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from capture.checks import check_additions, wanted_hooks
from capture.plan import SCHEDULE, Batch, PlannedSequence
from mdlm_interp.hooks import select_names
from mdlm_interp.model import HookedMDLM


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
        self.stop_at_block = last_block_needed(self._checked)

    def __call__(self, batch: Batch, *, check: bool) -> dict[str, Tensor]:
        """Activations [row, ...] by hook, float32, on the CPU.

        Args:
            check: Whether to compare the sums of the residual stream; see `checks`.
        """
        passes = [batch.sequences] if self._together else [[sequence] for sequence in batch.sequences]
        parts = [self._run(sequences, check) for sequences in passes]
        if len(parts) == 1:
            return parts[0]
        return {hook: torch.cat([part[hook] for part in parts]) for hook in self._hooks}

    @torch.inference_mode()
    def _run(self, sequences: Sequence[PlannedSequence], check: bool) -> dict[str, Tensor]:
        xt = torch.from_numpy(np.stack([sequence.xt for sequence in sequences]))
        sigma = SCHEDULE.sigma(torch.tensor([sequence.t for sequence in sequences], dtype=torch.float64))
        _, cache = self._model.run_with_cache(
            xt.to(self._device),
            self._checked if check else self._hooks,
            timesteps=sigma.to(self._device),
            stop_at_block=self.stop_at_block,
            clone=False,
        )
        if check:
            check_additions(cache)
        rows = flat_rows(sequences, xt.shape[1])
        chosen = {}
        for hook in self._hooks:
            acts = cache[hook].flatten(0, 1)
            chosen[hook] = (acts if rows is None else acts[rows.to(self._device)]).cpu()
        return chosen


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
