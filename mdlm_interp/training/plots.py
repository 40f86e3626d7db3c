"""The loss curve of a training run."""

from __future__ import annotations

import json
from pathlib import Path


def plot_losses(log: Path, picture: Path) -> None:
    """Draw training loss and held-out bound over steps from a log of JSON lines."""
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    trained = [(entry["step"], entry["loss_nats"]) for entry in entries if "loss_nats" in entry]
    held_out = [(entry["step"], entry["held_out_nats"]) for entry in entries if "held_out_nats" in entry]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if trained:
        axes.plot(
            *zip(*trained, strict=True),
            color="0.7",
            linewidth=0.8,
            label="training batches (mean between log lines)",
        )
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True),
            color="C0",
            marker="o",
            markersize=3,
            label="held-out text, averaged weights",
        )
    axes.set(
        xlabel="optimiser step",
        ylabel="bound on the NLL (nats per token)",
        title="Training a masked diffusion LM",
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=130)
