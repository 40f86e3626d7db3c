"""What the tests of remote stores share."""

from pathlib import Path
from typing import Any

import zarr

from capture import CaptureConfig
from capture.manifest import MANIFEST
from capture.places import Place
from tests.capture.remote.service import Answer

OVERLOADED = Answer(503, "<Error><Code>SlowDown</Code></Error>")


def contents(place: Place) -> dict[str, bytes]:
    """Every file of a place."""
    return {path: place.read(path) or b"" for path in place.files()}


def filled(place: Place) -> None:
    """Make a store of two files."""
    with place.create("rank-0") as made:
        zarr.create_group(made.zarr_store(), attributes={"a": 1})
        made.replace(MANIFEST, b"{}")


def small(model_directory: Path, texts: tuple[Path, ...], out: object, **changes: Any) -> CaptureConfig:
    """504 rows in two shards, the second of which is not full, in batches that end in neither."""
    given = {
        "model": str(model_directory),
        "files": texts,
        "out": str(out),
        "length": 24,
        "max_sequences": 21,
    }
    hooks = ("blocks.1.mlp.hook_in", "blocks.1.attn.hook_z")
    return CaptureConfig(
        **{**given, "hooks": hooks, "seed": 5, "shard_rows": 256, "batch_size": 4, **changes}
    )
