"""The command `explore graph`: why the model fills a mask as it does."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mdlm_interp.config_args import parse_args
from mdlm_interp.errors import ConfigError
from transcoder.config_checks import require_at_least_one, require_in

if TYPE_CHECKING:
    from mdlm_interp.tokenizers import Tokenizer
    from transcoder.attribution.graph import Graph
    from transcoder.attribution.influence import Pruned
    from transcoder.attribution.steps import CommitmentGraph
    from transcoder.replacement import ReplacementModel

SHOWN = 8
"""Features listed."""
GRAPH_PAGE, COMMITMENTS_PAGE = "graph.html", "commitments.html"
OF_TEXTS, OF_TRAJECTORIES = ("mass", "max_logits"), ("row", "max_tokens")
"""Options that mean something only for one of the two."""
GRAPHS = "graphs"
"""Directory of a commitment graph's tensors."""


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """Attribution graph of what the model predicts at a mask, or of a token that it committed while decoding."""

    clt: Path
    """Directory of a trained transcoder."""
    text: str | None = None
    """Text with [MASK] in it."""
    trajectory: Path | None = None
    """Instead of a text: directory that `mdlm-interp sample --trajectory` wrote."""
    position: int | None = None
    """Position to explain, counted from 0 in tokens; the first mask of the text if none."""
    row: int | None = None
    """Sequence of the trajectory, counted from 0; the first if none."""
    max_tokens: int | None = None
    """With a trajectory: graphs at most, of the token and of those committed before it; 8 if none."""
    out: Path
    """Directory for the graphs: a page, JSON for circuit-tracer's and Neuronpedia's viewers, and tensors."""
    model: str = "bundled"
    """Model directory, hub id, or "bundled" for the small model in this package."""
    centre: Literal["log_odds", "mean"] = "log_odds"
    """What a logit is relative to: first-order log-odds, or the mean over the vocabulary."""
    mass: float | None = None
    """With a text: explain the likeliest tokens until their probabilities add up to this; 0.95 if none."""
    max_logits: int | None = None
    """But at most this many; 10 if none."""
    max_features: int | None = None
    """Feature nodes of a graph, the most influential; all that are active if none."""
    node_share: float = 0.8
    """Share of the nodes' influence that the page and the JSON keep."""
    edge_share: float = 0.98
    """Share of the edges' influence that the page and the JSON keep."""
    check: int = 0
    """Ablate this many features and compare with what the graph predicts."""
    scan: str = "mdlm"
    """What the viewers call model and transcoder."""
    device: str = "cpu"
    """Where to run, as torch names it."""

    def __post_init__(self) -> None:
        require_at_least_one(self, ("max_tokens", "max_logits", "max_features"))
        require_in(self, "check", "at least 0", self.check >= 0)
        for name in ("node_share", "edge_share"):
            require_in(self, name, "in [0, 1]", 0.0 <= getattr(self, name) <= 1.0)
        require_in(self, "mass", "in (0, 1]", self.mass is None or 0.0 < self.mass <= 1.0)
        if (self.text is None) == (self.trajectory is None):
            given = "neither" if self.text is None else "both"
            raise ConfigError(f"a graph is of a text or of a trajectory, got {given}; give one of them")
        if self.trajectory is not None and self.position is None:
            raise ConfigError("a trajectory's graph needs position, the token to explain; counted from 0")
        what, others = ("text", OF_TRAJECTORIES) if self.trajectory is None else ("trajectory", OF_TEXTS)
        for name in others:
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} is not about a {what}, got {getattr(self, name)}; leave it out")


def main(argv: list[str]) -> int:
    """`mdlm-interp explore graph CLT TEXT --out DIR`."""
    config = parse_args(
        GraphConfig, argv, prog="mdlm-interp explore graph", positional=("clt", "text"), config_file=True
    )
    from mdlm_interp.atomic_files import refuse_existing
    from mdlm_interp.devices import usable_device
    from mdlm_interp.model import HookedMDLM
    from mdlm_interp.tokenizers import load_tokenizer
    from transcoder.checkpoint import load_clt
    from transcoder.replacement import ReplacementModel

    refuse_existing(config.out)
    device = usable_device(config.device)
    model = HookedMDLM.from_pretrained(config.model, device=device)
    tokenizer = load_tokenizer(config.model)
    replacement = ReplacementModel(model, load_clt(config.clt, device=device).requires_grad_(False))
    explain = _explain_text if config.trajectory is None else _explain_commitment
    page = explain(config, replacement, tokenizer)
    _say(f"{config.out}: JSON for circuit-tracer's and Neuronpedia's viewers, and the tensors of each graph")
    _say(f"{page}: open it in a browser")
    return 0


def _explain_text(config: GraphConfig, replacement: ReplacementModel, tokenizer: Tokenizer) -> Path:
    from mdlm_interp.diffusion import LogLinearSchedule
    from mdlm_interp.errors import DataError
    from mdlm_interp.filling import encode_prompt
    from mdlm_interp.viewer.graph_page import graph_page
    from mdlm_interp.viewer.page import write_page
    from transcoder.attribution.building import attribute
    from transcoder.attribution.pages import graph_data
    from transcoder.attribution.targets import Targets

    assert config.text is not None
    model = replacement.model
    ids = encode_prompt(model, tokenizer, config.text).to(model.device)
    is_masked = ids == model.config.mask_id
    if not bool(is_masked.any()):
        raise DataError("the text has no [MASK]; write [MASK] where the model should fill in")
    # The time that the share of masks suggests, as fill_masks has it.
    sigma = LogLinearSchedule().sigma(is_masked.double().mean(1)).float()
    position = int(is_masked[0].nonzero()[0, 0]) if config.position is None else config.position
    targets = Targets(
        positions=(position,),
        mass=0.95 if config.mass is None else config.mass,
        max_tokens=10 if config.max_logits is None else config.max_logits,
        centre=config.centre,
    )
    started = time.perf_counter()
    graph = attribute(
        replacement, ids, sigma, targets=targets, max_features=config.max_features, progress=True
    )
    seconds = time.perf_counter() - started
    _say(f"{graph.n_features} feature nodes, {graph.n_nodes} nodes in all, {seconds:.1f} s")
    pruned = _export(config, graph, tokenizer, "graph")
    graph.save(config.out / "graph")
    write_page(config.out / GRAPH_PAGE, graph_page(graph_data(graph, pruned, tokenizer)))
    _show(config, graph, pruned, replacement, tokenizer)
    return config.out / GRAPH_PAGE


def _explain_commitment(config: GraphConfig, replacement: ReplacementModel, tokenizer: Tokenizer) -> Path:
    from mdlm_interp.decoding.trajectory import Trajectory
    from mdlm_interp.viewer.page import write_page
    from transcoder.attribution.pages import commitment_graph_page
    from transcoder.attribution.steps import commitment_graph, words

    assert config.trajectory is not None
    assert config.position is not None
    trajectory = Trajectory.load(config.trajectory)
    row = 0 if config.row is None else config.row
    found = commitment_graph(
        replacement,
        trajectory,
        config.position,
        row=row,
        max_tokens=8 if config.max_tokens is None else config.max_tokens,
        centre=config.centre,
        max_features=config.max_features,
        progress=True,
    )
    texts = [tokenizer.token(token) for token in trajectory.final[row].tolist()]
    _say("\n".join(words(texts, found)))
    pruned = [_export(config, one.graph, tokenizer, one.slug) for one in found.commitments]
    found.save(config.out / GRAPHS)
    page = commitment_graph_page(found, trajectory, tokenizer, row=row, pruned=pruned)
    write_page(config.out / COMMITMENTS_PAGE, page)
    _show(config, found.commitments[0].graph, pruned[0], replacement, tokenizer)
    return config.out / COMMITMENTS_PAGE


def read_commitments(directory: Path) -> tuple[CommitmentGraph, list[Pruned]]:
    """What `explore graph --trajectory` wrote: its graphs, and the parts of them that its page and JSON keep.

    Raises:
        DataError: If the directory is none, incomplete or damaged.
    """
    from mdlm_interp.errors import DataError
    from mdlm_interp.viewer.graph_page import read_graph
    from transcoder.attribution.influence import prune
    from transcoder.attribution.steps import CommitmentGraph

    found = CommitmentGraph.load(directory / GRAPHS)
    kept = []
    for one in found.commitments:
        path = directory / f"{one.slug}.json"
        try:
            shares = read_graph(path)["metadata"]["pruning_settings"]
            node_share, edge_share = (float(shares[f"{kind}_threshold"]) for kind in ("node", "edge"))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path} does not say which share of the graph it keeps ({error}); make it again with explore graph"
            ) from None
        kept.append(prune(one.graph, node_share, edge_share))
    return found, kept


def _export(config: GraphConfig, graph: Graph, tokenizer: Tokenizer, slug: str) -> Pruned:
    from transcoder.attribution.export import graph_json, write_graph_json
    from transcoder.attribution.influence import prune

    pruned = prune(graph, config.node_share, config.edge_share)
    ids = graph.input_ids.tolist()
    predicted = set(graph.logits[:, 1].tolist())
    found = graph_json(
        graph,
        pruned,
        [tokenizer.token(token) for token in ids],
        logit_tokens={token: tokenizer.token(token) for token in predicted},
        slug=slug,
        scan=config.scan,
        prompt=tokenizer.decode(ids),
    )
    write_graph_json(found, config.out)
    return pruned


def _show(
    config: GraphConfig, graph: Graph, pruned: Pruned, replacement: ReplacementModel, tokenizer: Tokenizer
) -> None:
    """Predictions, scores, the most influential features, and the check if there is one."""
    from transcoder.attribution.ablations import ablate
    from transcoder.attribution.influence import scores, total_effects

    ids = graph.input_ids.tolist()
    for (position, token), probability in zip(
        graph.logits.tolist(), graph.probabilities.tolist(), strict=True
    ):
        _say(f"  position {position}: {tokenizer.token(token)!r} {probability:.1%}")
    found = scores(graph)
    _say(
        f"replacement score {found.replacement:.3f}, completeness {found.completeness:.3f}; "
        f"kept {int(pruned.nodes.sum())} nodes and {int(pruned.edges.sum())} edges"
    )
    mass = float(graph.probabilities.sum())  # what all paths to the logits weigh
    effects = total_effects(graph)[int(graph.probabilities.argmax())]
    for node in pruned.influence[: graph.n_features].argsort(descending=True, stable=True)[:SHOWN].tolist():
        layer, position, feature = graph.features[node].tolist()
        _say(
            f"  feature {layer}/{feature} at {position} {tokenizer.token(ids[position])!r}: influence "
            f"{float(pruned.influence[node]) / mass:.1%}, total effect on the likeliest {float(effects[node]):+.3f}"
        )
    if config.check:
        measured = ablate(replacement, graph, limit=config.check, progress=True)
        fit = measured.agreement("total")
        _say(
            f"{config.check} features ablated in the model: correlation of predicted and measured changes "
            f"{fit.correlation:.3f}, same sign {fit.same_sign:.0%}"
        )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
