"""Whatever stops a capture, the same call goes on to the same files, byte for byte."""

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from capture import CaptureConfig, open_store, run_capture
from capture.native import on_threads
from capture.places import Directory
from capture.writer import StoreWriter
from mdlm_interp import HookedMDLM
from mdlm_interp.errors import OutputExistsError, StoreError, WriteError
from tests.capture.interrupts import interrupted

LAST_SHARD = 21
"""Shards of `long`, the last one shorter."""

VARIATIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "masked": {"positions": "masked"},
    "documents": {"pack": "documents", "length": 30},
    "half precision": {"dtype": "bfloat16"},
    "several times": {"times": "fixed", "time": (0.1, 0.8), "positions": "random", "per_sequence": 9},
}


def contents(store: str | Path) -> dict[str, bytes]:
    """Every file of a store by its path."""
    root = Path(store)
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@pytest.fixture
def long(config: CaptureConfig, small_shards: None) -> CaptureConfig:
    """All the text, in batches of 4 and shards of 64 rows."""
    return replace(config, max_sequences=None, batch_size=4)


def stop_at_call(monkeypatch, owner, name, call, error):
    """Raise instead of the numbered call of a method."""
    original, calls = getattr(owner, name), 0

    def failing(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return lambda: monkeypatch.setattr(owner, name, original)


@pytest.mark.parametrize("name", VARIATIONS)
def test_an_interrupted_capture_goes_on_to_the_same_bytes(long, name, monkeypatch):
    changed = replace(long, **VARIATIONS[name])
    whole = run_capture(replace(changed, out=changed.out + ".whole"))
    stops = 0
    while not (Path(changed.out).exists() and open_store(changed.out).complete) and stops < 50:
        stops += 1
        # Documents run one by one, so as many more passes are let through.
        after = 17 if changed.pack == "documents" else 5
        undo = stop_at_call(monkeypatch, HookedMDLM, "forward", after, KeyboardInterrupt())
        try:
            run_capture(changed)
        except KeyboardInterrupt:
            undo()
    assert 2 < stops < 50
    assert contents(changed.out) == contents(whole.path)
    assert open_store(changed.out).fingerprint() == whole.fingerprint()


def test_what_is_committed_reads_the_same_before_the_end(long, monkeypatch):
    whole = run_capture(replace(long, out=long.out + ".whole"))
    stop_at_call(monkeypatch, HookedMDLM, "forward", 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_capture(long)
    store = open_store(long.out)
    assert not store.complete
    assert 0 < len(store) < len(whole)
    rows = slice(0, len(store))
    for name, values in store.read(slice(None)).items():
        assert torch.equal(values, whole.read(rows)[name])
    sequences = slice(0, store.n_sequences)
    assert torch.equal(store.tokens()[1], whole.tokens()[1][sequences])
    assert torch.equal(store.times(), whole.times()[sequences])
    with pytest.raises(StoreError, match="the store is incomplete"):
        store.read([len(store)])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", [1, 4, LAST_SHARD])
def test_a_disk_that_fails_costs_only_what_was_not_committed(long, monkeypatch, number, call):
    whole = run_capture(replace(long, out=long.out + ".whole"))
    original, calls = Directory.publish, 0

    def failing(self, drafts):
        nonlocal calls
        calls += 1
        if calls == call:
            # Some files are there already when the disk gives up.
            original(self, drafts[: len(drafts) // 2])
            raise WriteError(f"{self.name} cannot be written: {os.strerror(number)}")
        original(self, drafts)

    monkeypatch.setattr(Directory, "publish", failing)
    assert len(whole.manifest.shards) == LAST_SHARD
    with pytest.raises(WriteError, match="cannot be written"):
        run_capture(long)
    assert len(open_store(long.out).manifest.shards) == call - 1
    run_capture(long)
    assert contents(long.out) == contents(whole.path)


@pytest.mark.parametrize(
    "step", ["set_rows", "_write_sequences", "_write_statistics", "file_hashes", "clean"]
)
def test_a_kill_while_completing_is_made_good(long, monkeypatch, step):
    import capture.finish as module

    whole = run_capture(replace(long, out=long.out + ".whole"))
    original = getattr(module, step)

    def dying(*args, **kwargs):
        # The last step is not begun: after it there is nothing left to be made good.
        if step in ("set_rows", "clean"):
            raise KeyboardInterrupt
        original(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, dying)
    with pytest.raises(KeyboardInterrupt):
        run_capture(long)
    monkeypatch.setattr(module, step, original)
    assert contents(long.out) != contents(whole.path)
    run_capture(long)
    assert contents(long.out) == contents(whole.path)


def test_files_that_a_kill_left_half_written_do_not_stay(long, monkeypatch):
    whole = run_capture(replace(long, out=long.out + ".whole"))
    stop_at_call(monkeypatch, HookedMDLM, "forward", 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_capture(long)
    for name in ("rows/xt/c.3.partial", "acts/.partial-zarr.json", ".partial-manifest.json"):
        (Path(long.out) / name).write_bytes(b"torn")
    run_capture(long)
    assert contents(long.out) == contents(whole.path)


def test_a_complete_store_is_left_as_it_is(config):
    first = run_capture(config)
    before = contents(first.path)
    again = run_capture(config)
    assert again.complete
    assert contents(again.path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "was begun with seed 5, got 6; choose another --out"),
        ({"batch_size": 3}, "was begun with batch_size 16, got 3"),
        ({"hooks": ("hook_embed",)}, "was begun with hooks"),
        ({"max_sequences": 20}, "was begun with max_sequences 21, got 20"),
    ],
)
def test_another_request_for_the_same_place_is_refused(config, changes, message):
    before = contents(run_capture(config).path)
    with pytest.raises(OutputExistsError, match=message):
        run_capture(replace(config, **changes))
    assert contents(config.out) == before


def test_changed_text_is_refused(config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(config.files[0].read_bytes())
    config = replace(config, files=(text,), max_sequences=2)
    run_capture(config)
    text.write_text(text.read_text() + " more")
    with pytest.raises(OutputExistsError, match="was begun with sources"):
        run_capture(config)


def test_native_rows_are_not_continued_with_another_number_of_threads(long, monkeypatch):
    stop_at_call(monkeypatch, HookedMDLM, "forward", 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_capture(long)
    threads = max(1, torch.get_num_threads() // 2)  # two passes share them
    with (
        on_threads(2 * threads + 2),
        pytest.raises(
            OutputExistsError,
            match=rf"was begun with threads {threads}, got {threads + 1}; go on with .*"
            rf"; OMP_NUM_THREADS={threads} and --forwards 1 give it anywhere$",
        ),
    ):
        run_capture(long)
    with on_threads(threads):  # as told
        assert run_capture(replace(long, forwards=1)).complete
    whole = run_capture(replace(long, out=long.out + ".whole"))
    assert contents(long.out) == contents(whole.path)


def test_native_rows_are_continued_with_more_forwards_of_as_many_threads(long, monkeypatch):
    with on_threads(2):
        whole = run_capture(replace(long, out=long.out + ".whole"))
        stop_at_call(monkeypatch, HookedMDLM, "forward", 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run_capture(replace(long, forwards=2))
    with on_threads(3):
        assert run_capture(replace(long, forwards=3)).complete
    assert contents(long.out) == contents(whole.path)


def test_a_second_writer_is_refused_and_changes_nothing(long, monkeypatch):
    whole = run_capture(replace(long, out=long.out + ".whole"))
    appended, tried = StoreWriter.append, False

    def meddling(self, rows):
        nonlocal tried
        if not tried:
            tried = True
            before = contents(long.out)
            with pytest.raises(
                StoreError, match="is being written by another process; wait for it, or stop it first"
            ):
                run_capture(long)
            assert contents(long.out) == before
        appended(self, rows)

    monkeypatch.setattr(StoreWriter, "append", meddling)
    run_capture(long)
    assert tried
    assert contents(long.out) == contents(whole.path)


def test_ctrl_c_while_the_last_shard_is_committed_leaves_no_thread_behind_the_lock(long, monkeypatch):
    whole = run_capture(replace(long, out=long.out + ".whole"))
    at_work, gate = threading.Event(), threading.Event()
    publish, close, before = Directory.publish, StoreWriter.close, set(threading.enumerate())

    def waiting(self, drafts):
        if any(draft.path.endswith(f"/c.{LAST_SHARD - 1}") for draft in drafts):
            at_work.set()
            gate.wait(20)
        publish(self, drafts)

    def closing(self):
        with interrupted(at_work=at_work, then=gate.set):
            close(self)

    with monkeypatch.context() as patched:
        patched.setattr(Directory, "publish", waiting)
        patched.setattr(StoreWriter, "close", closing)
        with pytest.raises(KeyboardInterrupt):
            run_capture(long)
    begun = set(threading.enumerate()) - before
    assert [thread.name for thread in begun if thread.name.startswith("capture-")] == []
    store = open_store(long.out)
    assert (len(store.manifest.shards), store.complete) == (LAST_SHARD, False)
    run_capture(long)
    assert contents(long.out) == contents(whole.path)
