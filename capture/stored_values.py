"""Values as they are stored, in the types that they are used in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def native(values: NDArray[Any]) -> NDArray[Any]:
    """In the byte order of this machine, which torch wants."""
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def floats(values: NDArray[Any]) -> Tensor:
    """Stored activations as float32."""
    dtype = values.dtype
    if dtype.char == "f" and dtype.isnative:  # the usual case, told without making types to compare
        return torch.from_numpy(values)
    values = native(values)
    if values.itemsize == 4:
        return torch.from_numpy(values)
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(values).float()
