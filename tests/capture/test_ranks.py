"""Several processes write one store together: the one that a single process would have written."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from capture import ActivationStore, CaptureConfig, open_store, run_capture
from capture.drafts import PARTIAL
from capture.manifest import from_bytes, rank_manifest
from capture.places import Directory
from capture.verify import verify_store
from mdlm_interp import HookedMDLM
from mdlm_interp.errors import ConfigError, OutputExistsError, StoreError

HOOKS = ("blocks.1.mlp.hook_in", "blocks.1.attn.hook_z")
VARIATIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "masked": {"positions": "masked"},
    "documents": {"pack": "documents", "positions": "random", "per_sequence": 11},
    "exact": {"arithmetic": "exact", "max_sequences": 12, "hooks": ("blocks.0.mlp.hook_in",)},
}


@pytest.fixture
def wanted(config: CaptureConfig) -> CaptureConfig:
    """All the text: several shards of 256 rows, in batches of 96 that lie across their edges."""
    return replace(config, hooks=HOOKS, max_sequences=None, batch_size=4, shard_rows=256)


@pytest.fixture(scope="module")
def alone(
    model_directory: Path, texts: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """What one process writes."""
    given: dict[str, Any] = {
        "model": str(model_directory),
        "files": texts,
        "length": 24,
        "seed": 5,
        "hooks": HOOKS,
    }
    out = str(tmp_path_factory.mktemp("alone") / "run.zarr")
    return run_capture(CaptureConfig(**given, out=out, batch_size=4, shard_rows=256))


def rank_of(config: CaptureConfig, rank: int, world_size: int) -> CaptureConfig:
    return replace(config, rank=rank, world_size=world_size)


def contents(store: str | Path) -> dict[str, bytes]:
    """Every file of a store by its path."""
    place = Directory(Path(store))
    return {path: place.read(path) or b"" for path in place.files()}


def same(found: str | Path, expected: ActivationStore) -> None:
    left, right = contents(found), contents(expected.path)
    assert left.keys() == right.keys()
    assert [path for path in left if left[path] != right[path]] == []


def shards(out: str | Path, rank: int, world_size: int) -> list[int]:
    """Numbers of the shards that a rank has committed."""
    content = Directory(Path(out)).read(rank_manifest(rank, world_size))
    return [shard.rows[0] // 256 for shard in from_bytes(content, str(rank)).shards] if content else []


def written(out: str) -> dict[Path, int]:
    """When each file of rows was last written, by its path."""
    files = [path for path in Path(out).rglob("c.*") if path.suffix != PARTIAL]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1), (0, 1, 2)], ids=str)
def test_ranks_that_run_one_after_another_write_the_bytes_of_one_process(wanted, alone, order):
    assert len(alone.manifest.shards) > 4
    for rank in order:
        store = run_capture(rank_of(wanted, rank, len(order)))
        assert store.complete == (rank == order[-1])
    same(wanted.out, alone)


@pytest.mark.parametrize("name", VARIATIONS)
def test_what_is_recorded_does_not_matter(wanted, name):
    changed = replace(wanted, **VARIATIONS[name])
    whole = run_capture(replace(changed, out=changed.out + ".whole"))
    for rank in (1, 0):
        run_capture(rank_of(changed, rank, 2))
    same(changed.out, whole)


def test_more_ranks_than_shards_do_no_harm(wanted):
    few = replace(wanted, max_sequences=15)
    whole = run_capture(replace(few, out=few.out + ".whole"))
    assert len(whole.manifest.shards) == 2
    for rank in (3, 1, 0, 2):
        run_capture(rank_of(few, rank, 4))
    same(few.out, whole)


def test_ranks_that_run_together_write_the_bytes_of_one_process(wanted, alone):
    stores: dict[int, ActivationStore] = {}

    def work(rank: int) -> None:
        stores[rank] = run_capture(rank_of(wanted, rank, 3))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(stores) == {0, 1, 2}
    same(wanted.out, alone)


def test_rank_and_world_size_come_from_torchrun_unless_they_are_given(wanted, alone, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not run_capture(wanted).complete
    assert shards(wanted.out, 0, 2) == []
    assert shards(wanted.out, 1, 2) == list(range(1, len(alone.manifest.shards), 2))
    assert run_capture(rank_of(wanted, 0, 2)).complete
    same(wanted.out, alone)


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        ("two", "2", "RANK and WORLD_SIZE in the environment must be whole numbers"),
        (
            "2",
            "2",
            "RANK and WORLD_SIZE in the environment must be whole numbers with 0 <= RANK < WORLD_SIZE, got '2'",
        ),
        ("-1", "2", "got '-1' and '2'"),
        ("0", None, "got '0' and ''"),
        (None, "2", "got '' and '2'"),
    ],
)
def test_an_environment_that_cannot_be_right_is_refused(wanted, monkeypatch, rank, world_size, message):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        run_capture(wanted)
    assert message in str(caught.value)


def test_until_the_last_rank_ends_the_rows_before_the_first_gap_can_be_read(wanted, alone):
    first = run_capture(rank_of(wanted, 0, 2))
    assert not first.complete
    assert len(first) == 256
    # Shards 0, 2, 4 are there; nobody can trust rows after shard 0 to be in their order yet.
    assert [shard.rows[0] // 256 for shard in first.manifest.shards] == list(
        range(0, len(alone.manifest.shards), 2)
    )
    for name, values in first.read(slice(None)).items():
        assert torch.equal(values, alone.read(slice(0, 256))[name])
    with pytest.raises(StoreError, match="the store is incomplete"):
        first.read([256])
    assert verify_store(wanted.out, batches=1).batches == 1


@contextmanager
def stopped(call: int, error: BaseException) -> Iterator[None]:
    """Raise instead of the numbered forward pass."""
    forward, calls = HookedMDLM.forward, itertools.count(1)

    def failing(self: HookedMDLM, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise error
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HookedMDLM, "forward", failing)
        yield


def test_a_rank_that_was_lost_is_run_again_alone(wanted, alone):
    run_capture(rank_of(wanted, 0, 3))
    with stopped(8, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        run_capture(rank_of(wanted, 1, 3))
    lost = shards(wanted.out, 1, 3)
    assert 0 < len(lost) < len(range(1, len(alone.manifest.shards), 3))
    assert not run_capture(rank_of(wanted, 2, 3)).complete
    before = written(wanted.out)
    assert run_capture(rank_of(wanted, 1, 3)).complete
    same(wanted.out, alone)
    # Nothing that was committed was written again.
    assert before.items() <= written(wanted.out).items()


@pytest.mark.parametrize(
    "step", ["set_rows", "_write_sequences", "_write_statistics", "file_hashes", "clean"]
)
def test_whoever_runs_again_completes_what_the_last_rank_could_not(wanted, alone, monkeypatch, step):
    run_capture(rank_of(wanted, 1, 2))

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"capture.finish.{step}", fail)
        with pytest.raises(KeyboardInterrupt):
            run_capture(rank_of(wanted, 0, 2))
    assert run_capture(rank_of(wanted, 1, 2)).complete
    # What is left over if the very last step failed goes with the next run of anyone.
    run_capture(rank_of(wanted, 0, 2))
    same(wanted.out, alone)


@pytest.mark.parametrize(
    ("begun", "asked", "message"),
    [
        ((0, 2), (0, 3), "was begun by 2 processes and is not complete; go on with --world-size 2, got 3"),
        ((0, 2), (2, 3), "was begun by 2 processes and is not complete; go on with --world-size 2, got 3"),
        ((1, 3), (0, 1), "was begun by 3 processes and is not complete; go on with --world-size 3, got 1"),
        ((0, 1), (0, 2), "was begun by 1 process and is not complete; go on with --world-size 1, got 2"),
    ],
)
def test_another_number_of_ranks_is_refused_and_changes_nothing(wanted, begun, asked, message):
    with stopped(7, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        run_capture(rank_of(wanted, *begun))
    before = contents(wanted.out)
    with pytest.raises(StoreError) as caught:
        run_capture(rank_of(wanted, *asked))
    assert str(caught.value) == f"{wanted.out} {message}"
    assert contents(wanted.out) == before


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_complete_store_is_left_as_it_is_by_any_number_of_ranks(wanted, alone, world_size):
    for rank in (0, 1):
        run_capture(rank_of(wanted, rank, 2))
    with stopped(2, AssertionError("ran the model for a complete store")):
        assert run_capture(rank_of(wanted, 0, world_size)).complete
    same(wanted.out, alone)


def test_ranks_of_different_requests_do_not_mix(wanted):
    run_capture(rank_of(wanted, 0, 2))
    before = contents(wanted.out)
    with pytest.raises(OutputExistsError, match=r"was begun with seed 5, got 6; choose another --out"):
        run_capture(rank_of(replace(wanted, seed=6), 1, 2))
    assert contents(wanted.out) == before


def test_the_same_rank_twice_at_once_is_refused(wanted, alone):
    run_capture(rank_of(wanted, 0, 2))
    refused: list[str] = []
    forward, calls = HookedMDLM.forward, itertools.count(1)

    def twice(self: HookedMDLM, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 5:
            with pytest.raises(StoreError) as caught:
                run_capture(rank_of(wanted, 1, 2))
            refused.append(str(caught.value))
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HookedMDLM, "forward", twice)
        run_capture(rank_of(wanted, 1, 2))
    assert refused == [f"{wanted.out} is being written by another process; wait for it, or stop it first"]
    same(wanted.out, alone)


# Processes


def command(config: CaptureConfig, *more: str) -> list[str]:
    return [
        "-m", "mdlm_interp", "capture", "run", *map(str, config.files), "--model", config.model, "--hooks",
        ",".join(HOOKS), "--length", "24", "--seed", "5", "--batch-size", "4", "--shard-rows", "256", "--out",
        config.out, *more,
    ]  # fmt: skip


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@contextmanager
def started(commands: Sequence[Sequence[str]], **options: Any) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of this interpreter, all ended at the end."""
    with ExitStack() as stack:
        processes = []
        for words in commands:
            process = stack.enter_context(
                subprocess.Popen([sys.executable, *words], env=ENVIRONMENT, **options)
            )
            stack.callback(process.kill)
            processes.append(process)
        yield processes


@pytest.fixture
def one_process(wanted: CaptureConfig) -> ActivationStore:
    """What one process of the command writes, with its number of threads."""
    single = replace(wanted, out=wanted.out + ".single")
    subprocess.run([sys.executable, *command(single)], check=True, capture_output=True, env=ENVIRONMENT)
    return open_store(single.out)


@pytest.mark.slow
def test_a_job_array_writes_the_bytes_of_one_process_though_one_job_is_killed(wanted, one_process):
    def jobs(*numbers: int) -> list[list[str]]:
        return [command(wanted, "--rank", str(number), "--world-size", "3") for number in numbers]

    with started(jobs(0, 1, 2), stderr=subprocess.DEVNULL) as (first, second, third):
        while second.poll() is None and not shards(wanted.out, 1, 3):
            time.sleep(0.001)
        second.send_signal(signal.SIGKILL)
        assert (first.wait(), second.wait(), third.wait()) == (0, -signal.SIGKILL, 0)
    assert not open_store(wanted.out).complete
    with started(jobs(1)) as (again,):
        assert again.wait() == 0
    same(wanted.out, one_process)


@pytest.mark.slow
def test_torchrun_writes_the_bytes_of_one_process(wanted, one_process):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with started([[*torchrun, *command(wanted)]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as (
        both,
    ):
        said, _ = both.communicate()
    assert both.returncode == 0, said.decode()
    same(wanted.out, one_process)
    # Both ranks end with a line about the store, and the last of them finds it complete.
    assert said.decode().count(f"{wanted.out}: ") >= 2
    assert "complete\n" in said.decode()
