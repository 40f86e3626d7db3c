"""Checks on activations before they are written: the sums that hold in every forward pass, and overflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdlm_interp.errors import StoreError

ADDITIONS = (
    ("hook_resid_mid", "hook_resid_pre", "hook_attn_out"),
    ("hook_resid_post", "hook_resid_mid", "hook_mlp_out"),
)
"""By block: the first is the sum of the other two."""
LARGEST = {
    torch.float16: 65504.0,
    torch.bfloat16: 3.3895313892515355e38,
    torch.float32: 3.4028234663852886e38,
}
"""Largest finite value of each type that activations are kept in."""


def additions(hooks: Sequence[str]) -> list[tuple[str, str, str]]:
    """The sums whose three hook points are all among these."""
    blocks = dict.fromkeys(hook.rpartition(".")[0] for hook in hooks if hook.startswith("blocks."))
    named = [tuple(f"{block}.{name}" for name in names) for block in blocks for names in ADDITIONS]
    return [(total, left, right) for total, left, right in named if {total, left, right} <= set(hooks)]


def wanted_hooks(hooks: Sequence[str], hook_names: Sequence[str]) -> list[str]:
    """Hook points to listen to for checking the blocks of which something is recorded."""
    blocks = dict.fromkeys(hook.split(".")[1] for hook in hooks if hook.startswith("blocks."))
    streams = {f"blocks.{block}.{name}" for block in blocks for names in ADDITIONS for name in names}
    return [name for name in hook_names if name in streams]


def check_additions(acts: Mapping[str, Tensor]) -> None:
    """Compare each sum with the hook point that should hold it.

    Raises:
        StoreError: If they differ: a hook edits the residual stream, or the machine is broken.
    """
    for total, left, right in additions(list(acts)):
        expected = acts[left] + acts[right]
        same = (acts[total] == expected) | (acts[total].isnan() & expected.isnan())
        if not bool(same.all()):
            where = torch.nonzero(~same)[0].tolist()
            raise StoreError(
                f"{total} must be {left} + {right} and differs at {where}: {float(acts[total][tuple(where)])!r} "
                f"against {float(expected[tuple(where)])!r}; remove hooks that edit, or check this machine"
            )


def refuse_overflow(given: Tensor, rounded: Tensor, what: str, *, command: str, where: str = "") -> None:
    """Raise StoreError if a finite value became infinite when it was rounded to another type.

    Args:
        what: The hook point, for the message.
        command: What to run with another `--dtype`.
        where: What else it needs then, with a space before it.
    """
    infinite = rounded.isinf()
    if not bool(infinite.any()) or not bool((infinite & given.isfinite()).any()):
        return
    largest = float(given[given.isfinite()].abs().max())
    wider = [str(dtype).removeprefix("torch.") for dtype, end in LARGEST.items() if largest <= end]
    raise StoreError(
        f"{what} reaches {largest:g} and {str(rounded.dtype).removeprefix('torch.')} ends at "
        f"{LARGEST[rounded.dtype]:g}; {command} with --dtype {' or '.join(wider)}{where}"
    )
