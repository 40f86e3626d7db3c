"""Attribution graphs: seconds to build one, scores, and how well it predicts ablations, for a CLT and a PLT.

Both transcoders are trained on the packaged text with the bundled model, then each sentence gets the graph of its first
mask. Ablations are the features of the largest total effect and as many others drawn at random; `local` holds attention
and norms, `spliced` lets features answer, `model` is the model with its own MLPs. Seconds are wall and CPU time of one
thread, median over the sentences; correlations and signs are medians too. Nothing timed is asserted.

    python tests/benchmarks/bench_attribution.py [--clt DIR ...] [--steps N] [--sequences N] [--centre C]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from capture import CaptureConfig, run_capture
from mdlm_interp import HookedMDLM
from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.filling import encode_prompt
from mdlm_interp.randomness import permutation
from mdlm_interp.tokenizers import load_tokenizer
from transcoder import CLTRunConfig, ReplacementModel, TrainConfig, train
from transcoder.attribution import Graph, Targets, ablate, attribute, prune, scores
from transcoder.attribution.ablations import AblationMode, Ablations
from transcoder.attribution.targets import Centre
from transcoder.checkpoint import load_clt
from transcoder.config import Connectivity
from transcoder.demo import SENTENCES
from transcoder.model import CrossLayerTranscoder

MODES: tuple[AblationMode, ...] = ("direct", "local", "spliced", "model")
MORE = (
    "The little girl put on her [MASK] and went out to play in the snow.",
    "Once upon a time there was a [MASK] who lived in a big forest.",
    "The team won the [MASK] after scoring two goals in the second half.",
)


@dataclass(frozen=True)
class Case:
    """What to train and how much to measure."""

    steps: int = 400
    sequences: int | None = None
    n_features: int = 512
    k: int = 16
    ablations: int = 40
    sentences: Sequence[str] = (*SENTENCES, *MORE)
    centre: Centre = "log_odds"


SMOKE = Case(steps=12, sequences=12, n_features=48, k=4, ablations=4, sentences=SENTENCES[:1])


def trained(case: Case, directory: Path) -> dict[str, CrossLayerTranscoder]:
    """A CLT and a PLT of the bundled model, on the packaged text."""
    text = Path(str(resources.files("mdlm_interp.assets") / "demo.txt"))
    store = directory / "activations.zarr"
    run_capture(CaptureConfig(files=(text,), out=str(store), max_sequences=case.sequences))
    found: dict[str, CrossLayerTranscoder] = {}
    kinds: tuple[Connectivity, ...] = ("clt", "plt")
    for connectivity in kinds:
        run = CLTRunConfig(
            store=store,
            out=directory / connectivity,
            connectivity=connectivity,
            n_features=case.n_features,
            k=case.k,
            held_out_fraction=0.2,
            train=TrainConfig(steps=case.steps, dead_after_tokens=25_000, plots=False),
        )
        found[connectivity] = train(run)
    return found


def measure(case: Case, clt: CrossLayerTranscoder) -> dict[str, Any]:
    """Medians over the sentences."""
    model, tokenizer = HookedMDLM.from_pretrained("bundled"), load_tokenizer("bundled")
    replacement = ReplacementModel(model, clt.requires_grad_(False))
    rows = []
    for sentence in case.sentences:
        ids = encode_prompt(model, tokenizer, sentence)
        is_masked = ids == model.config.mask_id
        sigma = LogLinearSchedule().sigma(is_masked.double().mean(1)).float()
        first = int(is_masked[0].nonzero()[0, 0])
        token = int(model(ids, sigma)[0, first, :-1].argmax())
        rows.append(
            one_graph(replacement, ids, sigma, Targets(tokens={first: [token]}, centre=case.centre), case)
        )
    return {name: median(row[name] for row in rows) for name in rows[0]}


def one_graph(
    replacement: ReplacementModel, ids: torch.Tensor, sigma: torch.Tensor, targets: Targets, case: Case
) -> dict[str, float]:
    """Seconds, size, scores, and agreement with ablations in each model."""
    wall, cpu = time.perf_counter(), time.process_time()
    graph = attribute(replacement, ids, sigma, targets=targets)
    row: dict[str, float] = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    row |= {"positions": graph.n_positions, "features": graph.n_features}
    started = time.process_time()
    kept, found = prune(graph), scores(graph)
    row |= {"prune_cpu_s": time.process_time() - started}
    row |= {"kept_nodes": int(kept.nodes.sum()), "kept_edges": int(kept.edges.sum())}
    row |= {"replacement_score": found.replacement, "completeness_score": found.completeness}
    row["worst_residual"] = float(graph.residuals.abs().max() / graph.target_values.abs().max())
    for mode in MODES:
        for chosen, nodes in (("top", None), ("random", random_nodes(graph, case.ablations))):
            ablations = ablate(replacement, graph, nodes, limit=case.ablations, mode=mode)
            row |= agreements(ablations, f"{mode}_{chosen}")
    return row


def agreements(ablations: Ablations, name: str) -> dict[str, float]:
    """Of the prediction that the mode is about: one's own edge where all is held, else the total effect."""
    fit = ablations.agreement("direct" if ablations.mode == "direct" else "total")
    return {f"{name}_correlation": fit.correlation, f"{name}_same_sign": fit.same_sign}


def random_nodes(graph: Graph, count: int) -> list[int]:
    """Features drawn by a fixed seed."""
    nodes: list[int] = permutation(0, "bench_attribution", 0, graph.n_features)[:count].tolist()
    return nodes


@pytest.mark.benchmark
def test_the_benchmark_runs(tmp_path):
    """Behavioural, with a transcoder that has hardly been trained."""
    clt = trained(SMOKE, tmp_path)["clt"]
    row = measure(SMOKE, clt)
    assert row["direct_top_correlation"] > 0.999  # float32
    assert row["worst_residual"] < 1e-4
    assert 0 < row["replacement_score"] < 1
    assert set(row) >= {f"{mode}_random_same_sign" for mode in MODES}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--clt", nargs="*", type=Path, default=[], help="trained transcoders, instead of training"
    )
    parser.add_argument("--steps", type=int, default=Case.steps)
    parser.add_argument("--sequences", type=int, default=None)
    parser.add_argument("--ablations", type=int, default=Case.ablations)
    parser.add_argument("--centre", choices=["log_odds", "mean"], default=Case.centre)
    options = parser.parse_args()
    torch.set_num_threads(1)
    case = Case(
        steps=options.steps,
        sequences=options.sequences,
        ablations=options.ablations,
        centre=options.centre,
    )
    with tempfile.TemporaryDirectory() as directory:
        if options.clt:
            transcoders = {str(path): load_clt(path) for path in options.clt}
        else:
            transcoders = trained(case, Path(directory))
        rows = {name: measure(case, clt) for name, clt in transcoders.items()}
    about = {"machine": platform.machine(), "torch": torch.__version__, "threads": 1, "centre": case.centre}
    sys.stdout.write(json.dumps({"benchmark": "attribution", **about, "results": rows}) + "\n")


if __name__ == "__main__":
    main()
