"""The command `explore analytics`: predictions, attention and features along a trajectory, as JSON and pictures."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdlm_interp.config_args import parse_args
from mdlm_interp.errors import ConfigError
from transcoder.config_checks import require_at_least_one

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mdlm_interp.decoding.trajectory import Trajectory
    from mdlm_interp.model import HookedMDLM
    from transcoder.replacement import ReplacementModel

FORMAT, VERSION = "mdlm-interp trajectory analytics", 1
RESULTS = "analytics.json"


@dataclass(frozen=True, kw_only=True)
class AnalyticsConfig:
    """What happens to predictions, attention and features along a denoising trajectory."""

    clt: Path | None = None
    """Directory of a trained transcoder, or none to leave features out."""
    trajectory: Path
    """Directory that `mdlm-interp sample --trajectory` wrote."""
    out: Path
    """Directory for analytics.json and the pictures."""
    model: str = "bundled"
    """Model directory, hub id, or "bundled" for the small model in this package."""
    rows: tuple[int, ...] | None = None
    """Sequences of the trajectory, counted from 0; all if none."""
    k: int = 5
    """Likeliest tokens that are compared between steps."""
    heads: bool = False
    """Tell the heads apart in the contributions to logits."""
    device: str = "cpu"
    """Where to run, as torch names it."""

    def __post_init__(self) -> None:
        require_at_least_one(self, ("k",))
        if self.rows is not None and not self.rows:
            raise ConfigError("rows must name one or more sequences, got an empty list; leave it out for all")


def main(argv: list[str]) -> int:
    """`mdlm-interp explore analytics CLT --trajectory DIR --out DIR`."""
    config = parse_args(
        AnalyticsConfig, argv, prog="mdlm-interp explore analytics", positional=("clt",), config_file=True
    )
    from mdlm_interp.analysis.figures import save
    from mdlm_interp.atomic_files import refuse_existing, replacing_directory
    from mdlm_interp.decoding.trajectory import Trajectory
    from mdlm_interp.devices import usable_device
    from mdlm_interp.model import HookedMDLM
    from transcoder.checkpoint import load_clt
    from transcoder.replacement import ReplacementModel

    refuse_existing(config.out)
    trajectory = Trajectory.load(config.trajectory)
    device = usable_device(config.device)
    model = HookedMDLM.from_pretrained(config.model, device=device)
    replacement = None
    if config.clt is not None:
        replacement = ReplacementModel(model, load_clt(config.clt, device=device).requires_grad_(False))
    results, figures = _without_features(config, model, trajectory)
    if replacement is not None:
        more, pictures = _with_features(config, replacement, trajectory)
        results, figures = results | more, figures | pictures
    about = {
        "format": FORMAT,
        "version": VERSION,
        "trajectory": str(config.trajectory),
        "model": config.model,
    }
    about |= {"clt": None if config.clt is None else str(config.clt)}
    with replacing_directory(config.out) as partial:
        text = json.dumps(_plain(about | results), indent=1, allow_nan=False)
        (partial / RESULTS).write_text(text + "\n", encoding="utf-8")
        for name, figure in figures.items():
            save(figure, partial / f"{name}.png")
    _tell(results)
    _say(f"{config.out}: {RESULTS} and {len(figures)} pictures")
    return 0


def _without_features(
    config: AnalyticsConfig, model: HookedMDLM, trajectory: Trajectory
) -> tuple[dict[str, Any], dict[str, Figure]]:
    from mdlm_interp.analysis import attention_sinks, attribute_commits, logit_lens, prediction_stability
    from mdlm_interp.analysis import figures as draw
    from mdlm_interp.tokenizers import load_tokenizer

    stability = prediction_stability(model, trajectory, k=config.k, rows=config.rows)
    lens = logit_lens(model, trajectory, rows=config.rows)
    attribution = attribute_commits(model, trajectory, rows=config.rows, heads=config.heads)
    sinks = attention_sinks(model, trajectory, rows=config.rows)
    tokenizer = load_tokenizer(config.model)
    labels = [tokenizer.token(token) for token in stability.final[0].tolist()]
    results = {
        "stability": {"summary": stability.summary(), "positions": stability.table()},
        "logit_lens": lens.summary(),
        "direct_attribution": {"against": attribution.against, "components": attribution.summary()},
        "attention_sinks": sinks.summary(),
    }
    figures = {
        "stability": draw.stability_map(stability, labels=labels),
        "lens_by_commit": draw.lens_by_commit(lens),
        "lens": draw.lens_heat_maps(lens, labels=labels),
        "direct_attribution": draw.attribution_bars(attribution),
        "sinks": draw.sink_map(sinks),
    }
    return results, figures


def _with_features(
    config: AnalyticsConfig, replacement: ReplacementModel, trajectory: Trajectory
) -> tuple[dict[str, Any], dict[str, Figure]]:
    from transcoder.trajectories import feature_lives, feature_overlap
    from transcoder.trajectories.figures import onset_rates, overlap_bars

    lives = feature_lives(replacement, trajectory, rows=config.rows)
    overlap = feature_overlap(replacement, trajectory, rows=config.rows)
    layers = range(lives.n_layers)
    results = {
        "feature_onsets": {"layers": lives.summary(), "rates": [lives.rates(layer) for layer in layers]},
        "feature_overlap": overlap.summary(),
    }
    return results, {"feature_onsets": onset_rates(lives), "feature_overlap": overlap_bars(overlap)}


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN: what is not defined is null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _tell(results: dict[str, Any]) -> None:
    found = results["stability"]["summary"]
    lead = found["median_steps_settled_before_commit"]  # NaN if the likeliest token was nowhere committed
    settled = "" if math.isnan(lead) else f", settled {lead:g} steps before (median)"
    _say(
        f"{found['positions']} positions filled; at {found['top_at_commit']:.0%} the likeliest token was committed"
        f"{settled}"
    )
    last = results["logit_lens"][-1]["depth"]
    for row in results["logit_lens"]:
        if row["to_commit"] == 0:
            named = " (the model's own)" if row["depth"] == last else ""
            _say(
                f"  {row['depth']}{named}: final token {row['probability']:.1%}, likeliest at {row['is_top']:.0%}"
            )
    for row in results.get("feature_onsets", {}).get("layers", ()):
        _say(
            f"  features of layer {row['layer']}: {row['from_start']:.0%} active from the start, "
            f"{row['before_commit_state'] + row['in_commit_state']:.0%} come before the token, "
            f"{row['with_the_token']:.0%} with it, {row['later']:.0%} later"
        )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
