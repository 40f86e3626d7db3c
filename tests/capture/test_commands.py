"""The commands run, describe and check a store in words that hold."""

import re
import shlex
import shutil
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

import capture
import capture.forward
from capture import CaptureConfig, open_store, run_capture
from capture.commands import info, run, verify
from capture.forecast import bytes_text
from mdlm_interp.__main__ import main
from mdlm_interp.config_files import load_config
from mdlm_interp.program import invocation

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")


def arguments(config: CaptureConfig) -> list[str]:
    files = [str(file) for file in config.files]
    options = ["--model", config.model, "--length", "24", "--max-sequences", "3", "--out", config.out]
    return [*files, *options]


def test_run_says_what_was_written_and_what_comes_next(config, capsys):
    assert run(arguments(config)) == 0
    store = open_store(config.out)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == (
        f"{config.out}: 72 rows (all positions of 3 sequences of up to 24 tokens), 4 hooks, "
        f"{bytes_text(store.bytes_on_disk)}, complete"
    )
    assert re.fullmatch(r"took \d+\.\d s", lines[1])
    assert re.fullmatch(rf"next: \S.* capture info {re.escape(config.out)}", lines[2])
    # No bar is drawn where stderr is no terminal; the forecast is worth a line in a log.
    assert re.fullmatch(
        rf"{re.escape(config.out)}: about 72 rows of 3 sequences, \d+\.\d (kB|MB), about \d+ s",
        printed.err.strip(),
    )


def test_a_dry_run_prints_the_forecast_and_writes_nothing(config, capsys):
    assert run([*arguments(config), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert not said.err
    assert list(Path(config.out).parent.iterdir()) == []
    run(arguments(config))
    told = re.compile(r"(.*), about \d+ s\n")
    foreseen, forecast = told.fullmatch(said.out), told.fullmatch(capsys.readouterr().err)
    assert foreseen is not None
    assert forecast is not None
    assert foreseen[1] == forecast[1]


def test_a_dry_run_says_why_a_capture_is_not_possible(config, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**7, 10**7, 0))
    assert main(["capture", "run", *arguments(config), "--dry-run"]) == 2
    assert "for 72 rows and its disk has 0 bytes free" in capsys.readouterr().err
    assert main(["capture", "run", *arguments(config), "--dry-run", "--any-disk"]) == 0
    assert list(Path(config.out).parent.iterdir()) == []


def test_a_dry_run_of_what_is_begun_tells_what_is_left(config, capsys, monkeypatch):
    words = interrupted(config, monkeypatch)
    words.remove("--max-sequences")
    words.remove("3")
    with pytest.raises(KeyboardInterrupt):
        run(words)
    there = len(open_store(config.out))
    capsys.readouterr()
    assert run([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf" (kB|MB), {there} rows are there, about \d+ s for the others\n$", said)
    monkeypatch.undo()
    run(words)
    capsys.readouterr()
    monkeypatch.delattr("capture.forward.Forward.__call__")
    assert run([*words, "--dry-run"]) == 0
    rows = len(open_store(config.out))
    assert capsys.readouterr().out == f"{config.out}: complete with {rows} rows; nothing is left to do\n"


def test_a_rank_that_is_not_the_last_says_that_it_is_done(config, capsys):
    assert run([*arguments(config), "--rank", "1", "--world-size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "INCOMPLETE" in lines[0]
    assert lines[2] == "rank 1 of 2 is done; the last one to end completes the store"
    assert run([*arguments(config), "--rank", "0", "--world-size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "INCOMPLETE" not in lines[0]
    assert lines[2].startswith("next: ")


def test_the_same_command_again_finds_the_store_complete(config, capsys):
    run(arguments(config))
    first = capsys.readouterr().out.splitlines()
    assert run(arguments(config)) == 0
    again = capsys.readouterr().out.splitlines()
    assert (again[0], again[2]) == (first[0], first[2])
    assert again[1] == "it was complete already; nothing was written"


def test_what_was_begun_or_is_something_else_is_not_complete_already(config, capsys, monkeypatch):
    words = interrupted(config, monkeypatch)
    words.remove("--max-sequences")
    words.remove("3")
    assert main(["capture", "run", *words]) == 130
    monkeypatch.undo()
    assert main(["capture", "run", *words]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("took ")
    shutil.rmtree(config.out)
    Path(config.out).mkdir()
    (Path(config.out) / "mine").touch()
    assert main(["capture", "run", *words]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert f"error: {config.out} " in said.err


def test_the_command_that_comes_next_can_be_pasted(config, capsys, monkeypatch):
    config = replace(config, out=str(Path(config.out).with_name("a b.zarr")))
    assert run(arguments(config)) == 0
    following = f"next: {invocation()} "
    command = capsys.readouterr().out.splitlines()[-1].removeprefix(following)
    assert shlex.split(command) == ["capture", "info", config.out]
    # Only a URL has an endpoint.
    store = open_store(config.out)
    monkeypatch.setattr("capture.run.run_capture", lambda *_, **__: store)
    assert run([*arguments(config), "--endpoint", "http://localhost:1/a b"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix(following)
    assert shlex.split(command) == ["capture", "info", config.out, "--endpoint", "http://localhost:1/a b"]


def test_info_describes_the_store(config, capsys):
    run([*arguments(config), "--dtype", "float16"])
    capsys.readouterr()
    assert info([config.out]) == 0
    out = capsys.readouterr().out
    store = open_store(config.out)
    count = store.statistics(store.hooks[0]).count
    bin_of = int(store.times()[0] * 10)
    assert "72 rows (all positions of 3 sequences of up to 24 tokens), 4 hooks in float16 (lossy)" in out
    unmasked, masked = (int(part[bin_of]) for part in count)
    assert re.search(rf"t 0\.{bin_of} to \S+ +{unmasked} unmasked +{masked} masked  \.*#*\n", out)
    rms = store.read(slice(None))["blocks.1.hook_mlp_out"].double().square().mean().sqrt()
    shown = re.findall(r"blocks\.1\.hook_mlp_out  \[32\]  rms (\S+)", out)
    assert [float(text) for text in shown] == pytest.approx([float(rms)], rel=1e-3)
    assert f"weights sha256 {store.provenance['weights_sha256']}" in out
    assert f"text {config.files[1]}, {config.files[1].stat().st_size:,} bytes, sha256" in out
    assert f"packing rules {store.provenance['packing']}" in out
    assert f"native arithmetic gave {store.provenance['native_bits']} for fixed tokens" in out
    threads = store.provenance["threads"]
    assert (
        f"native arithmetic on cpu, batches of 16 x 24, {threads} thread{'s'[: threads != 1]} a pass, " in out
    )


def test_info_reads_everything_for_the_fingerprint_only_when_asked(config, capsys):
    run(arguments(config))
    capsys.readouterr()
    info([config.out])
    assert "fingerprint" not in capsys.readouterr().out
    info([config.out, "--fingerprint"])
    assert f"fingerprint {open_store(config.out).fingerprint()}\n" in capsys.readouterr().out


def test_verify_says_what_was_checked(config, capsys):
    run(arguments(config))
    capsys.readouterr()
    assert verify([config.out, "--batches", "2"]) == 0
    out = capsys.readouterr().out
    assert "every byte matches its checksum: " in out
    assert "1 batch (72 rows) recomputed: the same bits" in out


@pytest.mark.parametrize("batches", [2**31, 2**70])
def test_verify_of_more_batches_than_there_are_takes_all(config, batches, capsys):
    run(arguments(config))
    assert main(["capture", "verify", config.out, "--batches", str(batches)]) == 0
    assert "1 batch (72 rows) recomputed: the same bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "nowhere", "; --batches 0 checks the bytes only"),
        ("--tokenizer", "nowhere", "; --batches 0 checks the bytes only"),
        ("--batches", "-1", "batches must be a whole number from 0, got -1; 0 checks the bytes only"),
    ],
)
def test_verify_refuses_what_it_cannot_use_before_it_reads_a_byte(
    config, option, value, message, tmp_path, capsys, monkeypatch
):
    run(arguments(config))
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("capture.verify.verify_files", lambda *_, **__: pytest.fail("bytes were read"))
    assert main(["capture", "verify", config.out, f"{option}={value}"]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") == 1
    assert message in said.err


def test_verify_of_bytes_only_needs_no_model(config, capsys, monkeypatch):
    run(arguments(config))
    capsys.readouterr()
    assert main(["capture", "verify", config.out, "--batches", "0", "--model", "nowhere"]) == 0
    assert "recomputed" not in capsys.readouterr().out


def test_verify_of_a_damaged_store_is_one_line(config, capsys):
    run(arguments(config))
    file = Path(config.out) / "rows" / "x0" / "c.0"
    content = bytearray(file.read_bytes())
    content[5] ^= 4
    file.write_bytes(content)
    capsys.readouterr()
    assert main(["capture", "verify", config.out]) == 2
    assert capsys.readouterr().err == (
        f"mdlm-interp capture verify: error: {config.out}/rows/x0/c.0 is damaged (the checksum of its only chunk "
        f"does not match); restore it from a copy or capture again\n"
    )


def interrupted(config: CaptureConfig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a capture whose second batch is interrupted, after a shard was committed."""

    def interrupt(self, batch, **options):
        if batch.start:
            # The commit is made by other threads, and what still waits for them would be dropped.
            while not len(open_store(config.out)):
                time.sleep(0.01)
            raise KeyboardInterrupt
        return forward(self, batch, **options)

    forward = capture.forward.Forward.__call__
    monkeypatch.setattr(capture.forward.Forward, "__call__", interrupt)
    return [*arguments(config), "--max-sequences=40", "--batch-size", "12", "--shard-rows", "256"]


def test_an_interrupted_run_says_how_much_is_kept_and_how_to_go_on(config, capsys, monkeypatch):
    words = interrupted(config, monkeypatch)
    words.remove("--max-sequences")
    words.remove("3")
    assert main(["capture", "run", *words]) == 130
    forecast, kept, last = capsys.readouterr().err.splitlines()
    assert forecast.startswith(f"{config.out}: about ")
    assert kept.startswith(
        f"{config.out}: 256 rows (all positions of 10 sequences of up to 24 tokens), 4 hooks"
    )
    assert kept.endswith(" rows were planned; the same command goes on")
    assert "INCOMPLETE" in kept
    assert last == "mdlm-interp capture run: interrupted"
    monkeypatch.undo()
    assert main(["capture", "info", config.out]) == 0
    assert "INCOMPLETE" in capsys.readouterr().out
    assert main(["capture", "run", *words]) == 0
    assert "complete" in capsys.readouterr().out


def test_another_capture_into_the_same_place_is_one_line(config, capsys):
    assert main(["capture", "run", *arguments(config)]) == 0
    capsys.readouterr()
    assert main(["capture", "run", *arguments(config), "--seed", "9"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"mdlm-interp capture run: error: {config.out} was begun with seed 0, got 9; choose another --out"
    )


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


def test_activations_that_are_not_finite_are_told(config, capsys, monkeypatch):
    store = run_capture(config)
    whole = store.manifest
    monkeypatch.setattr("capture.run.run_capture", lambda *_, **__: store)
    for number, told in ((3, "3 activations are"), (1, "1 activation is")):
        manifest = replace(whole, shards=(replace(whole.shards[0], not_finite=number),))
        monkeypatch.setattr(type(store), "manifest", manifest)
        assert run(arguments(config)) == 0
        assert f"warning: {told} infinite or not a number" in capsys.readouterr().err


def test_public_names_resolve_and_others_do_not():
    assert all(hasattr(capture, name) for name in capture.__all__)
    with pytest.raises(AttributeError, match="module 'capture' has no attribute 'open_stor'"):
        capture.open_stor  # type: ignore[attr-defined]  # noqa: B018


def test_verify_of_an_export_checks_its_bytes(config, tmp_path, capsys):
    run(arguments(config))
    out = tmp_path / "rows.safetensors"
    assert main(["capture", "export", config.out, "--to", "safetensors", "--out", str(out)]) == 0
    capsys.readouterr()
    assert verify([str(out)]) == 0
    assert "every byte matches its checksum: " in capsys.readouterr().out
    file = next(out.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert main(["capture", "verify", str(out)]) == 2


def test_verify_does_not_say_that_nothing_gave_the_same_bits(config, capsys, monkeypatch):
    words = [*arguments(config), "--batch-size", "64", "--shard-rows", "256"]
    words[words.index("--max-sequences") + 1] = "40"
    words += ["--rank", "0", "--world-size", "4"]
    assert main(["capture", "run", *words]) == 0
    assert not open_store(config.out).complete
    capsys.readouterr()
    assert main(["capture", "verify", config.out]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == "no whole batch is committed yet, so none was recomputed"
    )
