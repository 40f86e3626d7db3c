"""Processes that start together make one store, and what they lock is locked for all of them."""

import multiprocessing
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from capture import CaptureConfig, run_capture
from capture.places import Directory
from mdlm_interp.errors import MdlmError, StoreError
from tests.capture.test_ranks import HOOKS, contents, rank_of, same


@pytest.fixture
def wanted(config: CaptureConfig) -> CaptureConfig:
    """All the text, in several shards."""
    return replace(config, hooks=HOOKS, max_sequences=None, batch_size=4, shard_rows=256)


def test_who_makes_the_first_files_of_the_same_rank_waits_for_the_other(tmp_path):
    root, order = tmp_path / "run.zarr", []

    def second() -> None:
        with Directory(root).create("rank-0") as made:
            order.append("second")
            (made.root / "second").touch()

    other = threading.Thread(target=second)
    with Directory(root).create("rank-0") as made:
        other.start()
        time.sleep(0.3)
        (made.root / "first").touch()
        order.append("first")
    other.join(20)
    assert order == ["first", "second"]
    assert contents(root) == {"first": b""}
    assert list(tmp_path.iterdir()) == [root]


def test_what_a_killed_process_left_of_the_first_files_does_not_stay(tmp_path):
    root = tmp_path / "run.zarr"
    left = tmp_path / ".partial-run.zarr.rank-0"
    (left / "acts").mkdir(parents=True)
    (left / "acts" / "torn").touch()
    left.with_name(left.name + ".lock").touch()
    with Directory(root).create("rank-0") as made:
        (made.root / "whole").touch()
    assert contents(root) == {"whole": b""}
    assert list(tmp_path.iterdir()) == [root]


def test_who_waited_for_a_lock_that_was_removed_shuts_others_out(tmp_path):
    place, held, done = Directory(tmp_path), threading.Event(), threading.Event()

    def wait() -> None:
        with place.lock("finish", wait=True):
            held.set()
            done.wait(20)

    waiter = threading.Thread(target=wait)
    with place.lock("finish"):
        waiter.start()
        time.sleep(0.3)
        place.remove("finish.lock")
    assert held.wait(20)
    try:
        with pytest.raises(StoreError, match="is being written by another process"), place.lock("finish"):
            pass
    finally:
        done.set()
        waiter.join(20)


def start_together(
    config: CaptureConfig, rounds: int, threads: int, barrier: Any, outcomes: "multiprocessing.Queue[str]"
) -> None:
    """What one of several processes does: in each round, the same as the others at the same time."""
    torch.set_num_threads(threads)
    for number in range(rounds):
        barrier.wait(100)
        try:
            store = run_capture(replace(config, out=f"{config.out}.{number}"))
            outcome = "complete" if store.complete else "incomplete"
        except MdlmError as error:
            outcome = str(error)
        outcomes.put(f"{number} {outcome}")


def outcomes_of(configs: Sequence[CaptureConfig], rounds: int) -> list[list[str]]:
    """Of each round, how the captures ended that were started together, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    barrier, outcomes = context.Barrier(len(configs)), context.Queue()
    processes = [
        context.Process(
            target=start_together,
            args=(config, rounds, torch.get_num_threads(), barrier, outcomes),
            daemon=True,
        )
        for config in configs
    ]
    for process in processes:
        process.start()
    found: list[list[str]] = [[] for _ in range(rounds)]
    for _ in range(rounds * len(configs)):
        number, _, outcome = outcomes.get(timeout=120).partition(" ")
        found[int(number)].append(outcome)
    for process in processes:
        process.join(60)
    return found


@pytest.mark.slow
def test_of_processes_that_start_the_same_capture_together_one_makes_it(wanted, tmp_path):
    """At least one completes the store; who came while that one wrote is refused in one line."""
    alone = run_capture(replace(wanted, out=str(tmp_path / "alone" / "run.zarr")))
    for number, outcomes in enumerate(outcomes_of([wanted] * 4, rounds=3)):
        out = f"{wanted.out}.{number}"
        refusal = f"{out} is being written by another process; wait for it, or stop it first"
        assert "complete" in outcomes
        assert set(outcomes) <= {"complete", refusal}
        assert run_capture(replace(wanted, out=out)).complete
        same(out, alone)
    left = sorted(path.name for path in Path(wanted.out).parent.iterdir())
    assert left == ["alone", *(f"run.zarr.{number}" for number in range(3))]


@pytest.mark.slow
def test_ranks_that_start_together_as_processes_make_one_store(wanted, tmp_path):
    alone = run_capture(replace(wanted, out=str(tmp_path / "alone" / "run.zarr")))
    outcomes = outcomes_of([rank_of(wanted, rank, 4) for rank in range(4)], rounds=1)
    for number, found in enumerate(outcomes):
        assert "complete" in found
        assert set(found) <= {"complete", "incomplete"}
        same(f"{wanted.out}.{number}", alone)
