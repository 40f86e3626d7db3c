"""Which rows and which features a process has.

A batch is cut into `blocks[0]` data blocks of consecutive rows, the features of every layer into `blocks[1]` feature
blocks. The processes make a mesh (data, feature); each has as many consecutive blocks of either kind as the next.
What is computed for a pair of blocks has the shape of the blocks, and the parts are added in the order of the blocks:
so a step has the same bits on every mesh that divides the same blocks, on one process too.

Without blocks there are as many as processes, and parts are added as the network likes: other bits on another mesh.
"""

# Axes: layer, row, feature

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from mdlm_interp.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """The blocks of a run and the place of this process; by default, everything on one process.

    Pairs are (data, feature).
    """

    blocks: tuple[int, int] = (1, 1)
    mesh: tuple[int, int] = (1, 1)
    """Processes along each axis."""
    place: tuple[int, int] = (0, 0)
    """Of this process on the mesh."""
    ordered: bool = True
    """Whether parts are added in the order of the blocks."""

    @property
    def is_alone(self) -> bool:
        """Whether this process has all blocks."""
        return prod(self.mesh) == 1

    @property
    def is_one_block(self) -> bool:
        """Whether there is nothing to put together."""
        return prod(self.blocks) == 1

    @property
    def data_blocks(self) -> range:
        """Numbers of this process's data blocks."""
        return _share(self.blocks[0], self.mesh[0], self.place[0])

    @property
    def feature_blocks(self) -> range:
        """Numbers of this process's feature blocks."""
        return _share(self.blocks[1], self.mesh[1], self.place[1])

    def own_rows(self, batch_size: int) -> range:
        """The rows of a batch that this process has: its data blocks, which follow each other."""
        size = batch_size // self.mesh[0]
        return range(self.place[0] * size, (self.place[0] + 1) * size)

    def rows(self, block: int, batch_size: int) -> slice:
        """The rows of a data block in a batch."""
        size = batch_size // self.blocks[0]
        return slice(block * size, (block + 1) * size)

    def features(self, block: int, n_features: int) -> slice:
        """The features of a feature block."""
        size = n_features // self.blocks[1]
        return slice(block * size, (block + 1) * size)


def layout_of(
    blocks: tuple[int, int] | None,
    mesh: tuple[int, int] | None,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    n_features: int,
) -> Layout:
    """The layout of a run on so many processes.

    Args:
        blocks: None for as many as processes, added in any order.
        mesh: None for what the blocks allow: features are divided before data, which reconstructions, being
            smaller than gradients, make the cheaper way.
    Raises:
        ConfigError: If blocks do not divide the batch or the features, or processes do not divide the blocks.
    """
    found = mesh if mesh is not None else _mesh(blocks, world_size)
    if prod(found) != world_size:
        raise ConfigError(
            f"train.mesh must have as many places as there are processes, got {_pair(found)} for {world_size}; start "
            f"{prod(found)} (torchrun --nproc-per-node {prod(found)}), or leave it out"
        )
    cut = blocks if blocks is not None else found
    for count, processes, what in zip(cut, found, ("data", "feature"), strict=True):
        if count % processes:
            raise ConfigError(
                f"train.mesh must divide train.blocks, both (data, feature), got mesh {_pair(found)} for blocks "
                f"{_pair(cut)}: {processes} processes cannot share {count} {what} blocks evenly; change either"
            )
    name = "train.mesh" if blocks is None else "train.blocks"
    sizes = (batch_size, "train.batch_size", 0, "data"), (n_features, "n_features", 1, "feature")
    for size, setting, axis, what in sizes:
        if size % cut[axis]:
            raise ConfigError(
                f"{setting} must be a multiple of the {what} blocks, got {size} and {cut[axis]} from {name} "
                f"{_pair(cut)}; change either"
            )
    place = divmod(rank, found[1])
    return Layout(blocks=cut, mesh=found, place=place, ordered=blocks is not None)


def _mesh(blocks: tuple[int, int] | None, world_size: int) -> tuple[int, int]:
    """A mesh for so many processes, as wide along features as the blocks allow.

    >>> _mesh(None, 4), _mesh((2, 4), 4), _mesh((4, 2), 4), _mesh((2, 2), 1)
    ((1, 4), (1, 4), (2, 2), (1, 1))
    """
    if blocks is None:
        return 1, world_size
    for along_features in range(min(blocks[1], world_size), 0, -1):
        along_data, rest = divmod(world_size, along_features)
        if rest == 0 and blocks[1] % along_features == 0 and blocks[0] % along_data == 0:
            return along_data, along_features
    raise ConfigError(
        f"the number of processes must divide train.blocks (data, feature) into equal shares, got {world_size} for "
        f"{_pair(blocks)}; start {prod(blocks)} or a divisor, or change train.blocks"
    )


def _share(count: int, processes: int, number: int) -> range:
    size = count // processes
    return range(number * size, (number + 1) * size)


def _pair(pair: Sequence[int]) -> str:
    return " x ".join(map(str, pair))
