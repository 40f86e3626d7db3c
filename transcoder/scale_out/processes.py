"""The processes of a run, and how their parts become one.

Everything that processes exchange goes through `Processes`. Parts that are to be added are gathered and added in the
order of the blocks, on every process alike, where the layout asks for it; else the network adds them. Whole numbers
are added by the network, since their sum has no order. Nothing is exchanged within a backward pass.

A process that is gone ends the others' waiting with one line: at once where its connection closes, else after
`timeout_s`.
"""

# Axes: block, then the axes of a part

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from mdlm_interp.errors import ConfigError, MdlmError
from transcoder.scale_out.layout import Layout

T = TypeVar("T")
Axis: TypeAlias = Literal["data", "feature"]

AXES: dict[Axis, int] = {"data": 0, "feature": 1}
PIECE = 1 << 24
"""Elements of a sum that are gathered at a time."""

logger = logging.getLogger(__name__)


class LostProcessError(MdlmError):
    """Another process of the run is gone, or does not answer."""


class Processes:
    """The processes of a run as one of them sees them; by default, it is alone.

    Args:
        kind: Of device that they compute on, as torch names it.
    """

    def __init__(self, layout: Layout | None = None, kind: str = "cpu") -> None:
        self.layout = layout or Layout()
        self._device = torch.device(kind)
        self.is_first = self.layout.place == (0, 0)
        """Whether this process writes files and shows progress."""

    @cached_property
    def mesh(self) -> Any:
        """The DeviceMesh (data, feature); its groups are torch.distributed's."""
        from torch.distributed.device_mesh import init_device_mesh

        with _together():
            return init_device_mesh(self._device.type, self.layout.mesh, mesh_dim_names=tuple(AXES))

    def gathered(self, parts: Sequence[Tensor], axis: Axis) -> list[Tensor]:
        """The parts of all blocks along an axis, in their order.

        Args:
            parts: Of this process's blocks, equal in shape.
        """
        processes = self.layout.mesh[AXES[axis]]
        if processes == 1:
            return list(parts)
        own = torch.stack([part.detach() for part in parts])
        every = [torch.empty_like(own) for _ in range(processes)]
        with _together():
            _distributed().all_gather(every, own, group=self.mesh.get_group(axis))
        return [part for of_process in every for part in of_process.unbind()]

    def added(self, parts: Sequence[Tensor], axis: Axis) -> Tensor:
        """The sum over all blocks along an axis; one block's part itself if there is no other."""
        if self.layout.ordered:
            return _left_to_right(self.gathered(parts, axis))
        total = _left_to_right(parts)
        if self.layout.mesh[AXES[axis]] > 1:
            total = total.detach().clone()
            with _together():
                _distributed().all_reduce(total, group=self.mesh.get_group(axis))
        return total

    def added_in_pieces(self, parts: Sequence[Tensor], axis: Axis) -> Tensor:
        """The same for large parts, a piece at a time, so that not all of all blocks are held at once."""
        if self.layout.blocks[AXES[axis]] == 1:
            return parts[0]
        pieces = zip(*(torch.split(part.reshape(-1), PIECE) for part in parts), strict=True)
        return torch.cat([self.added(piece, axis) for piece in pieces]).view_as(parts[0])

    def count(self, numbers: Tensor, *axes: Axis) -> Tensor:
        """Sum of whole numbers over the processes along some axes."""
        for axis in axes:
            if self.layout.mesh[AXES[axis]] > 1:
                numbers = numbers.clone()
                with _together():
                    _distributed().all_reduce(numbers, group=self.mesh.get_group(axis))
        return numbers

    def any(self, here: bool) -> bool:
        """Whether it is so on some process."""
        if self.layout.is_alone:
            return here
        return bool(self.count(torch.tensor([int(here)], device=self._device), "data", "feature") > 0)

    def first(self, run: Callable[[], T]) -> T:
        """What the first process finds, on all; or its error, on all.

        Raises:
            MdlmError, OSError: The first process's. With other exceptions it ends, and the others see it gone.
        """
        if self.layout.is_alone:
            return run()
        outcome: list[Any] = [None, None]
        raised: MdlmError | OSError | None = None
        if self.is_first:
            try:
                outcome[0] = run()
            except (MdlmError, OSError) as error:
                raised = error
                outcome[1] = (
                    error if isinstance(error, MdlmError) else LostProcessError(f"process 0: {error}")
                )
        with _together():
            _distributed().broadcast_object_list(outcome, src=0, device=self._device)
        if raised is not None:
            raise raised
        if outcome[1] is not None:
            raise outcome[1]
        found: T = outcome[0]
        return found


@contextmanager
def joined_processes(
    device: torch.device,
    timeout_s: int,
    make: Callable[[int, int], Layout],
) -> Iterator[Processes]:
    """The processes that torchrun started; alone without it. Threads and groups are as before at the end.

    Args:
        make: The layout for (rank, world size).
    Raises:
        ConfigError: If the environment is not one of torchrun's.
        LostProcessError: If the others do not come in time.
    """
    distributed, kind = _distributed(), device.type
    if distributed.is_available() and distributed.is_initialized():
        yield Processes(make(distributed.get_rank(), distributed.get_world_size()), kind)
        return
    rank, world_size = _from_environment()
    layout = make(rank, world_size)
    if world_size == 1:
        yield Processes(layout)
        return
    if kind == "cuda":
        torch.cuda.set_device(own_device(device))
    backends = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    with _together():
        distributed.init_process_group(backends, timeout=timedelta(seconds=timeout_s))
    try:
        yield Processes(layout, kind)
    finally:
        distributed.destroy_process_group()


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """Let torch compute with so many threads; None leaves it as it is."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def own_device(device: torch.device) -> torch.device:
    """This process's GPU where a number of them is torchrun's; the device itself otherwise."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _from_environment() -> tuple[int, int]:
    """Rank and number of processes, as torchrun has them; one process without them."""
    rank, world_size = (os.environ.get(name, preset) for name, preset in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise ConfigError(
            f"RANK and WORLD_SIZE in the environment must be whole numbers with 0 <= RANK < WORLD_SIZE, got {rank!r} "
            f"and {world_size!r}; unset both, or start with torchrun"
        )
    if int(world_size) > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but MASTER_ADDR does not say where the processes meet; start with torchrun, "
            f"or unset WORLD_SIZE to train on one"
        )
    return int(rank), int(world_size)


@contextmanager
def _together() -> Iterator[None]:
    """One line for an exchange that another process did not take part in."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise LostProcessError(
            f"another process of the run is gone or does not answer ({reason}); see what it said, and start all again: "
            f"training goes on from the last saved state"
        ) from error


def _left_to_right(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _distributed() -> Any:
    import torch.distributed as distributed

    return distributed
