"""A layer's hook points in the words of other tools."""

from __future__ import annotations

from mdlm_interp.errors import CheckpointError, DataError
from transcoder.config_checks import LAYER_FIELD

BLOCK = f"blocks.{LAYER_FIELD}."


def in_block(template: str) -> str:
    """The name within a block: mlp.hook_in of blocks.{layer}.mlp.hook_in.

    Raises:
        DataError: If it is not in a block.
    """
    if not template.startswith(BLOCK):
        raise DataError(
            f"circuit-tracer names hook points within a block, so {template!r} must begin with {BLOCK!r}; "
            f"export to saelens or crosslayer-coding"
        )
    return template.removeprefix(BLOCK)


def from_block(name: str) -> str:
    """The opposite of `in_block`."""
    return BLOCK + name


def template_of(names: list[str], source: str) -> str:
    """The template of one hook point per layer, in the layers' order.

    >>> template_of(["blocks.0.mlp.hook_in", "blocks.1.mlp.hook_in"], "cfg.json")
    'blocks.{layer}.mlp.hook_in'

    Raises:
        CheckpointError: If the names differ by more than their layer's number.
    """
    templates = {
        ".".join(LAYER_FIELD if part == str(layer) else part for part in name.split("."))
        for layer, name in enumerate(names)
    }
    if len(templates) == 1 and LAYER_FIELD in next(iter(templates)):
        return templates.pop()
    raise CheckpointError(
        f"hook points of {source} must be one per layer from 0 and differ by its number only, got "
        f"{', '.join(sorted(names)[:3])}; name them with input_hook and output_hook"
    )
