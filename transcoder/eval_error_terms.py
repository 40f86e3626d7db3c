"""Whether the model comes back when what the transcoder misses is added to its reconstructions.

1. A pass of the model as it is gives its logits and the error term of each MLP (`error_terms.py`).
2. A second pass has every MLP replaced by its reconstruction, from features of that pass, plus the error term.
3. Its logits are compared with the first pass's: natively, and in the oracle's exact arithmetic.

What equality proves: the splice reads and writes where it should, in the right order, touches nothing else, and what
separates the replacement model from the model is the error terms and nothing more. It proves nothing about how good
the transcoder is: an untrained one has larger error terms and passes as well. Under the oracle every operation of
the model is defined to the bit, so there equality is no luck of kernels; the transcoder's own products are native
under both, and only have to give the same bits twice on this machine, for the same rows.
"""

# Axes: seq, pos, vocab

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdlm_interp.shapes import Float, Int64
from oracle import Oracle
from transcoder.replacement import ReplacementModel

NATIVE_BOUND = 1e-4
"""Largest difference of a native logit that rounding explains, as a share of the logits' root mean square.

Float32 rounding through 12 blocks is below a tenth of it. On a CPU both passes round alike and the difference is
zero; kernels that add in another order each time, as some on GPUs do, need the bound."""


@dataclass(frozen=True)
class ErrorTermCheck:
    """Logits with error terms added back against the model's own."""

    n_sequences: int
    n_logits: int
    native_differing: int
    """Logits whose bits differ natively."""
    native_difference: float
    """Largest difference natively, as a share of the logits' root mean square."""
    oracle_differing: int | None
    """Logits whose bits differ under the oracle; None where `undefined` says why."""
    without_difference: float
    """The same as `native_difference` without error terms: what there was to make up for."""
    undefined: str | None = None
    """Why the oracle was not asked."""

    @property
    def within_bound(self) -> bool:
        """Whether the native difference is one that rounding explains."""
        return self.native_difference <= NATIVE_BOUND

    @property
    def holds(self) -> bool:
        """Whether all that was looked at came back as it should."""
        return self.within_bound and not self.oracle_differing


@torch.no_grad()
def check_error_terms(
    replacement: ReplacementModel, input_ids: Int64[Tensor, "seq pos"], timesteps: Tensor
) -> ErrorTermCheck:
    """Add the error terms back, natively and under the oracle.

    Args:
        timesteps: sigma, as the model takes it.
    """
    model = replacement.model
    original = model(input_ids, timesteps)
    restored = replacement(input_ids, timesteps, error_terms=True)
    differing, reason = None, None
    if model.dtype == torch.float32:
        # The same weights and the same transcoder: nothing to check again.
        exact = ReplacementModel(Oracle(model).model, replacement.clt, check=False)
        differing = _differing(
            exact(input_ids, timesteps, error_terms=True), exact.model(input_ids, timesteps)
        )
    else:
        reason = f"exact arithmetic is defined for float32, the model is {model.dtype}"
    return ErrorTermCheck(
        n_sequences=len(input_ids),
        n_logits=original.numel(),
        native_differing=_differing(restored, original),
        native_difference=_difference(restored, original),
        oracle_differing=differing,
        without_difference=_difference(replacement(input_ids, timesteps), original),
        undefined=reason,
    )


def _differing(a: Float[Tensor, "seq pos vocab"], b: Float[Tensor, "seq pos vocab"]) -> int:
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return int((a.view(as_bits) != b.view(as_bits)).sum())


def _difference(a: Float[Tensor, "seq pos vocab"], b: Float[Tensor, "seq pos vocab"]) -> float:
    """Largest, as a share of the root mean square of b."""
    return float((a.double() - b.double()).abs().max() / b.double().square().mean().sqrt())
