"""The loss curve of a training run."""

from __future__ import annotations

import json
from pathlib import Path

from mdlm_interp.atomic_files import replacing


def plot_losses(log: Path, picture: Path, quantity: str, *, averaged: bool) -> None:
    """Draw the training loss and each curve of held-out figures over steps, from a log of JSON lines.

    Args:
        quantity: What is drawn, with its unit.
        averaged: Whether the held-out figures are of averaged weights, and not of the last ones.
    """
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    trained = [(entry["step"], entry["loss_nats"]) for entry in entries if "loss_nats" in entry]
    measured = [entry for entry in entries if "held_out_nats" in entry]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if trained:
        axes.plot(
            *zip(*trained, strict=True),
            color="0.7",
            linewidth=0.8,
            label="training batches (mean between log lines)",
        )
    for number, form in enumerate(dict.fromkeys(entry["form"] for entry in measured)):
        points = [(entry["step"], entry["held_out_nats"]) for entry in measured if entry["form"] == form]
        axes.plot(
            *zip(*points, strict=True),
            color=f"C{number}",
            marker="o",
            markersize=3,
            label=f"held out, {form}, {'averaged' if averaged else 'last'} weights",
        )
    for entry in entries:
        if "ideal_loss_nats" in entry:
            label = f"{entry['compressor']}'s code length of the training text (no bound)"
            axes.axhline(entry["ideal_loss_nats"], color="0.4", linestyle=":", label=label)
    axes.set(
        xlabel="optimiser step",
        ylabel=quantity,
        title="Training a masked diffusion LM",
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    with replacing(picture) as partial:
        figure.savefig(partial, dpi=130)
