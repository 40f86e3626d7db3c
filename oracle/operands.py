"""Whether the operands of an operation fit each other, asked before anything is computed.

The compiled loops take sizes on trust, and a product of operands that were cut or stretched to fit is a wrong
number without an error. So each operation names the axes of what it takes; axes of one name have one size, and
nothing is broadcast except where an operation says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oracle.errors import ExactError
from oracle.recipes import MAX_SUM_TERMS


def require_fit(operation: str, **operands: tuple[Tensor | None, str]) -> None:
    """Raise ExactError unless every operand has the axes that it is given with.

    Args:
        operands: Each with its axes by name, separated by spaces: a first one with a star stands for any number
            of them, a number for itself. None is an operand that was left out.

    >>> require_fit("linear", x=(torch.ones(5, 2, 3), "*rows d_in"), weight=(torch.ones(4, 3), "d_out d_in"))
    """
    sizes: dict[str, tuple[int, ...]] = {}
    for name, (tensor, axes) in operands.items():
        if tensor is None:
            continue
        require_tensor(operation, name, tensor)
        if not _binds(tuple(tensor.shape), axes.split(), sizes):
            given = {key: pair for key, pair in operands.items() if pair[0] is not None}
            raise ExactError(
                f"{operation}: takes {_joined({key: axes.split() for key, (_, axes) in given.items()})}, axes of one "
                f"name with one size; got {shapes_of(**{key: tensor for key, (tensor, _) in given.items()})}; "
                f"nothing is broadcast or cut here: expand, slice or transpose what does not fit"
            )


def _binds(shape: tuple[int, ...], axes: list[str], sizes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a shape fits its axes and what their names stand for so far; notes what they stand for now."""
    if axes[0].startswith("*"):
        count = len(shape) - len(axes) + 1
        if count < 0:
            return False
        pairs = [
            (axes[0], shape[:count]),
            *((axis, (n,)) for axis, n in zip(axes[1:], shape[count:], strict=True)),
        ]
    elif len(shape) == len(axes):
        pairs = [(axis, (n,)) for axis, n in zip(axes, shape, strict=True)]
    else:
        return False
    return all(sizes.setdefault(axis, (int(axis),) if axis.isdecimal() else n) == n for axis, n in pairs)


def broadcast_shape(operation: str, own_axes: int = 0, **operands: Tensor) -> torch.Size:
    """The shape that all broadcast to, by torch's rules.

    Args:
        own_axes: Number of last axes that take no part.
    Raises:
        ExactError: If there is no such shape.
    """
    for name, tensor in operands.items():
        require_tensor(operation, name, tensor)
    shapes = [tensor.shape[: tensor.dim() - own_axes] for tensor in operands.values()]
    try:
        return torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call, no-any-return]
    except RuntimeError:
        which = f"all but the last {own_axes} axes" if own_axes else "the shapes"
        raise ExactError(
            f"{operation}: {which} must broadcast to one, got {shapes_of(**operands)}; expand or slice one of them"
        ) from None


def require_length(n: int, operation: str) -> None:
    """Raise ExactError unless a row of so many values has an exact sum."""
    if not 1 <= n <= MAX_SUM_TERMS:
        raise ExactError(
            f"{operation}: rows must have 1 to {MAX_SUM_TERMS} values for their sums to be exact, got {n}"
        )


def require_tensor(operation: str, name: str, value: object) -> None:
    """Raise ExactError unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise ExactError(
            f"{operation}: {name} must be a float32 tensor, got {type(value).__name__}; make it one, so that its "
            f"rounding is yours"
        )


def shapes_of(**operands: Tensor | None) -> str:
    """Names and shapes for a message."""
    return _joined({name: list(tensor.shape) for name, tensor in operands.items() if tensor is not None})


def _joined(axes: dict[str, list[str]] | dict[str, list[int]]) -> str:
    return ", ".join(f"{name} [{', '.join(map(str, parts))}]" for name, parts in axes.items())
