"""The forecast is what a capture takes, and who follows its remedy gets through."""

import errno
import json
import os
import re
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capture import CaptureConfig, Forecast, forecast_capture, open_store, run_capture
from capture.commands import run
from capture.forward import Forward
from capture.places import Directory, place_of
from capture.schema import Layout
from capture.writer import StoreWriter
from mdlm_interp.errors import StoreError

Usage = namedtuple("Usage", "total used free")


def size_of(root: Path) -> int:
    """Bytes of the files of a store, and of what is beside it until it has its name."""
    roots = [root, *root.parent.glob(f".partial-{root.name}*")]
    files = [path for top in roots for path in top.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


class SmallDisk:
    """A disk with so much room for one store, and the most that the store ever took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Path, room: int) -> None:
        self.room, self.peak = room, 0
        monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(room, size_of(store), room - size_of(store)))
        for name in ("publish", "replace", "sync", "remove"):
            monkeypatch.setattr(Directory, name, self._watched(getattr(Directory, name), store))

    def _watched(self, original, store):
        def watched(place, *args):
            # Before something is removed and after it was written, a store is largest.
            self._look(store)
            original(place, *args)
            self._look(store)

        return watched

    def _look(self, store: Path) -> None:
        self.peak = max(self.peak, size_of(store))
        if self.peak > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store))


@pytest.fixture
def long(config: CaptureConfig) -> CaptureConfig:
    """All the text: 1,320 rows."""
    return replace(config, max_sequences=None, hooks=("blocks.*.mlp.hook_in", "blocks.*.mlp.hook_pre"))


VARIATIONS: dict[str, dict[str, Any]] = {
    "one shard": {},
    "several shards": {"shard_rows": 256},
    "masked": {"positions": "masked", "shard_rows": 512},
    "at several times": {"times": "fixed", "time": (0.2, 0.7), "shard_rows": 512, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_who_lowers_max_rows_as_told_gets_through_on_that_disk(long, monkeypatch, name):
    """Exact: with the room that the store was refused for; the most that it takes is no more than the room."""
    config = replace(long, **VARIATIONS[name])
    whole = run_capture(replace(config, out=config.out + ".whole"))
    room = round(0.8 * size_of(whole.path))
    disk = SmallDisk(monkeypatch, Path(config.out), room)
    with pytest.raises(StoreError) as caught:
        run_capture(config)
    assert not Path(config.out).exists()
    told = re.search(r"free; lower --max-rows to (\d+), record fewer hooks", str(caught.value))
    assert told is not None, str(caught.value)
    wanted = int(told[1])
    store = run_capture(replace(config, max_rows=wanted))
    assert store.complete
    assert wanted - long.length < len(store) <= wanted
    assert 0.5 * room < disk.peak <= room


def test_a_disk_too_small_for_one_shard_of_columns_is_not_told_to_lower_max_rows(long, monkeypatch):
    """Exact: 16,384 rows of columns take 672 kB, whatever max_rows is."""
    SmallDisk(monkeypatch, Path(long.out), 600_000)
    with pytest.raises(StoreError, match=r"has 600\.0 kB free; free some space, record fewer hooks"):
        run_capture(long)
    SmallDisk(monkeypatch, Path(long.out), 600_000)
    with pytest.raises(StoreError, match=r"has 600\.0 kB free"):
        run_capture(replace(long, max_rows=24))


@pytest.mark.parametrize("name", VARIATIONS)
def test_the_forecast_is_the_size_of_the_store(long, name):
    """Bounded: to 5 % where the number of rows is known; masks are drawn, so there to 15 %."""
    config = replace(long, **VARIATIONS[name], max_rows=700)
    expected = forecast_capture(config)
    store = run_capture(config)
    share = 0.15 if config.positions == "masked" else 0.05
    assert abs(expected.size - size_of(store.path)) < share * expected.size, (
        expected.size,
        store.bytes_on_disk,
    )


def test_what_is_committed_is_not_asked_for_again(long, monkeypatch):
    """Exact: there is room for the rest, and not for all of it once more."""
    config = replace(long, shard_rows=256)
    whole = run_capture(replace(config, out=config.out + ".whole"))
    original = StoreWriter.append

    def stopping(self, rows):
        if rows.start >= 768:
            # Other threads commit, and what still waits for them would be dropped.
            while len(open_store(config.out)) < 768:
                time.sleep(0.01)
            raise KeyboardInterrupt
        original(self, rows)

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_capture(replace(config, batch_size=4))
    room = round(1.35 * size_of(whole.path))
    assert size_of(Path(config.out)) > 0.3 * room
    disk = SmallDisk(monkeypatch, Path(config.out), room)
    assert run_capture(replace(config, batch_size=4)).complete
    assert disk.peak <= room


def test_a_place_that_cannot_tell_its_room_is_not_refused(long, monkeypatch):
    from capture.forecast import refuse_full_disk

    place = place_of(long.out)
    monkeypatch.setattr(Directory, "free_bytes", lambda self: None)
    refuse_full_disk(place, forecast_capture(long))
    monkeypatch.setattr(Directory, "free_bytes", lambda self: 0)
    with pytest.raises(StoreError, match="has 0 bytes free"):
        refuse_full_disk(place, forecast_capture(long))


def test_a_complete_store_needs_no_room_though_more_rows_were_forecast(long, monkeypatch):
    """Exact: masked rows are a guess, and here it was too high."""
    monkeypatch.setattr("capture.forecast.expected_share", lambda *_: 0.9)
    config = replace(long, positions="masked")
    store = run_capture(config)
    assert forecast_capture(config).rows > len(store)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**7, 10**7, 0))
    assert run_capture(config).complete


def test_a_forecast_writes_nothing_and_tells_the_time_when_asked(long, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**7, 10**7, 0))  # it has no say here
    monkeypatch.setattr("capture.forecast.rows_per_second", lambda *_: 330.0)
    plain, timed = forecast_capture(long), forecast_capture(long, timed=True)
    assert isinstance(plain, Forecast)
    assert plain.seconds is None
    assert timed.rows == plain.rows > 1000
    assert timed.seconds == timed.rows / 330
    assert str(timed) == f"{plain}, about {timed.seconds:.0f} s"
    two = replace(long, rank=1, world_size=2)
    assert forecast_capture(two, timed=True).seconds == timed.seconds / 2
    assert not Path(long.out).exists()
    assert list(Path(long.out).parent.iterdir()) == []


def of_shards(rows: int, shard_rows: int) -> Forecast:
    """Of so many rows, in shards of so many."""
    layout = Layout(shapes={"hook_embed": (8,)}, length=1024, shard_rows=shard_rows)
    return Forecast(rows=rows, sequences=7, layout=layout, size=0)


@pytest.mark.parametrize(("rows", "shard_rows"), [(2_560_001, 256), (9_000_000_000, 16384), (10**8, 768)])
def test_who_takes_as_many_rows_a_shard_as_told_is_told_no_more(rows, shard_rows):
    told = re.search(
        r"; ([\d,]+) shards of --shard-rows (\d+) .* --shard-rows (\d+) has ([\d,]+)$",
        str(of_shards(rows, shard_rows)),
    )
    assert told is not None
    before, given, wanted, after = (int(number.replace(",", "")) for number in told.groups())
    assert given == shard_rows < wanted
    assert wanted % 256 == 0
    for shards, size in ((before, given), (after, wanted)):
        assert (shards - 1) * size < rows <= shards * size
    assert after <= 10_000 < before
    assert "shard" not in str(of_shards(rows, wanted))
    # The least that helps: a longer shard is also more to be lost by an interruption.
    assert "--shard-rows" in str(of_shards(rows, wanted - 256))


def test_a_forecast_of_few_shards_says_nothing_of_them():
    assert str(of_shards(2_560_000, 256)) == "about 2,560,000 rows of 7 sequences, 0 bytes"


def test_both_places_that_print_the_forecast_give_the_advice(long, monkeypatch, capsys):
    monkeypatch.setattr("capture.forecast.MANY_SHARDS", 2)
    words = [*map(str, long.files), "--model", long.model, "--length", "24", "--shard-rows", "256"]
    words += ["--out", long.out]
    advice = "shards of --shard-rows 256 make commits slow: a store made with --shard-rows 768 has 2\n"
    assert run([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith(advice)
    assert run(words) == 0
    assert capsys.readouterr().err.endswith(advice)


def test_the_speed_of_the_forecast_is_that_of_the_second_pass(long, monkeypatch):
    clock, takes = [5.0], iter([10.0, 0.5])

    def passing(self, batch, *, check):
        clock[0] += next(takes)

    monkeypatch.setattr("capture.forecast.perf_counter", lambda: clock[0])
    monkeypatch.setattr(Forward, "__call__", passing)
    expected = forecast_capture(long, timed=True)
    assert expected.seconds == expected.rows / (16 * 24 / 0.5)


@pytest.mark.parametrize(
    "changes", [{}, {"wrap": False}, {"positions": "random", "per_sequence": 11}], ids=str
)
def test_documents_are_forecast_at_their_own_lengths(config, tmp_path, changes):
    """Exact: all of so few documents are looked at, empty ones and longer ones than a sequence among them."""
    texts = ["word " * (3 + 5 * number % 40) for number in range(60)]
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + '\n{"text": ""}\n' for text in texts))
    config = replace(config, files=(file,), pack="documents", max_sequences=None, **changes)
    expected, store = forecast_capture(config), run_capture(config)
    assert (expected.sequences, expected.rows) == (60, len(store))


@pytest.mark.parametrize("pack", ["blocks", "documents"])
def test_documents_without_text_are_no_sample_of_the_others(config, tmp_path, pack):
    """Exact for documents; within a tenth for blocks, of which the last ones of a group are left out."""
    file = tmp_path / "documents.jsonl"
    text = json.dumps({"text": "the old fox sees a red river " * 4})
    file.write_text('{"text": ""}\n' * 300 + f"{text}\n" * 250)
    config = replace(config, files=(file,), pack=pack, max_sequences=None)
    expected, store = forecast_capture(config), run_capture(config)
    assert expected.sequences == pytest.approx(store.n_sequences, rel=0 if pack == "documents" else 0.1)


def test_a_lost_rank_needs_room_for_its_own_rows_only(long, monkeypatch):
    """Exact: what the ranks after it have committed is there, though nobody can read it before its rows are."""
    ranks = [replace(long, shard_rows=256, rank=rank, world_size=3) for rank in range(3)]
    run_capture(ranks[2])
    run_capture(ranks[1])
    assert len(open_store(long.out)) == 0
    whole = forecast_capture(ranks[0])
    held = sum(shard.rows[1] - shard.rows[0] for shard in open_store(long.out).manifest.shards)
    assert 0.5 * whole.rows < held < 0.8 * whole.rows
    room = round(0.7 * whole.size)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 10**9 - room, room))
    assert run_capture(ranks[0]).complete


@pytest.mark.parametrize("max_rows", [24, 100, 200, 255])
def test_a_budget_of_rows_is_forecast_in_whole_sequences(long, max_rows):
    """Exact: a sequence has 24 rows, and the one that exceeds the budget is not recorded."""
    config, sequences = replace(long, max_rows=max_rows), max_rows // 24
    expected, store = forecast_capture(config), run_capture(config)
    assert (
        (expected.rows, expected.sequences) == (sequences * 24, sequences) == (len(store), store.n_sequences)
    )
