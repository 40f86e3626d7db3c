"""Any sampler of `mdlm_interp.decoding`, drawn exactly: the same tokens on every machine, thread count and batch.

    trajectory = exact_trajectory(Oracle(model), start, Sampler(schedule=Fixed(per_step=2), order="margin"), seed=1)

`ExactDraws` takes the place of the float64 arithmetic that draws by default:
1. weights are SPEC's integer counts (section 6), so restricting them (top-k, top-p) and adding them up is exact;
2. a token is picked by a 64-bit word against their exact sum;
3. confidence and margin are quotients of such integers, each rounded once to float64;
4. the entropy follows a fixed recipe of individually rounded operations and an exact integer sum, below;
5. the noise level that a time-conditioned model reads is SPEC's, correctly rounded.

Exact are then the states, reveal steps, confidences and entropies of a trajectory, and what orders, thresholds and
remasking decide by them. Not exact: the time t of first hitting (a power) and the alternatives' probabilities, which
are float64 records that nothing is decided by.
"""

# Axes: batch, pos, row (one position of one sequence), vocab

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdlm_interp.decoding import Intervention, Record, Sampler, Seen, Trajectory, sample
from mdlm_interp.decoding.draws import Words
from mdlm_interp.errors import ConfigError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float, Float32, Float64, Int64
from oracle.oracle import Oracle
from oracle.recipes import RINT
from oracle.sampling import counts
from oracle.sampling import draw as draw_count
from oracle.tables import sigma_of_masked

LN2 = float.fromhex("0x1.62e42fefa39efp-1")
SQRT2 = float.fromhex("0x1.6a09e667f3bcdp+0")
LOG_TERMS = 13
"""Terms of 2 artanh(s) for |s| <= 0.172: the first one left out is below 2^-68."""
ENTROPY_BITS = 50
"""An entropy's terms are counted in units of 2^-50 when they are summed."""


class ExactDraws:
    """A `mdlm_interp.decoding.DrawArithmetic` in integers; see the module."""

    def weights(self, logits: Float[Tensor, "row vocab"], temperature: float) -> Int64[Tensor, "row vocab"]:
        """Counts in units that make the largest of a row 2^42.

        Raises:
            ExactError: If a logit is not a finite float32, or the temperature not positive and finite.
        """
        return counts(logits, None, temperature)

    def pick(self, weights: Int64[Tensor, "row vocab"], words: Words) -> Int64[Tensor, " row"]:
        """The first column whose cumulative count exceeds floor(word * total / 2^64)."""
        return draw_count(weights, words.tolist())

    def entropy(self, weights: Int64[Tensor, "row vocab"]) -> Float64[Tensor, " row"]:
        """Entropy in nats, within 2^-45, and 2^-51 a token, of that of the counts.

        With w a count and W their sum, both converted to float64: each term (w / W) * (LN(W) - LN(w)) is rounded
        to a multiple of 2^-50, ties to even; the terms are added exactly. LN is `natural_log`; w = 0 adds 0.
        """
        total = weights.sum(-1, keepdim=True)
        share = weights.double() / total.double().expand(weights.shape)
        surprise = natural_log(total.double()) - natural_log(weights.clamp(min=1).double())
        terms = (share * surprise * 2.0**ENTROPY_BITS + RINT) - RINT
        terms = terms.masked_fill(weights == 0, 0.0).to(torch.int64)
        return terms.sum(-1).double() * 2.0**-ENTROPY_BITS

    def sigma(self, n_masked: Int64[Tensor, " batch"], length: int) -> Float32[Tensor, " batch"]:
        """The float32 nearest to -ln(1 - 0.999 n_masked / length)."""
        return torch.tensor([sigma_of_masked(int(n), length) for n in n_masked], dtype=torch.float32)


def natural_log(x: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """LN of normal positive numbers by rounded operations only, in this order, within 2^-46 up to 2^62.

    1. x = 2^e m with m in [1, 2); if m > SQRT2 then m / 2 and e + 1, both exact.
    2. s = (m - 1) / (m + 1), z = s s, p = the Horner form of sum over k < 13 of (2 / (2 k + 1)) z^k.
    3. LN(x) = e LN2 + s p.
    """
    bits = x.contiguous().view(torch.int64)
    exponent = (bits >> 52) - 1023
    mantissa = ((bits & ((1 << 52) - 1)) | (1023 << 52)).view(torch.float64)
    high = mantissa > SQRT2
    mantissa = torch.where(high, mantissa * 0.5, mantissa)
    exponent = exponent + high.to(torch.int64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    p = torch.full_like(z, 2.0 / (2 * LOG_TERMS - 1))
    for k in reversed(range(LOG_TERMS - 1)):
        p = p * z
        p = p + 2.0 / (2 * k + 1)
    return exponent.double() * LN2 + s * p


def exact_trajectory(
    oracle: Oracle,
    start: Int64[Tensor, "batch pos"],
    sampler: Sampler | None = None,
    *,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    interventions: Sequence[Intervention] = (),
    record: Record | None = None,
    watch: Callable[[Seen], None] | None = None,
    progress: bool = False,
) -> Trajectory:
    """Fill the masks of `start` with any sampler, exactly; see `mdlm_interp.decoding.sample` for the arguments.

    With `Ancestral(steps)` the final tokens are those of `exact_sample`, SPEC's reverse process.

    Raises:
        ConfigError: If a time-conditioned model is to be told the schedule's time, whose noise level is a library's
            logarithm and no defined number.
        ExactError: If a logit is not finite.
        DataError, HookError: As `sample` does.
    """
    check_exact(sampler or Sampler(), time_conditioning=oracle.model.config.time_conditioning)
    return sample(
        oracle.model,
        start,
        sampler,
        seed=seed,
        indices=indices,
        arithmetic=ExactDraws(),
        interventions=interventions,
        record=record,
        watch=watch,
        progress=progress,
    )


def exact_parts(model: HookedMDLM, sampler: Sampler) -> tuple[HookedMDLM, ExactDraws]:
    """What `mdlm_interp.decoding.sample` needs to draw exactly: the network in exact arithmetic, and the draws.

    Raises:
        ConfigError: As `exact_trajectory` does.
        ExactError: If the weights are not float32.
    """
    check_exact(sampler, time_conditioning=model.config.time_conditioning)
    return Oracle(model).model, ExactDraws()


def check_exact(sampler: Sampler, *, time_conditioning: bool) -> None:
    """Raise ConfigError if a draw of this sampler would depend on a number that is not defined to the bit."""
    if time_conditioning and sampler.sigma == "time":
        raise ConfigError(
            "sampler.sigma must be 'share' for an exact draw from a time-conditioned model, got 'time'; its noise "
            "level is defined for shares of masks only"
        )
