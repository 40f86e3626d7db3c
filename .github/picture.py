"""The README's picture, from the bundled model and a finished demo: `python .github/picture.py mdlm-demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mdlm_interp import HookedMDLM, load_tokenizer
from mdlm_interp.filling import predict
from mdlm_interp.tokenizers import Tokenizer

PROMPT = "One day, a little girl named Lily went to the park with her mom."
STEPS_SHOWN = 9
SETTLED, REVEALED, MASKED = "#dbe9f6", "#f6c36b", "#eeeeee"


def denoise(model: HookedMDLM, tokenizer: Tokenizer) -> list[list[int]]:
    """States of a greedy completion of a text of which two words in three are masked."""
    ids = tokenizer.encode(PROMPT)
    kept = set(range(0, len(ids), 3)) | {len(ids) - 1}
    x = torch.tensor([[token if i in kept else tokenizer.mask_id for i, token in enumerate(ids)]])
    states = [x[0].tolist()]
    while tokenizer.mask_id in states[-1]:
        confidence, token = predict(model, x)[0].max(-1)
        position = int(confidence.masked_fill(x[0] != tokenizer.mask_id, -1.0).argmax())
        x[0, position] = token[position]
        states.append(x[0].tolist())
    return states


def draw_states(axes: Axes, states: list[list[int]], tokenizer: Tokenizer) -> None:
    """One row a state, one cell a token."""
    shown = sorted({round(i * (len(states) - 1) / (STEPS_SHOWN - 1)) for i in range(STEPS_SHOWN)})
    before = states[0]
    for row, number in enumerate(shown):
        for column, token in enumerate(states[number]):
            masked = token == tokenizer.mask_id
            new = not masked and before[column] == tokenizer.mask_id
            colour = MASKED if masked else REVEALED if new else SETTLED
            axes.add_patch(_cell(column, row, colour))
            text = "" if masked else tokenizer.token(token).strip() or "_"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8)
        before = states[number]
    axes.set(
        xlim=(0, len(states[0])),
        ylim=(len(shown), 0),
        xticks=[],
        title="Text settles: gaps fill by confidence",
    )
    axes.set_yticks([row + 0.5 for row in range(len(shown))], [f"{number} filled" for number in shown])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _cell(column: int, row: int, colour: str):
    from matplotlib.patches import Rectangle

    return Rectangle((column + 0.03, row + 0.06), 0.94, 0.88, color=colour, linewidth=0)


def draw_layers(axes: Axes, report: dict) -> None:
    """Variance explained of each layer's MLP output, masked and unmasked positions apart."""
    for offset, (stratum, colour) in enumerate((("unmasked", "#4477aa"), ("masked", "#ee6677"))):
        explained = [1 - layer["fvu"] for layer in report["layers"][stratum]]
        places = [layer + (offset - 0.5) * 0.38 for layer in range(len(explained))]
        axes.bar(places, explained, width=0.36, color=colour, label=f"{stratum} positions")
    axes.set(xlabel="layer", ylabel="variance explained", ylim=(0, 1), title="What its transcoder explains")
    axes.set_xticks(range(len(explained)))
    axes.legend(loc="lower center", fontsize=8, framealpha=0.95)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Draw both halves."""
    report = json.loads((Path(sys.argv[1]) / "report" / "report.json").read_text("utf-8"))
    model, tokenizer = HookedMDLM.from_pretrained("bundled"), load_tokenizer("bundled")
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.6, 1))
    draw_states(left, denoise(model, tokenizer), tokenizer)
    draw_layers(right, report)
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=130)


if __name__ == "__main__":
    main()
