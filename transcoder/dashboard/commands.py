"""The command `mdlm-interp explore`: a directory of pages about a transcoder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdlm_interp.config_args import parse_args
from mdlm_interp.errors import ConfigError, DataError
from transcoder.config_checks import require_apart, require_at_least_one

if TYPE_CHECKING:
    from capture import ActivationStore
    from transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """Write HTML pages about a transcoder's features; `explore trajectory` shows a decoding by itself."""

    clt: Path
    """Directory of the transcoder."""
    store: Path
    """Activation store of the same model, in which features are looked for."""
    out: Path
    """Directory for the pages; it must not exist, or be empty."""
    graph: Path | None = None
    """Attribution graph as JSON in circuit-tracer's form, of the same transcoder."""
    trajectory: Path | None = None
    """Directory that `mdlm-interp sample --trajectory` wrote, by the same model."""
    commitments: Path | None = None
    """Directory that `explore graph --trajectory` wrote, of the same transcoder and trajectory."""
    row: int = 0
    """Sequence of the trajectory that the commitments are of, counted from 0."""
    model: str | None = None
    """Model directory, hub id, or "bundled"; none takes the one that the store names."""
    max_sequences: int | None = None
    """Sequences of the store to look at, of all times and of many texts; none looks at all."""
    examples: int = 8
    """Strongest occurrences shown of a feature, at most one of a sequence."""
    context: int = 12
    """Tokens shown before and after each."""
    tokens: int = 10
    """Promoted and suppressed tokens shown of a feature, so many of each."""
    nearest: int = 8
    """Nearest features shown; 0 leaves out the search, whose time grows with the square of the features."""
    device: str = "cpu"
    """Where to run, as torch names it."""

    def __post_init__(self) -> None:
        require_at_least_one(self, ("max_sequences", "examples", "tokens"))
        require_apart(self.out, self.store)
        if self.commitments is not None and self.trajectory is None:
            raise ConfigError("commitments are shown with the trajectory that they are of; give --trajectory")
        if self.commitments is None and self.row != 0:
            raise ConfigError(f"row is the commitments', got {self.row} and no commitments; leave it out")


def explore(argv: Sequence[str]) -> int:
    """`mdlm-interp explore CLT --store STORE --out DIR`."""
    config = parse_args(
        SiteConfig, argv, prog="mdlm-interp explore", positional=("clt", "store"), config_file=True
    )
    from capture import open_store
    from mdlm_interp.atomic_files import refuse_existing
    from mdlm_interp.decoding.trajectory import Trajectory
    from mdlm_interp.devices import usable_device
    from mdlm_interp.model import HookedMDLM
    from mdlm_interp.tokenizers import load_tokenizer
    from mdlm_interp.viewer.graph_page import check_graph, read_graph
    from mdlm_interp.viewer.trajectory_page import check_tokenizer
    from transcoder.attribution.command import read_commitments
    from transcoder.attribution.pages import check_commitments
    from transcoder.checkpoint import load_clt
    from transcoder.dashboard.features import collect
    from transcoder.dashboard.site import Commitments, write_site

    refuse_existing(config.out)
    device = usable_device(config.device)
    store = open_store(config.store)
    source = config.model if config.model is not None else _model_of(store)
    clt = load_clt(config.clt, source, device=device)
    tokenizer = load_tokenizer(source)
    # What was given wrongly is told before the long part.
    graph = trajectory = commitments = None
    shape = (clt.config.n_layers, clt.config.n_features)
    if config.graph is not None:
        graph = read_graph(config.graph)
        check_graph(graph, features=shape)
    if config.trajectory is not None:
        trajectory = Trajectory.load(config.trajectory)
        check_tokenizer(trajectory, tokenizer)
        if config.commitments is not None:
            found, pruned = read_commitments(config.commitments)
            check_commitments(found, trajectory, tokenizer, row=config.row, features=shape)
            commitments = Commitments(found=found, row=config.row, pruned=pruned)
    model = HookedMDLM.from_pretrained(source, device=device)
    boards = collect(
        clt,
        model,
        store,
        n_examples=config.examples,
        context=config.context,
        max_sequences=config.max_sequences,
        n_tokens=config.tokens,
        n_nearest=config.nearest,
        progress=True,
    )
    about = _about(config, source, clt, store)
    first = write_site(
        config.out,
        boards,
        tokenizer,
        about=about,
        graph=graph,
        commitments=commitments,
        trajectory=trajectory,
    )
    sys.stdout.write(f"{first}: open it in a browser\n")
    return 0


def _model_of(store: ActivationStore) -> str:
    named = store.config.get("model")
    if not isinstance(named, str):
        raise DataError(f"{store.name} does not name its model; give it with --model")
    return named


def _about(
    config: SiteConfig, source: str, clt: CrossLayerTranscoder, store: ActivationStore
) -> list[tuple[str, str]]:
    from transcoder.data import coverage

    provenance: Mapping[str, Any] = store.provenance
    shape = clt.config
    return [
        ("transcoder", str(config.clt)),
        ("layers, width", f"{shape.n_layers}, {shape.d_model}"),
        ("features of a layer", f"{shape.n_features:,}"),
        ("activation", shape.activation + (f", k {shape.k}" if shape.k is not None else "")),
        (
            "writes to",
            {"clt": "its own and all later layers", "plt": "its own layer"}.get(
                shape.connectivity, f"{shape.reach} layers from its own on"
            ),
        ),
        ("reads, writes", f"{shape.input_hook}, {shape.output_hook}"),
        ("model", source),
        ("model's weights, SHA-256", str(provenance.get("weights_sha256", "not recorded"))),
        ("store", str(config.store)),
        ("rows of the store", str(coverage(store))),
    ]
