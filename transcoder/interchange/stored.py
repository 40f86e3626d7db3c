"""Files of other tools, every value checked as it is taken out.

Errors are one line: what is wrong, in which file, and what to do. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.errors import CheckpointError, nearest
from mdlm_interp.shapes import Float64
from transcoder.checkpoint import read_tensors

READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class StoredTensors:
    """A safetensors file.

    Raises:
        CheckpointError: If it is missing, truncated or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = read_tensors(path)
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        """All tensors, in order."""
        return sorted(self._tensors)

    def take(self, name: str, shape: Sequence[int | None]) -> Float64[Tensor, "..."]:
        """A tensor in float64.

        Args:
            shape: What it has to be; None leaves a size open.
        Raises:
            CheckpointError: If it is missing, of another shape or type, or not finite.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no {name!r}{nearest(name, self.names)}")
        tensor = self._tensors[name]
        self._taken.add(name)
        fits = len(tensor.shape) == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(
                f"{name} in {self.path} has shape {tuple(tensor.shape)}, expected ({expected}); is it of another "
                f"transcoder than the files beside it?"
            )
        if tensor.numel() == 0:
            raise CheckpointError(
                f"{name} in {self.path} is empty, of shape {tuple(tensor.shape)}; fetch it again"
            )
        if tensor.dtype not in READABLE:
            found = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name} in {self.path} is {found}, expected floating point of 16 to 64 bits"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} in {self.path} has values that are not finite; the file is damaged, fetch it again"
            )
        return tensor.double()

    def finish(self) -> None:
        """Raise CheckpointError if a tensor was not taken: what it means here is not known."""
        rest = [name for name in self.names if name not in self._taken]
        if rest:
            raise CheckpointError(
                f"{self.path} also holds {len(rest)} tensors that this reader does not know, first {rest[0]!r}; "
                f"they could change what it computes, so it is not imported"
            )


def numbered(directory: Path, prefix: str, suffix: str = ".safetensors") -> int:
    """How many files prefix0, prefix1, ... there are.

    Raises:
        CheckpointError: If none, or a number in between is missing.
    """
    found = {path.name for path in directory.glob(f"{prefix}*{suffix}")}
    if not found:
        raise CheckpointError(f"{directory} has no {prefix}0{suffix}; is it a transcoder of this format?")
    for number in range(len(found)):
        if f"{prefix}{number}{suffix}" not in found:
            raise CheckpointError(
                f"{directory} has {len(found)} files {prefix}*{suffix} but no {prefix}{number}{suffix}; "
                f"fetch the missing file"
            )
    return len(found)


def require(settings: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    """A setting of a config file, of the given type.

    Raises:
        CheckpointError: If it is missing or of another type.
    """
    value = settings.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{name} in {path} must be {kind.__name__}, got {value!r}")
    return value


def thresholds_or_none(
    thresholds: Float64[Tensor, "layer feature"], path: Path
) -> Float64[Tensor, "layer feature"] | None:
    """Thresholds of a jumprelu; None if all are zero, which is a plain ReLU.

    Raises:
        CheckpointError: If one is below zero: it would keep negative values.
    """
    lowest = float(thresholds.min())
    if lowest < 0:
        raise CheckpointError(
            f"a threshold in {path} is {lowest:.3g}; below zero it keeps negative activations, which no "
            f"activation here does"
        )
    return thresholds if float(thresholds.max()) > 0 else None
