"""Whatever is wrong with an export is an error that names the file; no number read from it is wrong."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from capture import open_store, schema
from capture.convert import export_store
from mdlm_interp.errors import MdlmError, StoreError
from tests.capture.convert.checks import opened
from tests.capture.convert.conftest import FORMATS
from tests.capture.stores import HEADS, MLP, Truth

FLIPS = 60
"""Bits that are flipped in each format, one at a time."""


@pytest.fixture(scope="module")
def exports(made: Truth, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The store in each format; tests only read them."""
    root = tmp_path_factory.mktemp("exports")
    return {to: export_store(made.root, root / to, to=to).path for to in FORMATS}  # type: ignore[arg-type]


@pytest.fixture
def copy(exports: dict[str, Path], to: str, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    copied = tmp_path / "out"
    return Path(
        shutil.copytree(exports[to], copied) if exports[to].is_dir() else shutil.copy(exports[to], copied)
    )


def everything(out: Path) -> str:
    """A hash of all that an export says when it is read."""
    store = open_store(out)
    said = [store.fingerprint(), store.hooks, store.dtype, store.length, store.complete, store.planned_rows]
    statistics = [getattr(store.statistics(hook), what) for hook in store.hooks for what in schema.STATISTICS]
    digest = hashlib.sha256(json.dumps([*said, store.config, store.provenance]).encode())
    for values in statistics:
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def flip(file: Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def a_file(copy: Path) -> Path:
    """The file, or the one of the directory that has the first rows."""
    return copy / "shard-00000.safetensors" if copy.is_dir() else copy


def test_any_flipped_bit_is_found_or_changes_nothing(copy):
    files = [copy] if copy.is_file() else sorted(copy.iterdir())
    expected, draws = everything(copy), random.Random(0)
    found = 0
    for number in range(FLIPS):
        file = files[number % len(files)]
        size = file.stat().st_size
        # Every second one near the beginning, where the structure is.
        position = draws.randrange(size if number // len(files) % 2 else min(size, 2000))
        bit = draws.randrange(8)
        flip(file, position, bit)
        try:
            said = everything(copy)
        except StoreError as error:
            said = str(error)
            found += 1
        assert said == expected or str(file) in said, (file.name, position, bit, said)
        flip(file, position, bit)
    assert found > FLIPS / 2
    assert everything(copy) == expected


def test_a_damaged_chunk_is_found_when_it_is_read_and_the_others_stay_readable(copy):
    whole = open_store(copy)
    chunk = whole.files.array(f"acts/{MLP}").read(256, 512).tobytes()
    file = a_file(copy)
    position = file.read_bytes().index(chunk[:64])
    flip(file, position + 100)
    store = opened(copy)
    store.read(slice(0, 256))
    store.read(slice(256, 512), HEADS)
    for rows in (slice(300, 301), [700, 511]):
        with pytest.raises(
            StoreError, match=rf"^{file} is damaged \(.*rows 256 to 512.*; restore it from a copy"
        ):
            store.read(rows, MLP)
    assert store.gather([700, 511], MLP)[MLP].shape == (2, 5)
    with pytest.raises(StoreError, match=str(file)):
        store.verify()


def test_a_file_cut_short_is_an_error_that_names_it(copy):
    file = a_file(copy)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(StoreError, match=rf"^{file} is damaged \(.*truncated"):
        open_store(copy).fingerprint()


def test_an_empty_file_is_an_error_that_names_it(copy):
    file = a_file(copy)
    file.write_bytes(b"")
    with pytest.raises(StoreError, match=rf"^{file} is (a file, not a store|damaged \(it is too short)"):
        open_store(copy).fingerprint()


@pytest.mark.parametrize(
    "name", ["shard-00000.safetensors", "sequences-00000.safetensors", "statistics.safetensors"]
)
def test_a_missing_file_is_an_error_that_names_it(exports, tmp_path, name):
    copy = Path(shutil.copytree(exports["safetensors"], tmp_path / "out"))
    (copy / name).unlink()
    with pytest.raises(StoreError, match=rf"^{copy / name} is missing"):
        everything(copy)
    with pytest.raises(StoreError, match=rf"^{copy / name} cannot be read"):
        opened(copy).verify()


def test_a_chunk_that_was_never_written_is_no_zeros(exports, tmp_path):
    copy = Path(shutil.copy(exports["hdf5"], tmp_path / "out.h5"))
    with h5py.File(copy, "r+") as file:
        values = file[f"acts/{MLP}"][:]
        del file[f"acts/{MLP}"]
        hollow = file.create_dataset(f"acts/{MLP}", values.shape, "<f4", chunks=(256, 5), fletcher32=True)
        hollow[:256] = values[:256]
    store = open_store(copy)
    assert np.array_equal(store.read(slice(0, 256), MLP)[MLP].numpy(), values[:256])
    for rows in ([300], slice(300, 301)):
        with pytest.raises(StoreError, match=rf"^{copy} is damaged \(acts/{MLP}: chunk 1 is missing\)"):
            store.read(rows, MLP)


def test_a_tensor_of_another_type_is_found(exports, tmp_path):
    copy = Path(shutil.copytree(exports["safetensors"], tmp_path / "out"))
    file = copy / "shard-00000.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"'))
    with pytest.raises(
        StoreError, match=rf"^{file} is damaged \(acts.{MLP} is I32 \[512, 5\], expected F32 \[512, 5\]\)"
    ):
        open_store(copy).read([0], MLP)


def test_two_files_in_each_others_place_are_found(exports, tmp_path):
    copy = Path(shutil.copytree(exports["safetensors"], tmp_path / "out"))
    first, second = (copy / f"shard-0000{number}.safetensors" for number in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(
        StoreError, match=rf"^{first} is damaged \(its SHA-256 is not the one in store.json\)"
    ):
        opened(copy).verify()


def rewritten(copy: Path, **changes: object) -> None:
    """Change what an export says of itself, hashes and all, as a later version could."""
    if copy.is_dir():
        from capture.convert.safetensors_files import INDEX, _index_text

        content = json.loads((copy / INDEX).read_text())
        del content["sha256"]
        (copy / INDEX).write_text(_index_text({**content, **changes}))
        return
    from capture.convert.hdf5 import _HASH, _attributes_hash, _native

    with h5py.File(copy, "r+") as file:
        for name, value in changes.items():
            file.attrs[name] = value
        stored = {name: _native(value) for name, value in file.attrs.items() if name != _HASH}
        file.attrs[_HASH] = _attributes_hash(stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, r"/out has schema_version 99, this package reads 2; update mdlm-interp"),
        ({"export_version": 2}, r"has export_version 2, this package reads 1; export again, or update"),
        ({"rows": 1000}, r"is damaged|does not list"),
    ],
)
def test_what_another_version_wrote_is_refused(copy, changes, message):
    rewritten(copy, **changes)
    with pytest.raises(StoreError, match=message):
        open_store(copy).fingerprint()


def test_files_of_other_programs_are_refused(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(StoreError, match=r"other.h5 is an HDF5 file, but no export of this package$"):
        open_store(tmp_path / "other.h5")
    (tmp_path / "other").mkdir()
    for text, message in (("{}", "is not one that this package wrote"), ("{", "is damaged")):
        (tmp_path / "other" / "store.json").write_text(text)
        with pytest.raises(StoreError, match=rf"other/store.json {message}"):
            open_store(tmp_path / "other")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(MdlmError, match=r"text.h5 is a file, not a store"):
        open_store(tmp_path / "text.h5")
