"""The command `explore trajectory`: a trajectory in the browser or the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from mdlm_interp.config_args import parse_args
from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.errors import ConfigError
from mdlm_interp.tokenizers import load_tokenizer
from mdlm_interp.viewer.page import refuse_existing_page, write_page
from mdlm_interp.viewer.trajectory_page import check_tokenizer, trajectory_page


@dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """Show how a text was decoded: as an HTML page, or step by step in the terminal."""

    trajectory: Path
    """Directory that `mdlm-interp sample --trajectory` or `Trajectory.save` wrote."""
    out: Path | None = None
    """HTML file to write, complete in itself; without it the terminal plays the trajectory."""
    overwrite: bool = False
    """Replace the HTML file if it is there."""
    tokenizer: str = "bundled"
    """Model or directory whose tokenizer the text is in."""
    title: str | None = None
    """Heading of the page; the trajectory's name if none."""
    sequences: tuple[int, ...] | None = None
    """Rows of the batch, counted from 0, that the page holds, or the one that the terminal shows first; all if none."""
    speed: float = 4.0
    """Steps in a second in the terminal."""

    def __post_init__(self) -> None:
        if self.out is None and (self.overwrite or self.title is not None):
            raise ConfigError("overwrite and title are about a page; name its file with --out")
        if self.out is None and self.sequences is not None and len(self.sequences) != 1:
            raise ConfigError(
                f"the terminal shows one sequence first, got {len(self.sequences)}; name one, or a page with --out"
            )


def explore(argv: list[str]) -> int:
    """`mdlm-interp explore trajectory TRAJECTORY`."""
    config = parse_args(
        ExploreConfig, argv, prog="mdlm-interp explore trajectory", positional=("trajectory",)
    )
    if config.out is not None:
        refuse_existing_page(config.out, overwrite=config.overwrite)
    trajectory = Trajectory.load(config.trajectory)
    tokenizer = load_tokenizer(config.tokenizer)
    if config.out is None:
        from mdlm_interp.viewer.player import replay

        check_tokenizer(trajectory, tokenizer)
        replay(trajectory, tokenizer, speed=config.speed, row=_row(config, trajectory))
        return 0
    title = config.title if config.title is not None else f"Decoding: {config.trajectory.resolve().name}"
    page = trajectory_page(trajectory, tokenizer, title=title, sequences=config.sequences)
    write_page(config.out, page, overwrite=config.overwrite)
    sys.stdout.write(f"{config.out}: open it in a browser\n")
    return 0


def _row(config: ExploreConfig, trajectory: Trajectory) -> int:
    """The sequence that the terminal shows first."""
    row = config.sequences[0] if config.sequences else 0
    batch = trajectory.states.shape[1]
    if not 0 <= row < batch:
        raise ConfigError(f"sequences must be in [0, {batch}), the trajectory's rows; got {row}")
    return row
