"""What processes that share features hand each other in a step: reconstructions, scalars and thresholds, nothing more.

Run as a program, by torchrun, this file trains a few steps and writes the bytes of every collective operation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from mdlm_interp.config_files import from_mapping, to_mapping
from transcoder.config import CLTRunConfig
from transcoder.run import train
from transcoder.trainer import Trainer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
N_LAYERS, ROWS, D_MODEL, K, AUXK = 3, 50, 32, 4, 5
RECONSTRUCTION = 4 * N_LAYERS * ROWS * D_MODEL
SCALARS = 200
"""Bytes at most of penalties, norms of gradients, and counts of active and dead features, a few for each layer."""
DIGIT = 8 * 256
"""Bytes of the counts of one of four digits of a layer's global threshold."""

KINDS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu", "k": None},
    "jumprelu": {"activation": "jumprelu", "k": None},
    "topk": {"k": K},
    "batchtopk": {"activation": "batchtopk", "k": K},
}
WIDTHS = (80, 240)
INPUT = {"allreduce_": 0, "allgather_": 1}
"""Which argument a process hands in; the whole of any other operation counts."""


# The program


class Sent(TorchDispatchMode):
    """Notes name and bytes of every operation of torch.distributed, whoever calls it and by what name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            name = func._schema.name.split("::")[1]
            parts = args[INPUT[name]] if name in INPUT else [*args, *(kwargs or {}).values()]
            self.found.append((name, sum(part.nbytes for part in _tensors(parts))))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [found for part in value for found in _tensors(part)] if isinstance(value, list | tuple) else []


def program(file: Path) -> None:
    """Train each job; write beside it what this process hands to each operation in each step."""
    step, steps = Trainer.step, []

    def stepping(self: Trainer) -> Any:
        with Sent() as sent:
            metrics = step(self)
        steps.append({"dead": metrics.dead, "sent": sent.found})
        return metrics

    Trainer.step = stepping  # type: ignore[method-assign]
    distributed.init_process_group("gloo")
    for job in json.loads(file.read_text()):
        config = from_mapping(CLTRunConfig, job, source=str(file))
        steps.clear()
        train(config)
        (config.out / f"sent-{os.environ['RANK']}.json").write_text(json.dumps(steps))
    distributed.destroy_process_group()


# Running it


@pytest.fixture(scope="module")
def sent(store, short_settings, tmp_path_factory) -> dict[tuple[str, int, bool], Any]:
    """Steps by activation, features of a layer, and whether sums are ordered; two processes, one launch."""
    root = tmp_path_factory.mktemp("collectives")
    configs = {}
    for kind, changes in KINDS.items():
        for width in WIDTHS:
            for ordered in (False, True):
                settings = replace(
                    short_settings,
                    steps=4,
                    auxk=AUXK,
                    verify_sequences=None,
                    sparsity="tanh",
                    pre_act="threshold",
                    blocks=(1, 2) if ordered else None,
                    mesh=(1, 2),
                )
                configs[kind, width, ordered] = CLTRunConfig(
                    store=store.path,
                    out=root / f"{kind}-{width}-{ordered}",
                    n_features=width,
                    train=settings,
                    **changes,
                )
    file = root / "jobs.json"
    file.write_text(json.dumps([to_mapping(config) for config in configs.values()]))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(file)]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    found = {}
    for key, config in configs.items():
        first, second = (json.loads((config.out / f"sent-{rank}.json").read_text()) for rank in range(2))
        assert first == second
        assert len(first) == 4
        found[key] = first
    return found


def allowed(kind: str, reviving: bool) -> list[int]:
    """Bytes of what is larger than scalars, in any order: of each row reconstructions, and the k largest values."""
    found = [RECONSTRUCTION]
    if kind == "topk":
        found.append(4 * N_LAYERS * ROWS * K)
    if kind == "batchtopk":
        found += 4 * N_LAYERS * [DIGIT]
    if reviving:
        found += [RECONSTRUCTION, 4 * N_LAYERS * ROWS * AUXK]
    return sorted(found)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_reconstructions_scalars_and_thresholds_are_sent(sent, kind, width, ordered):
    """Exact: no weights, no gradients and no activations, however many features there are."""
    revived = 0
    for step in sent[kind, width, ordered]:
        names, sizes = {name for name, _ in step["sent"]}, [size for _, size in step["sent"]]
        assert names == {"allreduce_", "allgather_"}
        large = sorted(size for size in sizes if size > SCALARS)
        reviving = kind in ("topk", "batchtopk") and len(large) > len(allowed(kind, False))
        assert large == allowed(kind, reviving)
        assert not reviving or step["dead"] > 0
        revived += reviving
        assert sum(size for size in sizes if size <= SCALARS) <= SCALARS
    assert (revived > 0) == (kind in ("topk", "batchtopk"))


def test_gathered_weights_and_activations_would_be_seen():
    """The neighbour that fails: a share of each is of another size than all that is allowed."""
    for width in WIDTHS:
        own = width // 2
        for size in (4 * N_LAYERS * own * D_MODEL, 4 * N_LAYERS * ROWS * own, 4 * own * D_MODEL):
            assert all(size not in allowed(kind, reviving) for kind in KINDS for reviving in (False, True))
            assert size > SCALARS


if __name__ == "__main__":
    torch.set_num_threads(1)
    program(Path(sys.argv[1]))
