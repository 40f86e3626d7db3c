"""A model run in exact arithmetic: the same logits and activations, to the bit, wherever it runs."""

# Axes: batch, pos, vocab

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mdlm_interp.hooks import ActivationCache, HookFunction, HookPoint, NameSelection, select_names
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float32, Int64
from oracle.arithmetic import ExactArithmetic
from oracle.errors import ExactError
from oracle.fingerprint import LOGITS, Fingerprint, combine, tensor_digest, weights_digest
from oracle.guard import require_finite
from oracle.weights import DEFAULT_BUDGET_BYTES


class Oracle:
    """The exact forward pass of a model, sharing its weights.

    Args:
        model: Float32, on CPU or CUDA. Its parameters are used where they are, so training or moving the model
            changes what the oracle computes; its hooks and its arithmetic are not touched.
        cache_bytes: Budget for float64 copies of weights, which short inputs gain from; 0 keeps none.
    Raises:
        ExactError: If the weights are of another type.

    >>> from mdlm_interp import HookedMDLM, MDLMConfig
    >>> model = HookedMDLM(MDLMConfig(vocab_size=5, hidden_dim=8, cond_dim=4, n_blocks=1, n_heads=2))
    >>> oracle = Oracle(model)
    >>> logits, cache = oracle.run_with_cache(torch.tensor([[0, 1, 4]]), "blocks.0.hook_mlp_out")
    >>> torch.equal(logits, oracle.logits(torch.tensor([[0, 1, 4]])))
    True
    """

    def __init__(self, model: HookedMDLM, *, cache_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        if not isinstance(model, HookedMDLM):
            raise ExactError(
                f"Oracle needs a HookedMDLM, got {type(model).__name__}; if it is compiled, pass the original"
            )
        others = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()} - {"float32"})
        if others:
            raise ExactError(
                f"exact arithmetic is defined for float32 weights, the model has {', '.join(others)}; "
                f"load it with dtype=torch.float32"
            )
        with torch.device("meta"):
            self._model = HookedMDLM(model.config, ExactArithmetic(cache_bytes))
        for mine, theirs in zip(self._model.modules(), model.modules(), strict=True):
            # The very dictionaries: a parameter that is replaced in one is replaced in the other.
            mine._parameters, mine._buffers = theirs._parameters, theirs._buffers
        self._model.eval()

    @property
    def model(self) -> HookedMDLM:
        """The network in exact arithmetic, for anything that takes a HookedMDLM; call it under torch.no_grad()."""
        return self._model

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Every hook point, in execution order."""
        return self._model.hook_names

    @torch.no_grad()
    def logits(
        self, input_ids: Int64[Tensor, "batch pos"], timesteps: Tensor | None = None
    ) -> Float32[Tensor, "batch pos vocab"]:
        """Raw logits; see `HookedMDLM.forward`.

        Raises:
            ExactError: If a value is not finite, also one that a hook put there.
        """
        logits: Tensor = self._model(input_ids, timesteps)
        require_finite(logits, "hook_logits: what the hooks left")  # no operation reads it and would refuse
        return logits

    @torch.no_grad()
    def run_with_cache(
        self,
        input_ids: Int64[Tensor, "batch pos"],
        names: NameSelection = None,
        *,
        timesteps: Tensor | None = None,
        stop_at_block: int | None = None,
        clone: bool = True,
        device: str | torch.device | None = None,
    ) -> tuple[Tensor, ActivationCache]:
        """Logits and chosen activations; see `HookedMDLM.run_with_cache`."""
        output, cache = self._model.run_with_cache(
            input_ids, names, timesteps=timesteps, stop_at_block=stop_at_block, clone=clone, device=device
        )
        require_finite(output, "what the hooks left of the output")
        return output, cache

    def hooks(
        self, functions: Mapping[str, HookFunction | Sequence[HookFunction]], *, read_only: bool = False
    ) -> AbstractContextManager[None]:
        """Run functions at hook points of the exact pass; see `HookedMDLM.hooks`."""
        return self._model.hooks(functions, read_only=read_only)

    def fingerprint(
        self,
        input_ids: Int64[Tensor, "batch pos"],
        names: NameSelection = None,
        *,
        timesteps: Tensor | None = None,
    ) -> str:
        """SHA-256 over name, type, shape and bytes of the chosen hook points and the logits."""
        return self.digests(input_ids, names, timesteps=timesteps).sha256

    @torch.no_grad()
    def digests(
        self,
        input_ids: Int64[Tensor, "batch pos"],
        names: NameSelection = None,
        *,
        timesteps: Tensor | None = None,
        look: Callable[[str, Tensor, str], None] | None = None,
    ) -> Fingerprint:
        """The fingerprint with the digest of each hook point; no activation is kept.

        Args:
            look: Called with each name, tensor and digest as they come.
        """
        digests: dict[str, str] = {}

        def take(tensor: Tensor, hook: HookPoint) -> None:
            digests[hook.name] = tensor_digest(hook.name, tensor)
            if look is not None:
                look(hook.name, tensor, digests[hook.name])

        chosen = select_names(names, self.hook_names)
        with self.hooks(dict.fromkeys(chosen, take), read_only=True):
            logits = self.logits(input_ids, timesteps)
        take(logits, HookPoint(LOGITS))
        return Fingerprint(combine(digests), digests)

    def weights_digest(self) -> str:
        """One hash for all weights, whatever file they came from."""
        return weights_digest(self._model.state_dict())
