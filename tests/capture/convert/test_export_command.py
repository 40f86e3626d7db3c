"""`mdlm-interp capture export` writes what is asked for, says so, and how to go on."""

import re
import shlex
from pathlib import Path

import pytest

from capture import open_store
from capture.export_command import ExportConfig, export
from mdlm_interp.__main__ import main
from mdlm_interp.atomic_files import PREFIX
from mdlm_interp.errors import ConfigError
from mdlm_interp.program import invocation
from tests.capture.convert.checks import opened
from tests.capture.stores import HEADS, Plan


def test_the_command_says_what_was_made_how_fast_and_what_comes_next(store, tmp_path, capsys, to):
    out = tmp_path / "out"
    assert export([str(store.path), "--to", to, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = f"{open_store(out).bytes_on_disk / 1e3:.1f} kB"
    assert lines[0] == f"{out}: {len(store)} rows of 60 sequences, 3 hooks, float32, {size}"
    assert re.fullmatch(r"took \d+\.\d s \(\d+\.\d \wB/s\)", lines[1])
    assert re.fullmatch(rf"next: \S.* capture info {re.escape(str(out))}", lines[2])


def test_the_command_that_comes_next_can_be_pasted(store, tmp_path, capsys, to):
    out = tmp_path / "it's an out"
    export([str(store.path), "--to", to, "--out", str(out)])
    command = capsys.readouterr().out.splitlines()[-1].removeprefix(f"next: {invocation()} ")
    assert shlex.split(command) == ["capture", "info", str(out)]


def test_one_sequence_and_one_hook_are_singular(store, tmp_path, capsys):
    first = store.sequence_rows(0)
    words = ["--hooks", HEADS, "--rows", f"0:{first.stop}", "--to", "hdf5", "--out", str(tmp_path / "out")]
    assert export([str(store.path), *words]) == 0
    assert " rows of 1 sequence, 1 hook, float32, " in capsys.readouterr().out


def test_what_a_killed_export_of_another_format_left_is_no_hindrance(store, tmp_path, to):
    left = tmp_path / f"{PREFIX}out"
    if to == "hdf5":
        left.mkdir()
        (left / "rows.safetensors").touch()
    else:
        left.write_text("part of a file")
    assert export([str(store.path), "--to", to, "--out", str(tmp_path / "out")]) == 0
    assert len(open_store(tmp_path / "out")) == len(store)
    assert not left.exists()


def test_options_choose_hooks_rows_and_type(store, tmp_path, to):
    command = ["capture", "export", "--to", to, str(store.path), "--hooks", "blocks.0.*", "--rows", "100:600"]
    assert main([*command, "--max-rows", "300", "--dtype", "bfloat16", "--out", str(tmp_path / "out")]) == 0
    found = opened(tmp_path / "out")
    assert (found.hooks, found.dtype) == ((HEADS,), "bfloat16")
    first, last = found.source["rows"]
    assert 100 <= first < 140
    assert first + 260 < last <= 400


def test_crosslayer_coding_is_told_how_its_loader_is_called(another, tmp_path, capsys):
    shapes = {"blocks.0.mlp.hook_in": (4,), "blocks.0.hook_mlp_out": (4,)}
    out = tmp_path / "out"
    assert (
        export([str(another(Plan(shapes=shapes)).path), "--to", "crosslayer-coding", "--out", str(out)]) == 0
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next: crosslayer-coding's LocalActivationStore({str(out)!r}, dtype='float32')"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("0:10", slice(0, 10)),
        ("5:", slice(5, None)),
        (":7", slice(None, 7)),
        (":", slice(None)),
        (None, None),
    ],
)
def test_rows_are_written_as_a_slice(rows, expected):
    assert ExportConfig(store="a", to="hdf5", out=Path("b"), rows=rows).span() == expected


@pytest.mark.parametrize("rows", ["5", "a:b", "-3:5", "1:2:3", ""])
def test_rows_written_otherwise_are_refused(rows):
    with pytest.raises(ConfigError, match=rf"^rows must be START:STOP, such as 0:10000, got '{rows}'$"):
        ExportConfig(store="a", to="hdf5", out=Path("b"), rows=rows)


def test_mistakes_are_one_line_and_exit_code_2(store, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        ([str(store.path), "--to", "hdf", *out], "hdf5"),
        ([str(store.path), "--to", "hdf5", "--hooks", "nothing", *out], "no hook point matches 'nothing'"),
        ([str(tmp_path / "none"), "--to", "hdf5", *out], "none does not exist"),
        ([str(store.path), "--to", "hdf5"], "out"),
    ):
        assert main(["capture", "export", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("mdlm-interp capture export: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_capture_info_describes_an_export(store, tmp_path, capsys, to):
    from capture.describe import strata, summary

    export([str(store.path), "--to", to, "--out", str(tmp_path / "out")])
    found = open_store(tmp_path / "out")
    assert summary(found).startswith(
        f"{tmp_path / 'out'}: {len(store)} rows (random positions of 60 sequences"
    )
    assert strata(found) == strata(store)
