"""What is in another format, of another size, or no store at all, is refused and not misread."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capture import open_store
from mdlm_interp.errors import StoreError
from tests.capture.stores import (
    MLP,
    with_hashes,
    write_manifests,
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"crc32c"', '"zstd"'),
        ('"little"', '"big"'),
        ('"separator": "."', '"separator": "/"'),
        ('"index_location": "end"', '"index_location": "start"'),
    ],
)
def test_arrays_in_another_format_are_refused_not_misread(partial, tmp_path, old, new):
    root = Path(shutil.copytree(partial.root, tmp_path / "run.zarr"))
    path = root / "acts" / MLP / "zarr.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(StoreError, match=r"zarr.json is damaged \(ValueError: "):
        open_store(root).read([0], MLP)


@pytest.mark.parametrize("edit", [{"shape": [885, 5]}, {"shape": [887, 5]}])
def test_arrays_of_another_size_than_the_manifest_are_refused(made, copy, edit):
    path = copy / "acts" / MLP / "zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    (copy / "manifest.json").unlink()
    write_manifests(copy, with_hashes(copy, made.manifest))
    with pytest.raises(StoreError, match=r"rows in shards of 512, manifest.json has 886 in shards of 512"):
        open_store(copy).read([0], MLP)


def edit_attributes(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change attributes of an incomplete store, whose metadata has no hash."""
    metadata = json.loads((root / "zarr.json").read_text())
    change(metadata["attributes"])
    (root / "zarr.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: at.clear(), "is a Zarr group, but not one of 'mdlm-interp activations'"),
        (lambda at: at.pop("hooks"), "zarr.json lacks the attribute 'hooks'; restore it from a copy"),
        (lambda at: at.update(dtype="int8"), "zarr.json has an unknown dtype 'int8'"),
        (
            lambda at: at.update(schema_version=3),
            "zarr.json has schema_version 3, this package reads 2; update",
        ),
    ],
)
def test_attributes_that_cannot_be_read_are_refused(partial, tmp_path, opened, change, message):
    root = Path(shutil.copytree(partial.root, tmp_path / "run.zarr"))
    edit_attributes(root, change)
    with pytest.raises(StoreError) as caught:
        opened(root)
    assert message in str(caught.value)


def test_a_path_that_is_no_store_is_refused_and_never_to_be_removed(copy, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    messages = {
        "runs.zarr": r"runs.zarr does not exist; did you mean 'run.zarr'?",
        "run.zarr/manifest.json": "manifest.json is a file, not a store",
        "thesis": "thesis has no manifest.json: it is no activation store",
        ".": f"has no manifest.json: it is no activation store; did you mean {str(copy)!r}?",
    }
    for name, message in messages.items():
        with pytest.raises(StoreError) as caught:
            open_store(tmp_path / name)
        assert message in str(caught.value)
        assert "remove" not in str(caught.value)
        assert "capture again" not in str(caught.value)
