"""Verification finds any flipped bit, a store of another model, and rows that the model does not give."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from capture import manifest as manifests
from capture import open_store, run_capture
from capture.checked_files import verify_files
from capture.manifest import MANIFEST
from capture.recomputed import _beyond, verify_rows
from capture.shards import shard_digest
from capture.verify import verify_store
from mdlm_interp import HookedMDLM, load_tokenizer
from mdlm_interp.errors import ConfigError, StoreError


@pytest.fixture
def store(config, small_shards):
    """504 rows in eight shards, six batches of 4 sequences."""
    return run_capture(replace(config, batch_size=4))


def test_a_sound_store_is_verified_whole(store):
    found = verify_store(store.path, batches=100)
    assert found.batches == 6
    assert found.rows == 504
    assert found.bitwise
    assert found.largest == 0.0
    on_disk = sum(1 for path in Path(store.path).rglob("*") if path.is_file())
    assert found.files == on_disk - 1  # the manifest answers for itself


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "masked"},
        {"pack": "documents"},
        {"dtype": "float16"},
        {"dtype": "bfloat16", "times": "fixed", "time": (0.3, 0.9)},
        {"arithmetic": "exact", "max_sequences": 4},
        {"hooks": ("blocks.*.attn.hook_z", "hook_logits"), "positions": "every", "every": 5},
    ],
)
def test_every_kind_of_store_is_recomputed_to_the_same_bits(config, changes):
    made = run_capture(replace(config, batch_size=4, **changes))
    found = verify_store(made.path, batches=3)
    assert found.bitwise
    assert found.rows > 0


def test_a_flipped_bit_anywhere_is_found(store):
    draw = random.Random(3)
    files = sorted(path for path in Path(store.path).rglob("*") if path.is_file())
    # Every file once at a random bit, and the ends of each, where lengths and checksums are.
    for path in files:
        content = path.read_bytes()
        for bit in {draw.randrange(8 * len(content)), 0, 8 * len(content) - 1}:
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(StoreError):
                verify_files(open_store(store.path))
        path.write_bytes(content)
    others = [path for path in files if path.name != "manifest.json"]
    assert verify_files(open_store(store.path)) == (len(others), sum(path.stat().st_size for path in others))


@pytest.mark.parametrize("how", ["missing", "cut", "longer", "strange"])
def test_files_that_are_not_those_of_the_store_are_found(store, how):
    shard = Path(store.path) / "acts" / store.hooks[0] / "c.3.0"
    if how == "missing":
        shard.unlink()
    elif how == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    elif how == "longer":
        shard.write_bytes(shard.read_bytes() + b"x")
    else:
        shard.with_name("notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"c\.3\.0 is (missing|damaged)|notes\.txt is no file of this store"):
        verify_files(open_store(store.path))


def test_shards_that_were_swapped_are_found_though_each_is_whole(store):
    first, second = (Path(store.path) / "acts" / store.hooks[0] / f"c.{number}.0" for number in (0, 1))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(StoreError, match="are whole, but not the ones that the manifest lists"):
        verify_files(open_store(store.path))


def test_an_incomplete_store_is_verified_as_far_as_it_goes(config, small_shards, monkeypatch):
    original, calls = HookedMDLM.forward, 0

    def failing(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(HookedMDLM, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        run_capture(replace(config, batch_size=4))
    monkeypatch.setattr(HookedMDLM, "forward", original)
    found = verify_store(config.out, batches=10)
    assert found.bitwise
    assert 0 < found.batches < 6


@pytest.fixture
def incomplete(config, small_shards, monkeypatch):
    """All eight shards are committed, and the capture was stopped before it completed the store."""

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("capture.run.finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_capture(replace(config, batch_size=4))
    store = open_store(config.out)
    assert (store.complete, len(store), len(store.manifest.shards)) == (False, 504, 8)
    return store


def checked_of(root: Path) -> list[Path]:
    """What is committed of an incomplete store, but for the manifest, which has a SHA-256 of its own."""
    files = {path for path in root.rglob("*") if path.is_file()}
    return sorted(files - {root / MANIFEST, *root.glob("*.lock"), *root.glob("done.*")})


def test_every_file_of_an_incomplete_store_is_checked_and_counted(incomplete):
    checked = checked_of(incomplete.path)
    rows: list[int] = []
    found = verify_files(incomplete, progress=rows.append)
    assert found == (len(checked), sum(path.stat().st_size for path in checked))
    arrays = len(incomplete.hooks) + len(incomplete.row_columns)
    assert len(checked) == 8 * (arrays + 1) + arrays + 3
    assert rows == [64] * 7 + [56]


def test_a_flipped_bit_in_any_file_of_an_incomplete_store_is_found(incomplete):
    draw = random.Random(4)
    for path in checked_of(incomplete.path):
        content = path.read_bytes()
        for bit in {draw.randrange(8 * len(content)), 0, 8 * len(content) - 1}:
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(StoreError):
                verify_files(open_store(incomplete.path))
        path.unlink()
        with pytest.raises(StoreError, match="is missing"):
            verify_files(open_store(incomplete.path))
        path.write_bytes(content)
    verify_files(open_store(incomplete.path))


@pytest.mark.parametrize(
    ("node", "change", "message"),
    [
        ("", lambda found: found["attributes"]["config"].update(seed=7), "its SHA-256 is not the one in"),
        (
            "rows/pos",
            lambda found: found.update(fill_value=0),
            "has another fill_value than this version of zarr",
        ),
        (
            "rows/pos",
            lambda found: found["shape"].__setitem__(0, 63),
            "has another shape than this version of zarr",
        ),
        (
            "acts",
            lambda found: found["attributes"].update(x=1),
            "has another attributes than this version of zarr",
        ),
    ],
)
def test_other_metadata_of_an_incomplete_store_is_found(incomplete, node, change, message):
    path = incomplete.path / node / "zarr.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found, indent=2))
    with pytest.raises(StoreError, match=message):
        verify_files(open_store(incomplete.path))


def changed_consistently(store, hook, row, value):
    """Another value in a store whose checksums and manifest were all made to fit it."""
    import zarr

    array = zarr.open_array(store.path / "acts" / hook, mode="r+")
    array[row] = value
    shard = row // store.manifest.shard_rows
    root = Path(store.path)
    checksums = {}
    for name in store.hooks:
        data = (root / "acts" / name / f"c.{shard}.0").read_bytes()
        step = 16 * 32 * 4 + 4
        checksums[f"acts/{name}"] = [
            int.from_bytes(data[(number + 1) * step - 4 : (number + 1) * step], "little")
            for number in range(4)
        ]
    for path in (root / "rows").iterdir():
        if path.is_dir():
            checksums[f"rows/{path.name}"] = [
                int.from_bytes((path / f"c.{shard}").read_bytes()[-4:], "little")
            ]
    shards = list(store.manifest.shards)
    shards[shard] = replace(shards[shard], sha256=shard_digest(checksums))
    (root / MANIFEST).write_bytes(manifests.to_bytes(replace(store.manifest, shards=tuple(shards))))


def test_a_wrong_activation_with_right_checksums_is_found_by_recomputing(store):
    changed_consistently(store, store.hooks[1], 130, np.full(32, 0.5, np.float32))
    again = open_store(store.path)
    verify_files(again)
    with pytest.raises(
        StoreError, match=rf"{store.hooks[1]} of row 130 at \[0\] is 0\.5 and was recomputed as"
    ):
        verify_rows(again, None, batches=100)


def test_on_another_stack_native_rows_may_differ_by_rounding_only(store, monkeypatch):
    import capture.recomputed as module

    monkeypatch.setattr(module, "SAME_STACK", ("device",))
    monkeypatch.setattr(module, "stack_record", lambda *_: {"device": "another"})
    found = verify_rows(store, None, batches=100)
    assert not found.bitwise
    rms = float(store.read(slice(None))[store.hooks[0]].square().mean().sqrt())
    row = store.read([130])[store.hooks[0]][0].numpy()
    changed_consistently(store, store.hooks[0], 130, row + np.float32(0.5e-3 * rms))
    assert 1e-4 < verify_rows(open_store(store.path), None, batches=100).largest < 1e-3
    changed_consistently(store, store.hooks[0], 130, row + np.float32(3e-3 * rms))
    with pytest.raises(StoreError, match=r"may differ by 0\.001 of the root mean square"):
        verify_rows(open_store(store.path), None, batches=100)


@pytest.mark.parametrize(
    ("kept", "recomputed", "share"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-9], None),
        ([3.0, float("nan"), float("inf")], [3.0, float("nan"), float("inf")], 0.0),
        ([4.0, float("nan")], [4.002, float("nan")], 0.0005),
        ([4.0, float("nan")], [4.02, float("nan")], None),
        ([4.0, float("inf")], [4.0, 4.0], None),
        ([4.0, float("inf")], [4.0, float("-inf")], None),
        ([4.0, 4.0], [4.0, float("nan")], None),
        ([float("nan")], [float("nan")], 0.0),
        ([float("nan")], [1.0], None),
    ],
    ids=str,
)
@pytest.mark.parametrize("type_bound", [0.0, 2.0**-10])
def test_on_another_stack_only_finite_values_may_differ(kept, recomputed, share, type_bound):
    """Also where the root mean square is 0, as of a hook that an untrained model leaves at zero."""
    kept, recomputed = torch.tensor(kept), torch.tensor(recomputed)
    found, wrong = _beyond(recomputed, kept, type_bound)
    assert bool(wrong.any()) == (share is None)
    if share is not None:
        assert found == pytest.approx(share, rel=1e-3)


def test_the_weights_of_another_model_are_refused(store, tmp_path, config):
    model = HookedMDLM.from_pretrained(config.model)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    load_tokenizer(config.model).save(tmp_path / "other")
    with pytest.raises(
        StoreError, match=r"was captured with weights_sha256 .* name the store's own with --model"
    ):
        verify_rows(store, str(tmp_path / "other"), batches=1)


@pytest.mark.parametrize("option", ["model", "tokenizer"])
def test_another_model_or_tokenizer_is_refused_before_the_bytes_are_read(
    store, tmp_path, config, option, monkeypatch
):
    other = tmp_path / "other"
    if option == "model":
        model = HookedMDLM.from_pretrained(config.model)
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1
        model.save_pretrained(other)
        load_tokenizer(config.model).save(other)
    else:
        shutil.copytree(config.model, other)
        file = other / "tokenizer.json"
        found = json.loads(file.read_text())
        found["model"]["merges"][-2:] = found["model"]["merges"][:-3:-1]
        file.write_text(json.dumps(found))
    monkeypatch.setattr("capture.verify.verify_files", lambda *_, **__: pytest.fail("bytes were read"))
    with pytest.raises(StoreError, match=f"name the store's own with --{option}$"):
        verify_store(store.path, **{option: str(other)}, batches=1)  # type: ignore[arg-type]


def test_the_weights_are_loaded_once(store, monkeypatch):
    loaded, load = [], HookedMDLM.from_pretrained

    def noted(source: Path) -> HookedMDLM:
        loaded.append(source)
        return load(source)

    monkeypatch.setattr(HookedMDLM, "from_pretrained", noted)
    assert verify_store(store.path, batches=0).batches == 0
    assert loaded == []
    assert verify_store(store.path, batches=1).batches == 1
    assert len(loaded) == 1


def test_numbers_of_batches_that_are_none_are_refused(store):
    with pytest.raises(ConfigError, match=r"^batches must be a whole number from 0, got -1; 0 checks"):
        verify_store(store.path, batches=-1)
    # In a process of its own, where no annotation is checked.
    program = f"from capture import verify_store\nverify_store({str(store.path)!r}, batches=1.5)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    last = result.stderr.splitlines()[-1]
    assert last.endswith(
        "ConfigError: batches must be a whole number from 0, got 1.5; 0 checks the bytes only"
    )


def test_noise_that_the_seed_does_not_give_is_found(store, monkeypatch):
    import capture.recomputed as module

    monkeypatch.setattr(
        module, "noised", lambda ids, t, mask_id, *, seed, block_number: np.full_like(ids, mask_id)
    )
    with pytest.raises(StoreError, match="and its seed and time give 300; capture again"):
        verify_rows(store, None, batches=1)


def test_a_manifest_of_another_capture_is_no_json_trick(store):
    text = json.loads((Path(store.path) / MANIFEST).read_text())
    text["committed_rows"] = 400
    (Path(store.path) / MANIFEST).write_text(json.dumps(text))
    with pytest.raises(StoreError, match="does not match its own SHA-256"):
        open_store(store.path)


def test_a_moved_model_is_named_and_the_recorded_tokenizer_stays(config, tmp_path):
    """The tokenizer came from elsewhere: the model's directory has none."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(config.model) / name, bare / name)
    words = shutil.copytree(config.model, tmp_path / "words")
    out = str(tmp_path / "of-two.zarr")
    run_capture(replace(config, model=str(bare), tokenizer=str(words), out=out))
    moved = bare.rename(tmp_path / "moved")
    assert verify_store(out, model=str(moved)).bitwise
    elsewhere = words.rename(tmp_path / "elsewhere")
    assert verify_store(out, model=str(moved), tokenizer=str(elsewhere)).bitwise
