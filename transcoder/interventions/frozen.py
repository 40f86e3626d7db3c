"""Attention patterns and LayerNorm scales held at what they were in another run.

    _, run = model.run_with_cache(x_t, FROZEN)
    with frozen(model, run):
        ...

With both held, and the MLPs replaced or left alone, what one block adds reaches the later ones by linear maps only.
"""

# Axes: batch, pos

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.hooks import HookFunction, HookPoint, select_names
from mdlm_interp.model import HookedMDLM
from transcoder.interventions.plan import unless_same_scale

PATTERNS = ("blocks.*.attn.hook_pattern",)
SCALES = ("blocks.*.ln1.hook_scale", "blocks.*.ln2.hook_scale", "ln_final.hook_scale")
FROZEN = (*PATTERNS, *SCALES)
"""What a run has to keep for `frozen`."""


def frozen_hooks(
    model: HookedMDLM, run: Mapping[str, Tensor], *, patterns: bool = True, scales: bool = True
) -> dict[str, HookFunction]:
    """Functions that put a run's patterns and scales in place of the pass's own.

    Args:
        run: Activations with one sequence for all, or as many as the pass has.
    Raises:
        DataError: If it lacks one, or has another shape than the pass.
    """
    chosen = [*(PATTERNS if patterns else ()), *(SCALES if scales else ())]
    names = select_names(chosen, model.hook_names) if chosen else []
    for name in names:
        if name not in run:
            raise DataError(
                f"the run to freeze kept no {name!r}; keep it with run_with_cache(x_t, interventions.FROZEN)"
            )
    kept = {name: run[name].detach() for name in names}

    def replay(tensor: Tensor, hook: HookPoint) -> Tensor | None:
        held = kept[hook.name].to(tensor)
        if held.shape[1:] != tensor.shape[1:] or held.shape[0] not in (1, tensor.shape[0]):
            raise DataError(
                f"the frozen {hook.name} has shape {list(held.shape)}, this pass {list(tensor.shape)}; "
                f"freeze a run on sequences of the same length"
            )
        return unless_same_scale(tensor, held.expand_as(tensor), hook)

    return dict.fromkeys(names, replay)


@contextmanager
def frozen(
    model: HookedMDLM, run: Mapping[str, Tensor], *, patterns: bool = True, scales: bool = True
) -> Iterator[None]:
    """Hold a run's patterns and LayerNorm scales for the length of a `with` block; see `frozen_hooks`."""
    functions = frozen_hooks(model, run, patterns=patterns, scales=scales)
    with ExitStack() as stack:
        if functions:
            stack.enter_context(model.hooks(functions))
        yield
