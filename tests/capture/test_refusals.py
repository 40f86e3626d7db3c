"""Requests that cannot be fulfilled are refused in one line before anything is written."""

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from capture import open_store, run_capture
from capture.run import dry_run
from mdlm_interp import load_tokenizer
from mdlm_interp.errors import ConfigError, DataError, HookError, OutputExistsError, StoreError, WriteError


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_an_existing_output_is_refused_and_untouched(config, kind):
    out = Path(config.out)
    kept = out
    if kind == "directory":
        out.mkdir()
        kept = out / "notes.txt"
    kept.write_text("mine")
    with pytest.raises(OutputExistsError, match="is no activation store; choose another --out, or remove it"):
        run_capture(config)
    assert kept.read_text() == "mine"
    assert sorted(out.parent.rglob("*")) == sorted({out, kept})


def test_an_empty_directory_is_no_obstacle(config):
    Path(config.out).mkdir()
    assert run_capture(config).complete


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"length": 33},
            ConfigError,
            "length 33 is more than the model's context of 32 tokens; lower --length",
        ),
        ({"hooks": ("blocks.*.hook_mlp_ot",)}, HookError, "no hook point matches 'blocks.*.hook_mlp_ot'"),
        (
            {"hooks": ("blocks.*",)},
            HookError,
            "blocks.0.adaln.hook_shift_attn (and 15 more) has no position axis, and a store keeps one row",
        ),
        ({"hooks": ("hook_cond",)}, HookError, "hook_cond has no position axis"),
        (
            {"hooks": ("blocks.1.attn.hook_pattern",)},
            HookError,
            "blocks.1.attn.hook_pattern has two position axes",
        ),
    ],
)
def test_a_request_that_does_not_fit_the_model_is_refused_before_writing(config, changes, error, message):
    with pytest.raises(error) as caught:
        run_capture(replace(config, **changes))
    assert message in str(caught.value)
    assert not Path(config.out).exists()


def test_text_shorter_than_one_block_is_refused_with_its_token_count(config, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the old fox")
    tokens = len(load_tokenizer(config.model).encode("the old fox")) + 1
    with pytest.raises(DataError) as caught:
        run_capture(replace(config, files=(short,)))
    assert str(caught.value) == (
        f"the text has {tokens} tokens and one sequence of length 24 needs 22; "
        f"lower --length or give more text"
    )
    assert not Path(config.out).exists()


def test_a_tokenizer_of_another_vocabulary_is_refused_with_both_sizes(config, tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    vocabulary = {"<|endoftext|>": 0, "a": 1}
    Backend(models.BPE(vocab=vocabulary, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"has 3 ids and the model .* has 301; name the tokenizer"):
        run_capture(replace(config, tokenizer=str(tmp_path)))


def test_a_store_that_the_disk_cannot_hold_is_refused_before_writing(config, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**7, 8_100_000, 1_900_000))
    with pytest.raises(StoreError) as caught:
        run_capture(replace(config, max_sequences=None))
    # Six chunks of 256 rows of four hooks of 32 floats; columns for 16,384 rows (41 bytes each) and for 1,024
    # sequences (16 bytes a token); about 80 kB of metadata, and of what waits for the end.
    assert "needs 2.0 MB for 1,368 rows and its disk has 1.9 MB free; lower --max-rows to " in str(
        caught.value
    )
    assert "record fewer hooks, choose another --out, or start anyway with --any-disk" in str(caught.value)
    assert not Path(config.out).exists()


def test_what_is_committed_already_needs_no_more_room(config, monkeypatch):
    run_capture(config)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**6, 10**6 - 10**5, 10**5))
    assert run_capture(config).complete


def test_a_directory_that_may_not_be_written_is_one_line(config, monkeypatch):
    def refusing(self, *args, **kwargs):
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(
        WriteError, match="cannot be written: Read-only file system; choose a directory that you may"
    ):
        run_capture(config)


def test_a_full_disk_does_not_stop_who_insists(config, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**6, 10**6 - 10**5, 10**5))
    assert run_capture(replace(config, any_disk=True)).complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ()}, "files must name at least one text file"),
        ({"hooks": ()}, "hooks must name at least one hook point"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"seed": -1}, "seed must be in [0, 2**64), got -1"),
        ({"shard_rows": 100}, "shard_rows must be a multiple of 256, got 100"),
        ({"times": "fixed"}, "times fixed needs time, such as --time 0.1,0.5,0.9"),
        ({"time": (0.5,)}, "time [0.5] has no effect with times 'low_discrepancy'; set times to 'fixed'"),
        ({"times": "fixed", "time": (0.5, 1.5)}, "time must be in [0, 1], 0 being clean text, got 1.5"),
        ({"times": "fixed", "time": (float("nan"),)}, "time must be in [0, 1], 0 being clean text, got nan"),
        ({"times": "fixed", "time": (0.5, 0.5)}, "time names a value twice: [0.5, 0.5]; name each once"),
        (
            {"times": "unmasked", "positions": "masked"},
            "times unmasked is clean text at t = 0, where no token is masked, so positions masked would record "
            "nothing; take other times, or positions all or unmasked",
        ),
        (
            {"times": "fixed", "time": (0.0,), "positions": "masked"},
            "times fixed is clean text at t = 0, where no token is masked, so positions masked would record "
            "nothing; take other times, or positions all or unmasked",
        ),
        ({"positions": "every"}, "positions every needs every, a whole number, such as --every 8"),
        (
            {"positions": "random"},
            "positions random needs per_sequence, a whole number, such as --per-sequence 8",
        ),
        ({"every": 2}, "every has no effect with positions 'all'"),
        ({"positions": "masked", "per_sequence": 2}, "per_sequence has no effect with positions 'masked'"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1, got rank 2 of 2"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(config, changes, message):
    with pytest.raises(ConfigError) as caught:
        replace(config, **changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rank": 0}, ConfigError, "rank and world_size must be given together"),
        ({"device": "tpu"}, ConfigError, "device must be cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "meta"}, ConfigError, "device must be cpu, cuda or cuda:N, got 'meta'"),
        (
            {"positions": "random", "per_sequence": 25},
            ConfigError,
            "per_sequence must be at most length 24, got 25",
        ),
        (
            {"max_rows": 5},
            DataError,
            "no sequence of length 24 with all positions fits the text and max_rows 5",
        ),
        ({"out": "ftp://host/run.zarr"}, ConfigError, "ftp://host/run.zarr is of an unknown kind"),
    ],
)
def test_what_does_not_fit_together_is_refused(config, changes, error, message):
    with pytest.raises(error) as caught:
        run_capture(replace(config, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("zarr.json", None, "zarr.json is missing; restore it from a copy"),
        (
            "zarr.json",
            (b"mdlm-interp", b"mdlm-interq"),
            "zarr.json is damaged (its SHA-256 is not the one in",
        ),
        (
            "zarr.json",
            (b'"attributes"', b'"attribwtes"'),
            "zarr.json is damaged (its SHA-256 is not the one in",
        ),
        ("manifest.json", None, "manifest.json is missing; restore it from a copy"),
        ("manifest.json", (b'"length"', b'"lenght"'), "manifest.json is damaged"),
    ],
)
def test_a_damaged_store_of_ours_is_not_said_to_be_foreign(config, name, change, message):
    """Who is told that it is no store, and to remove it, would lose every row that is still right."""
    run_capture(config)
    path = Path(config.out) / name
    content = path.read_bytes()
    if change is None:
        path.unlink()
    else:
        path.write_bytes(content.replace(*change, 1))
        assert path.read_bytes() != content
    for call in (run_capture, dry_run):
        with pytest.raises(StoreError) as caught:
            call(config)
        assert message in str(caught.value)
        assert "remove" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{}", '{"name": "a page", "icons": []}'])
def test_a_directory_of_another_program_is_refused_though_it_has_a_manifest(config, content):
    out = Path(config.out)
    out.mkdir()
    (out / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    if content is not None:
        (out / "manifest.json").write_text(content)
    with pytest.raises(
        OutputExistsError, match="exists and is no activation store; choose another --out, or"
    ):
        run_capture(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 10**19}, "batch_size must be at most 65,536, got 10000000000000000000; lower it"),
        ({"forwards": 257}, "forwards must be at most 256, got 257; lower it"),
        ({"world_size": 10**5}, "world_size must be at most 4,096, got 100000; lower it"),
    ],
)
def test_a_number_that_would_take_all_memory_is_refused(config, changes, message):
    with pytest.raises(ConfigError) as caught:
        replace(config, **changes)
    assert str(caught.value) == message


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("what", ["act missing", "act short", "column missing"])
def test_committed_rows_that_are_lost_are_noticed_before_going_on(begun, what, complete):
    """Otherwise the capture would end, say that it is complete, and only verify would tell."""
    if complete:
        run_capture(begun)
    hook = open_store(begun.out).hooks[0]
    path = Path(begun.out) / ("rows/x0/c.0" if what == "column missing" else f"acts/{hook}/c.0.0")
    content = path.read_bytes()
    path.unlink()
    if what == "act short":
        path.write_bytes(content[:-1])
    message = "it has .* bytes, expected" if what == "act short" else "is missing; restore it from a copy"
    for call in (dry_run, run_capture):
        with pytest.raises(StoreError, match=rf"{path} .*{message}"):
            call(begun)
    path.write_bytes(content)
    assert run_capture(begun).complete
