"""One run on 1, 2 and 4 real processes, stopped on some and continued on others: the same bytes.

Run as a program, by torchrun, this file trains what a list of jobs asks for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import distributed

from mdlm_interp.config_files import from_mapping, to_mapping
from mdlm_interp.errors import MdlmError
from transcoder.checkpoint import load_clt
from transcoder.config import METRICS, CLTRunConfig, InitConfig
from transcoder.run import train
from transcoder.scale_out.processes import Processes
from transcoder.trainer import Trainer
from transcoder.training_log import read_log
from transcoder.training_state import latest_training_state

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
BLOCKS = (4, 4)
"""More than two along either axis: two parts have the same sum in any order."""

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"skip": True},
    "batchtopk": {"activation": "batchtopk", "init": InitConfig(active_features=3.0, rows=100)},
    "jumprelu": {"activation": "jumprelu", "init": InitConfig(threshold=0.7)},
}
PENALTIES: dict[str, Any] = {
    "sparsity": "tanh",
    "sparsity_coefficient": 0.05,
    "pre_act": "threshold",
    "row_weights": "subs",
}


# The program


def program(file: Path) -> None:
    """Train each job, and write beside it what every process was told."""
    rank = int(os.environ["RANK"])
    step = Trainer.step
    distributed.init_process_group("gloo")
    for job in json.loads(file.read_text()):
        config = from_mapping(CLTRunConfig, job["config"], source=str(file))

        def stepping(self: Trainer, stop: int | None = job["stop"]) -> Any:
            # Only one of them gets the signal.
            if self.step_number == stop and rank == distributed.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self)

        Trainer.step = stepping  # type: ignore[method-assign]
        told = "done"
        try:
            train(config)
        except KeyboardInterrupt:
            told = "interrupted"
        except MdlmError as error:
            told = str(error)
        (config.out / f"told-{rank}.txt").write_text(told)
    distributed.destroy_process_group()


# Running it


def job(config: CLTRunConfig, stop: int | None = None) -> dict[str, Any]:
    return {"config": to_mapping(config), "stop": stop}


def torchrun(processes: int, *words: str | Path) -> str:
    """What the processes say; all must end well."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *map(str, words)]
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
    return done.stdout


def together(processes: int, jobs: list[dict[str, Any]], file: Path) -> None:
    file.write_text(json.dumps(jobs))
    torchrun(processes, __file__, file)


def told(config: CLTRunConfig) -> list[str]:
    return [file.read_text() for file in sorted(config.out.glob("told-*.txt"))]


def digest(config: CLTRunConfig) -> str:
    return hashlib.sha256((config.out / "clt.safetensors").read_bytes()).hexdigest()


def log_without_speed(config: CLTRunConfig) -> list[dict[str, Any]]:
    return [{**line, "rows_per_s": 0} for line in read_log(config.out / METRICS)]


def with_train(config: CLTRunConfig, out: Path, **changes: Any) -> CLTRunConfig:
    return replace(config, out=out, train=replace(config.train, **changes))


@pytest.fixture(scope="module")
def configs(store, short_settings, tmp_path_factory) -> dict[str, CLTRunConfig]:
    """Six steps of a run of each kind in blocks, with features that die young."""
    settings = replace(
        short_settings,
        steps=6,
        batch_size=48,
        verify_sequences=None,  # by the test of the command
        blocks=BLOCKS,
    )
    root = tmp_path_factory.mktemp("scale-out")
    return {
        kind: CLTRunConfig(
            store=store.path,
            out=root / kind,
            n_features=64,
            held_out_fraction=0.2,
            **{"k": 2, **changes},
            train=replace(settings, **PENALTIES),
        )
        for kind, changes in KINDS.items()
    }


@pytest.fixture(scope="module")
def runs(configs) -> dict[str, dict[str, CLTRunConfig]]:
    """Finished runs of each kind, by how they came about; two launches in all."""
    found: dict[str, dict[str, CLTRunConfig]] = {kind: {} for kind in configs}
    for kind, config in configs.items():
        names = {
            "one": None,
            "along features": (1, 2),
            "along data": (2, 1),
            "both": (2, 2),
            "to one": (1, 2),
        }
        for name, mesh in {**names, "to four": (1, 2), "diverged": (2, 1)}.items():
            found[kind][name] = with_train(config, config.out / name.replace(" ", "-"), mesh=mesh)
    root = next(iter(configs.values())).out.parent
    every = found.values()
    stopped = [job(of["to one"], stop=2) for of in every]
    topk = found["topk"]
    topk["diverged"] = with_train(topk["diverged"], topk["diverged"].out, lr=1e30)
    whole = [job(of[name]) for of in every for name in ("along features", "along data")]
    together(2, [*whole, *stopped, job(topk["diverged"])], root / "two.json")
    for of in every:
        assert told(of["to one"]) == ["interrupted", "interrupted"]
        saved = latest_training_state(of["to one"].out)
        assert saved is not None
        assert saved.name == "step-00000003"
        shutil.copytree(of["to one"].out, of["to four"].out)
        of["to one"] = with_train(of["to one"], of["to one"].out, mesh=None)
        of["to four"] = with_train(of["to four"], of["to four"].out, mesh=None)
    together(4, [job(of[name]) for of in every for name in ("both", "to four")], root / "four.json")
    for of in every:
        train(of["one"])
        train(of["to one"])
    return found


@pytest.mark.parametrize("name", ["along features", "along data", "both", "to one", "to four"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_processes_writes_the_bytes_of_one(runs, kind, name):
    """Exact: the transcoder and every figure on the way, also of runs stopped on two and continued on others."""
    assert digest(runs[kind][name]) == digest(runs[kind]["one"])
    assert log_without_speed(runs[kind][name]) == log_without_speed(runs[kind]["one"])
    assert sorted(path.name for path in runs[kind][name].out.glob("*.*") if "told" not in path.name) == [
        "clt.safetensors", "config.json", "metrics.jsonl", "training_sequences.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_runs_have_dead_features_and_all_terms(runs, kind):
    log = log_without_speed(runs[kind]["one"])
    assert [line["step"] for line in log] == [3, 6]
    assert all(0 < line["dead"] < 3 * 64 for line in log)
    term = "pre_act" if kind == "jumprelu" else "auxk"
    assert all(line[term] > 0 for line in log)
    assert all(line["sparsity"] > 0 for line in log)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_train_as_the_whole_does_but_for_rounding(runs, configs, kind, tmp_path):
    """Bounded: six steps apart from float32 sums in another order; Adam may step the other way where those are zero."""
    config = with_train(configs[kind], tmp_path / "whole", blocks=None)
    expected = train(config)
    found = load_clt(runs[kind]["one"].out)
    assert digest(config) != digest(runs[kind]["one"])  # so the order of sums is seen in the bytes
    for ours, theirs in zip(log_without_speed(runs[kind]["one"]), log_without_speed(config), strict=True):
        for name in (
            "loss",
            "fvu",
            "auxk",
            "pre_act",
            "sparsity",
            "grad_norm",
            "fvu_by_layer",
            "nmse_by_layer",
        ):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert (ours["l0"], ours["dead"]) == (theirs["l0"], theirs["dead"])
    theirs = expected.state_dict()
    for name, value in found.state_dict().items():
        assert float((value - theirs[name]).norm()) <= 1e-4 * float(theirs[name].norm()), name


@pytest.mark.parametrize("axis", ["data", "feature"])
def test_the_check_of_equal_bytes_sees_another_order_of_sums(runs, tmp_path, monkeypatch, axis):
    """A second process would have its own parts first if it did not go by blocks."""
    in_order = Processes.gathered

    def own_first(self, parts, along):
        found = in_order(self, parts, along)
        return found[2:] + found[:2] if along == axis else found

    monkeypatch.setattr(Processes, "gathered", own_first)
    config = with_train(runs["jumprelu"]["one"], tmp_path / "other")
    train(config)
    assert digest(config) != digest(runs["jumprelu"]["one"])


def test_a_run_that_diverges_is_the_same_line_on_all_processes_and_one_file(runs):
    config = runs["topk"]["diverged"]
    first, second = told(config)
    assert first == second
    assert "are finite, so training diverged; lower lr or set grad_clip; " in first
    (record,) = (config.out / "checkpoints").glob("failed-step-*.json")
    assert str(record) in first
    assert len(json.loads(record.read_text())["rows"]) == 48


def test_the_command_under_torchrun_writes_the_bytes_of_one_process(runs, tmp_path):
    config = with_train(runs["topk"]["one"], tmp_path / "command")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(to_mapping(config)), encoding="utf-8")
    said = torchrun(
        2, "-m", "mdlm_interp", "clt", "train", file, "--train.mesh", "2,1", "--train.verify-sequences", "1"
    )
    assert "after 6 steps on 288 rows" in said
    assert digest(config) == digest(runs["topk"]["one"])


# Processes that are lost


@contextmanager
def pair(config: CLTRunConfig, file: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes of a run of many steps, once they have saved a state; nobody but each other looks after them."""
    file.write_text(yaml.safe_dump(to_mapping(config)), encoding="utf-8")
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    started = []
    for rank in range(2):
        meeting = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        command = [sys.executable, "-m", "mdlm_interp", "clt", "train", str(file)]
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env={**ENVIRONMENT, **meeting}, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        deadline = time.monotonic() + 120
        while latest_training_state(config.out) is None and time.monotonic() < deadline:
            assert [process.poll() for process in started] == [None, None]
            time.sleep(0.05)
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("number", "timeout_s"),
    [(signal.SIGKILL, 600), pytest.param(signal.SIGSTOP, 15, marks=pytest.mark.slow)],
)
def test_a_lost_process_is_one_line_of_the_other_whose_states_are_left(configs, tmp_path, number, timeout_s):
    config = with_train(
        configs["topk"], tmp_path / "out", steps=100_000, checkpoint_every=1, timeout_s=timeout_s
    )
    with pair(config, tmp_path / "run.yaml") as (first, second):
        second.send_signal(number)
        _, said = first.communicate(timeout=60)
    assert first.returncode == 2
    (line,) = [line for line in said.splitlines() if "error:" in line]
    assert "another process of the run is gone or does not answer (" in line
    assert "training goes on from the last saved state" in line
    assert latest_training_state(config.out) is not None
    assert "Traceback" not in said


if __name__ == "__main__":
    torch.set_num_threads(1)
    program(Path(sys.argv[1]))
