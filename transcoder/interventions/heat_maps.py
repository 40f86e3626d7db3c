"""Heat maps of a patching sweep: a row of panels for each component, exact on the left and by gradient on the right."""

# Axes: layer, pos, head

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mdlm_interp.atomic_files import replacing
from transcoder.figures import DOTS_PER_INCH, grid_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from transcoder.interventions.swept import PatchingSweep


def save_heat_maps(sweep: PatchingSweep, path: Path, labels: Sequence[str]) -> Path:
    """Write the figure as a PNG, whole or not at all."""
    with replacing(path) as partial:
        heat_maps(sweep, labels).savefig(partial, dpi=DOTS_PER_INCH, format="png")
    return path


def heat_maps(sweep: PatchingSweep, labels: Sequence[str]) -> Figure:
    """Layers upwards, positions to the right; red raises the metric, blue lowers it.

    Both panels of a row have one scale, symmetric around zero.
    """
    rows = {part: _flat(effects) for part, effects in sweep.exact.items()}
    sides = (
        {"exact": sweep.exact, "by gradient": sweep.estimated} if sweep.estimated else {"exact": sweep.exact}
    )
    heights = [1.2 + 0.16 * max(6, len(values)) for values in rows.values()]
    width = 1.5 + len(sides) * (1.5 + 0.3 * len(labels))
    figure, grid = grid_of((width, sum(heights) + 1.8), len(rows), len(sides))
    grid.set_height_ratios(heights)
    for row, part in enumerate(rows):
        limit = max(float(side[part].abs().max()) for side in sides.values()) or 1.0
        image: Any = None
        panels = []
        for column, (title, side) in enumerate(sides.items()):
            axes = figure.add_subplot(grid[row, column])
            image = _draw(axes, _flat(side[part]), limit)
            axes.set_title(f"{part}, {title}", fontsize=9)
            _name_rows(axes, sweep.exact[part])
            last = row == len(rows) - 1
            axes.set_xticks(range(len(labels)), labels if last else [], rotation=90, fontsize=7)
            panels.append(axes)
        figure.colorbar(image, ax=panels, label="change of the metric")
    figure.suptitle(
        f"Clean activations patched into the corrupted run: "
        f"metric {sweep.metric_corrupted:.2f}, clean {sweep.metric_clean:.2f}",
        fontsize=10,
    )
    return figure


def _flat(effects: Tensor) -> Tensor:
    """[layer pos], or of heads [layer * head, pos]."""
    return effects.flatten(0, -2)


def _draw(axes: Any, values: Tensor, limit: float) -> Any:
    return axes.imshow(
        values.numpy(),
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )


def _name_rows(axes: Any, effects: Tensor) -> None:
    """A tick for each layer; heads are between two lines."""
    n_layers, n_heads = effects.shape[0], effects.shape[1] if effects.dim() == 3 else 1
    middles = [layer * n_heads + (n_heads - 1) / 2 for layer in range(n_layers)]
    axes.set_yticks(middles, [str(layer) for layer in range(n_layers)], fontsize=7)
    axes.set_ylabel("layer, heads upwards" if n_heads > 1 else "layer", fontsize=8)
    if n_heads > 1:
        for layer in range(1, n_layers):
            axes.axhline(layer * n_heads - 0.5, color="black", linewidth=0.5)
