"""The model as samplers see it: tokens and sigma in, logits out; with guidance, cache and hooks in one place.

A denoiser is any callable `(input_ids, sigma) -> logits [batch pos vocab]`: a HookedMDLM, the oracle's model, an
exact posterior. `as_denoiser` makes one of a transformers model. Nothing here applies SUBS: samplers draw at the
positions that they may write and never at others, and take the mask out of what can be drawn.
"""

# Axes: batch, pos, vocab

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mdlm_interp.decoding.draws import DrawArithmetic
from mdlm_interp.decoding.interventions import Intervention
from mdlm_interp.diffusion import LogLinearSchedule, subs_log_probs
from mdlm_interp.errors import DataError, HookError
from mdlm_interp.hooks import HookPoint, select_names
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Bool, Float, Float64, Int64

Denoiser = Callable[[Tensor, Tensor], Tensor]


def predict(
    model: HookedMDLM, x_t: Int64[torch.Tensor, "batch pos"]
) -> Float64[torch.Tensor, "batch pos vocab"]:
    """SUBS probabilities of the clean tokens in float64, at the time that the share of masks suggests."""
    mask_id = model.config.mask_id
    share = (x_t == mask_id).double().mean(1)
    sigma = LogLinearSchedule().sigma(share).float().to(model.device)
    with torch.inference_mode():
        logits = model(x_t.to(model.device), sigma)
    return subs_log_probs(logits.cpu().double(), x_t.cpu(), mask_id).exp()


def as_denoiser(model: Any) -> Denoiser:
    """A denoiser of a HookedMDLM, of an exported or other transformers model, or of a callable that is one."""
    if isinstance(model, HookedMDLM) or not (isinstance(model, nn.Module) and hasattr(model, "config")):
        if not callable(model):
            raise DataError(f"a model must be callable with tokens and sigma, got {type(model).__name__}")
        denoiser: Denoiser = model
        return denoiser
    takes_sigma = "timesteps" in signature(model.forward).parameters

    def logits(input_ids: Tensor, sigma: Tensor) -> Tensor:
        given = {"timesteps": sigma} if takes_sigma else {}
        output = model(input_ids=input_ids, **given)
        found: Tensor = output if isinstance(output, Tensor) else output.logits
        return found

    return logits


def mask_id_of(model: Any, mask_id: int | None) -> int:
    """The mask token's id: as given, or the model's.

    Raises:
        DataError: If neither says it.
    """
    found = mask_id
    if found is None:
        config = getattr(model, "config", None)
        found = getattr(config, "mask_id", None)
        if found is None and getattr(config, "model_type", None) == "mdlm":
            found = config.vocab_size - 1 if config is not None else None
    if found is None:
        raise DataError(f"{type(model).__name__} does not say which token is the mask; pass mask_id")
    return int(found)


class Passes:
    """Runs the denoiser step by step.

    1. Logits of a state that is that of the step before, at the same sigma, are not computed again (what MDLM calls
       ddpm_cache), unless a hook runs in either step.
    2. With guidance w the logits are un + (w + 1) (cond - un), where un has masks in place of the given tokens.
    3. Interventions act in the steps that they name, on both passes of guidance; what is recorded is the first.

    Args:
        given: Positions that were given, which guidance hides.
        record: Hook names or globs to keep, or none.
    """

    def __init__(
        self,
        model: Any,
        given: Bool[Tensor, "batch pos"],
        *,
        mask_id: int,
        arithmetic: DrawArithmetic,
        guidance: float = 0.0,
        cache: bool = True,
        interventions: Sequence[Intervention] = (),
        record: Sequence[str] = (),
    ) -> None:
        self._denoiser, self._model, self._given = as_denoiser(model), model, given
        self._mask_id, self._arithmetic, self._guidance, self._cache = mask_id, arithmetic, guidance, cache
        self._interventions = interventions
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        self.device = torch.device(getattr(model, "device", "cpu"))
        self.n_forwards = 0
        self._names: list[str] = []
        if interventions or record:
            known = getattr(model, "hook_names", None)
            if known is None:
                raise HookError(f"{type(model).__name__} has no hook points; load it as a HookedMDLM")
            for one in interventions:
                one.check(select_names(one.hook, known))
            self._names = select_names(list(record), known) if record else []

    @torch.no_grad()
    def logits(
        self,
        x: Int64[Tensor, "batch pos"],
        step: int,
        time: Float64[Tensor, " batch"] | None = None,
        record: bool = False,
    ) -> tuple[Float[Tensor, "batch pos vocab"], dict[str, Tensor]]:
        """Logits on the model's device, and the recorded activations of this step on the CPU.

        Args:
            time: t of each sequence, if sigma is to follow it and not the share of masks.
        """
        acting = [one for one in self._interventions if one.acts(step)]
        kept: dict[str, Tensor] = {}
        watched = bool(acting) or (record and bool(self._names))
        sigma = self._sigma(x, time)
        if self._last is not None and not watched:
            before, its_sigma, logits = self._last
            if torch.equal(before, x) and torch.equal(its_sigma, sigma):
                return logits, kept
        with self._hooked(acting, x, kept if record else None):
            logits = self._run(x, sigma)
        if self._guidance:
            hidden = x.masked_fill(self._given, self._mask_id)
            with self._hooked(acting, hidden, None):
                other = self._run(hidden, self._sigma(hidden, time))
            logits = other + (self._guidance + 1.0) * (logits - other)
        self._last = (x.clone(), sigma, logits) if self._cache and not watched else None
        return logits, kept

    def _sigma(self, x: Tensor, time: Tensor | None) -> Tensor:
        if time is not None:
            return LogLinearSchedule().sigma(time).float()
        return self._arithmetic.sigma((x == self._mask_id).sum(1), x.shape[1])

    def _run(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.n_forwards += 1
        logits = self._denoiser(x.to(self.device), sigma.to(self.device))
        if logits.shape[:2] != x.shape:
            raise DataError(
                f"the model returned logits of shape {list(logits.shape)} for tokens {list(x.shape)}; "
                f"a denoiser returns [batch pos vocab]"
            )
        return logits

    @contextmanager
    def _hooked(
        self, acting: Sequence[Intervention], x: Tensor, kept: dict[str, Tensor] | None
    ) -> Iterator[None]:
        """Interventions in their order, then what is recorded as they leave it."""

        def keep(tensor: Tensor, hook: HookPoint) -> None:
            if kept is not None:
                kept[hook.name] = tensor.detach().to("cpu", copy=True)

        with ExitStack() as stack:
            for one in acting:
                stack.enter_context(self._model.hooks({one.hook: one.bound(x)}))
            if kept is not None and self._names:
                functions: Mapping[str, Any] = dict.fromkeys(self._names, keep)
                stack.enter_context(self._model.hooks(functions, read_only=True))
            yield
