"""Patching sweeps: which activation, put from a clean run into a corrupted one, brings the clean prediction back.

1. Run the clean and the corrupted state; keep what every component adds or is.
2. Exact: for each layer, position and component (and head) one more pass of the corrupted state, with that one
   activation from the clean run; the effect is the metric's change. Several such passes are one batch.
3. By gradient (attribution patching): one pass with gradients on the corrupted state; the effect is estimated as
   (clean - corrupted) . d metric / d activation.

Source:
    Zhang and Nanda 2024, arXiv:2309.16042 (activation patching); Syed et al. 2023, arXiv:2310.10348 (by gradient).
"""

# Axes: layer, pos, head, vocab; an effect is [layer pos], of heads [layer head pos]

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from mdlm_interp.errors import DataError, nearest
from mdlm_interp.hooks import HookFunction, HookPoint
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Int64
from transcoder.interventions.metrics import Metric
from transcoder.interventions.swept import PatchingSweep

HOOKS = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "heads": "blocks.{layer}.attn.hook_z",
}
"""Hook point of each component."""
COMPONENTS = tuple(HOOKS)


def patching_sweep(
    model: HookedMDLM,
    clean: Int64[Tensor, "1 pos"],
    corrupted: Int64[Tensor, "1 _"],
    metric: Metric,
    timesteps: Tensor | None = None,
    *,
    components: Sequence[str] = COMPONENTS,
    gradient: bool = True,
    batch_size: int = 32,
    progress: bool = False,
) -> PatchingSweep:
    """Effect of every layer, position and component, exact and estimated by gradient.

    Contexts on the model, such as `frozen`, hold in all passes.

    Args:
        metric: Of the logits; see `metrics.py`.
        timesteps: sigma [1] of both states, as the model takes it.
        gradient: Estimate too; arithmetic without gradients, such as the oracle's, cannot.
        batch_size: Passes that are one batch.
    Raises:
        DataError: If the states differ in shape or not at all, are more than one sequence, or a component is none.
    """
    check_request(clean, corrupted, components, batch_size)
    names = {part: [HOOKS[part].format(layer=i) for i in range(model.config.n_blocks)] for part in components}
    wanted = [name for of_part in names.values() for name in of_part]
    with torch.no_grad():
        clean_logits, source = model.run_with_cache(clean, wanted, timesteps=timesteps)
        logits, target = model.run_with_cache(corrupted, wanted, timesteps=timesteps)
        base, goal = metric(logits).double(), metric(clean_logits).double()
    passes = _PatchedPasses(model, corrupted, metric, timesteps, batch_size)
    exact: dict[str, Tensor] = {}
    for part in components:
        effects = [passes.effects(name, source[name], progress) for name in names[part]]
        exact[part] = torch.stack(effects).cpu()
    estimated: dict[str, Tensor] = {}
    if gradient:
        slopes = _gradients(model, corrupted, metric, timesteps, wanted)
        for part in components:
            products = [(source[n] - target[n]).double() * slopes[n].double() for n in names[part]]
            estimated[part] = _by_cell([product.sum(-1) for product in products])
    return PatchingSweep(
        exact=exact,
        estimated=estimated,
        metric_clean=float(goal),
        metric_corrupted=float(base),
        clean=clean[0].tolist(),
        corrupted=corrupted[0].tolist(),
    )


def check_request(clean: Tensor, corrupted: Tensor, components: Sequence[str], batch_size: int) -> None:
    """Raise DataError for a sweep that cannot be meant."""
    if clean.shape != corrupted.shape:
        raise DataError(
            f"the clean state has shape {list(clean.shape)}, the corrupted one {list(corrupted.shape)}; a position "
            f"is patched into the same one, so change tokens, not their number"
        )
    if clean.dim() != 2 or clean.shape[0] != 1:
        raise DataError(
            f"a sweep is of one sequence [1 pos], got {list(clean.shape)}; give clean[i : i + 1], and corrupted "
            f"likewise"
        )
    if not components:
        raise DataError(f"a sweep needs a component, got none; there are {', '.join(COMPONENTS)}")
    if torch.equal(clean, corrupted):
        raise DataError(
            "the clean and the corrupted state are equal, so no patch can have an effect; change a token"
        )
    for part in components:
        if part not in COMPONENTS:
            raise DataError(f"{part!r} is no component of a sweep{nearest(str(part), COMPONENTS)}")
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}; it is how many passes run as one")


class _PatchedPasses:
    """Passes of the corrupted state with one cell patched in each sequence of a batch.

    A kernel may round otherwise in a batch of another size, so each sequence is compared with the unpatched one in its
    place of a batch of its size: what cannot reach the metric has an effect of exactly zero.
    """

    def __init__(
        self, model: HookedMDLM, corrupted: Tensor, metric: Metric, timesteps: Tensor | None, batch_size: int
    ) -> None:
        self._model, self._corrupted, self._metric = model, corrupted, metric
        self._timesteps, self._batch_size = timesteps, batch_size
        self._unpatched: dict[int, Tensor] = {}

    @torch.no_grad()
    def effects(self, name: str, source: Tensor, progress: bool) -> Tensor:
        """Of each position [pos] of a hook point; of heads, of each head and position [head pos]."""
        n_positions = self._corrupted.shape[1]
        n_heads = source.shape[2] if source.dim() == 4 else 1
        cells = [(head, position) for head in range(n_heads) for position in range(n_positions)]
        chunks = [cells[first : first + self._batch_size] for first in range(0, len(cells), self._batch_size)]
        found: list[Tensor] = []
        for chunk in tqdm(chunks, desc=name, unit="batch", leave=False, disable=None if progress else True):
            with self._model.hooks({name: _patching(source, chunk)}):
                patched = self._measured(len(chunk))
            found.append(patched - self._baseline(len(chunk)))
        values = torch.cat(found).reshape(n_heads, n_positions)
        return values if source.dim() == 4 else values[0]

    def _baseline(self, size: int) -> Tensor:
        if size not in self._unpatched:
            self._unpatched[size] = self._measured(size)
        return self._unpatched[size]

    def _measured(self, size: int) -> Tensor:
        sigma = None if self._timesteps is None else self._timesteps.expand(size)
        return self._metric(self._model(self._corrupted.expand(size, -1), sigma)).double()


def _patching(source: Tensor, chunk: Sequence[tuple[int, int]]) -> HookFunction:
    """Sequence b of the batch takes cell b from the source."""

    def patch(tensor: Tensor, hook: HookPoint) -> None:
        # The hook point hands in a copy, which is what goes on.
        for row, (head, position) in enumerate(chunk):
            if tensor.dim() == 4:
                tensor[row, position, head] = source[0, position, head]
            else:
                tensor[row, position] = source[0, position]

    return patch


def _gradients(
    model: HookedMDLM, ids: Tensor, metric: Metric, timesteps: Tensor | None, names: Sequence[str]
) -> dict[str, Tensor]:
    """Derivative of the metric by each hook point."""
    added: dict[str, Tensor] = {}

    def add_zero(tensor: Tensor, hook: HookPoint) -> Tensor:
        added[hook.name] = torch.zeros_like(tensor, requires_grad=True)
        return tensor + added[hook.name]

    with torch.enable_grad(), model.hooks(dict.fromkeys(names, add_zero)):
        value = metric(model(ids, timesteps)).sum()
        slopes = torch.autograd.grad(value, [added[name] for name in names])
    return dict(zip(names, slopes, strict=True))


def _by_cell(rows: Sequence[Tensor]) -> Tensor:
    """Of each layer's [1 pos] or [1 pos head]: effects as they are kept."""
    stacked = torch.stack([row[0] for row in rows]).cpu()
    return stacked.mT if stacked.dim() == 3 else stacked
