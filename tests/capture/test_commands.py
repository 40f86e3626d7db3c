"""The commands run a capture and describe a store in words that hold."""

import re
from pathlib import Path

import pytest

from capture import CaptureConfig, open_store
from capture.commands import info, run
from mdlm_interp.__main__ import main
from mdlm_interp.config_files import load_config
from mdlm_interp.errors import ConfigError

ROOT = Path(__file__).parents[2]


def arguments(config: CaptureConfig) -> list[str]:
    files = [str(file) for file in config.files]
    return [
        *files,
        "--model",
        config.model,
        "--length",
        "24",
        "--max-sequences",
        "3",
        "--out",
        str(config.out),
    ]


def test_run_says_what_was_written_and_what_comes_next(config, capsys):
    assert run(arguments(config)) == 0
    store = open_store(config.out)
    lines = capsys.readouterr().out.splitlines()
    size = f"{store.bytes_on_disk / 1e6:.1f} MB"
    assert lines[0] == f"{config.out}: 72 rows (3 sequences of 24 tokens), 4 hooks, {size}, complete"
    assert "rows/s" in lines[1]
    assert lines[2] == f"fingerprint {store.fingerprint()[:16]}"
    assert re.fullmatch(rf"next: \S.* capture info {re.escape(str(config.out))}", lines[3])


def test_info_describes_the_store(config, capsys):
    run(arguments(config))
    capsys.readouterr()
    assert info([str(config.out)]) == 0
    out = capsys.readouterr().out
    store = open_store(config.out)
    times = store.times()
    masked = store.coords(slice(None))["is_masked"].double().mean()
    assert "72 rows (3 sequences of 24 tokens), 4 hooks" in out
    assert f"time {times.min():.4f} to {times.max():.4f}, {masked:.1%} of tokens masked" in out
    assert "  blocks.1.hook_mlp_out  [32]\n" in out
    assert f"weights sha256 {store.provenance['weights_sha256']}" in out
    assert f"text {config.files[1]}, {config.files[1].stat().st_size:,} bytes, sha256" in out
    assert "native arithmetic, batches of 16 x 24" in out


def test_info_of_an_interrupted_store_says_so(config, capsys, monkeypatch):
    monkeypatch.setattr("capture.writer.StoreWriter.finish", lambda _: None)
    run(arguments(config))
    capsys.readouterr()
    assert info([str(config.out)]) == 0
    out = capsys.readouterr().out
    assert "0 rows (0 sequences of 24 tokens)" in out
    assert "incomplete, planned with 72 rows" in out


def test_an_interrupted_run_says_how_much_is_kept(config, capsys, monkeypatch):
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("capture.writer.StoreWriter.finish", interrupt)
    assert main(["capture", "run", *arguments(config)]) == 130
    kept, last = capsys.readouterr().err.splitlines()
    assert kept.startswith(f"{config.out}: 0 rows (0 sequences of 24 tokens), 4 hooks")
    assert kept.endswith("incomplete, planned with 72 rows")
    assert last == "mdlm-interp capture run: interrupted"


def test_the_command_line_reaches_both_commands(config, capsys):
    assert main(["capture", "run", *arguments(config)]) == 0
    assert main(["capture", "info", str(config.out)]) == 0
    assert main(["capture", "run", *arguments(config)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"mdlm-interp capture run: error: {config.out} exists and is not empty; "
        f"choose another --out, or remove it first\n"
    )


def test_no_bar_is_drawn_where_stderr_is_no_terminal(config, capsys):
    run(arguments(config))
    assert capsys.readouterr().err == ""


def test_help_has_a_sentence_for_every_option(capsys):
    with pytest.raises(SystemExit):
        run(["--help"])
    out = capsys.readouterr().out
    assert "usage: mdlm-interp capture run [CONFIG.yaml]" in out
    assert "Sequences per forward pass" in out


def test_the_demo_config_names_files_that_are_there():
    path = ROOT / "configs" / "capture_demo.yaml"
    config = load_config(CaptureConfig, path)
    assert all((ROOT / file).is_file() for file in config.files)
    assert path.read_text().startswith("# mdlm-interp capture run configs/capture_demo.yaml\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ()}, "files must name at least one text file"),
        ({"hooks": ()}, "hooks must name at least one hook point"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"max_sequences": 0}, "max_sequences must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"seed": -1}, "seed must be in [0, 2**64), got -1"),
        ({"times": "fixed", "time": 1.5}, "time must be in [0, 1], 0 being clean text, got 1.5"),
        ({"time": 0.5}, "time 0.5 has no effect with times 'low_discrepancy'; set times to 'fixed'"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        CaptureConfig(**{"files": (Path("a.txt"),), "out": Path("b.zarr"), **changes})
    assert str(caught.value) == message


def test_public_names_resolve_and_others_do_not():
    import capture

    assert all(hasattr(capture, name) for name in capture.__all__)
    with pytest.raises(AttributeError, match="module 'capture' has no attribute 'open_stor'"):
        capture.open_stor  # noqa: B018
