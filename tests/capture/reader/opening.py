"""What the tests of the reader share: how a store is opened, and one bit of it changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from capture.reader import ActivationStore
from tests.capture.stores import (
    HOOKS,
    MLP,
)

Opener = Callable[[Path], ActivationStore]
SHARD_ROWS = 512


def plain(root: Path, name: str) -> NDArray[Any]:
    """An array as zarr-python alone reads it."""
    return np.asarray(zarr.open_array(root, path=name, mode="r")[...])


def shard(root: Path, number: int, hook: str = MLP) -> Path:
    return root / "acts" / hook / ".".join(["c", str(number), *["0"] * len(HOOKS[hook])])


def flip(file: Path, byte: int) -> None:
    """Change one bit."""
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)
