"""Proof, before training, that a store's rows are what the model computes.

1. The weights must be those that the store names, by SHA-256.
2. Some sequences are run through the oracle, whose bits are defined by mathematics, and once natively here.
3. Each stored value must be the oracle's: to the bit, if the store was captured in exact arithmetic; else within
   `MARGIN` times the rounding error that native arithmetic shows here, plus that of a 16-bit type.

The proof that goes with the transcoder says what was compared, the largest difference, and hashes of both sides.
"""

# Axes: row, then the axes of one row; pos

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capture.forward import last_block_needed
from capture.reader import ActivationStore
from capture.recomputed import TYPE_BOUND, as_stored
from capture.schema import StoredType
from mdlm_interp.checkpoints import resolve_source, weights_sha256
from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.errors import MdlmError, StoreError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.randomness import permutation
from mdlm_interp.shapes import Int
from oracle import Oracle
from oracle.compare import ulp_distance

MARGIN = 16.0
"""How many times the largest native rounding error on these rows a stored value may be from the oracle's.

Other kernels, batch shapes and devices round elsewhere, by errors of the same size; wrong weights, noise or hooks
are thousands of times off.
"""
FLOOR = 2.0**-20
"""Difference that always passes, as a share of the hook's root mean square: native errors can be zero by luck."""


@dataclass(frozen=True)
class Sample:
    """A sequence with its recorded rows."""

    number: int
    first_row: int
    x_t: Int[Tensor, " pos"]
    t: float
    positions: Int[Tensor, " row"]
    """That the rows are of."""
    rows: Mapping[str, Tensor]
    """Activations [row ...] by hook point."""


def verified_targets(
    store: ActivationStore, hooks: Sequence[str], model: str | None, *, n_sequences: int, seed: int
) -> dict[str, Any]:
    """Recompute the rows of some sequences through the oracle, and say how far the stored ones are.

    Args:
        model: Where the weights are; none takes the store's own word.
    Raises:
        StoreError: If the weights are others, or a row is not the model's.
    """
    network = _network(store, model)
    numbers = sorted(permutation(seed, "clt:verify", 0, store.n_sequences)[:n_sequences].tolist())
    samples = [_sample(store, number, hooks) for number in numbers]
    exact = store.config.get("arithmetic", "native") == "exact"
    found = proof(network, samples, name=str(store.name), dtype=store.dtype, exact=exact)
    return {
        **found,
        "weights_sha256": store.provenance["weights_sha256"],
        "n_blocks": network.config.n_blocks,
    }


def proof(
    network: HookedMDLM,
    samples: Sequence[Sample],
    *,
    name: str,
    dtype: StoredType = "float32",
    exact: bool = False,
) -> dict[str, Any]:
    """How far rows are from what the oracle computes.

    Args:
        name: Whose rows they are, for errors.
        dtype: Type that they were stored in.
        exact: Whether they were computed in exact arithmetic.
    Raises:
        StoreError: If one is further away than rounding explains.
    """
    oracle = Oracle(network)
    worst: dict[str, Any] = {"share_of_allowed": -1.0}
    sums = {"stored": hashlib.sha256(), "oracle": hashlib.sha256()}
    n_different, largest = 0, {"difference": 0.0, "ulp": 0}
    for sample in samples:
        by_oracle, native = (_recomputed(forward, sample) for forward in (oracle, network))
        for hook, stored in sample.rows.items():
            expected = as_stored(by_oracle[hook], dtype)
            allowed = torch.zeros_like(expected, dtype=torch.float64)
            if not exact:
                allowed = _allowed(by_oracle[hook], native[hook], dtype)
            found = _compared(f"{name}: {hook}", sample.first_row, stored, expected, allowed)
            n_different += found.pop("n_different")
            largest["difference"] = max(largest["difference"], float((stored - expected).abs().max()))
            largest["ulp"] = max(largest["ulp"], int(ulp_distance(stored, expected).max()))
            worst = max(worst, {"hook": hook, **found}, key=lambda each: float(each["share_of_allowed"]))
            sums["stored"].update(stored.numpy().tobytes())
            sums["oracle"].update(expected.numpy().tobytes())
    return {
        "sequences": [sample.number for sample in samples],
        "rows": sum(len(sample.positions) for sample in samples),
        "hooks": len(samples[0].rows),
        "arithmetic": "exact" if exact else "native",
        "values_that_differ": n_different,
        "largest_difference": largest["difference"],
        "largest_ulp": largest["ulp"],
        "worst": worst,
        "stored_sha256": sums["stored"].hexdigest(),
        "oracle_sha256": sums["oracle"].hexdigest(),
    }


def _sample(store: ActivationStore, number: int, hooks: Sequence[str]) -> Sample:
    rows, x_t = store.sequence_rows(number), store.tokens()[1][number]
    return Sample(
        number=number,
        first_row=rows.start,
        x_t=x_t[x_t >= 0],  # the end of a shorter one is filled with -1
        t=float(store.times()[number]),
        positions=store.coords(rows, ["pos"])["pos"],
        rows=store.read(rows, list(hooks)),
    )


def _network(store: ActivationStore, model: str | None) -> HookedMDLM:
    named = model if model is not None else str(store.config.get("model", "bundled"))
    try:
        directory = resolve_source(named)
    except MdlmError as error:
        raise StoreError(
            f"the rows cannot be recomputed: {error}; name the model with --model, or train without this proof with "
            f"--train.verify-sequences none"
        ) from None
    found, recorded = weights_sha256(directory), store.provenance["weights_sha256"]
    if found != recorded:
        raise StoreError(
            f"the store was captured from weights with sha256 {recorded[:12]}, those of {named} have {found[:12]}; "
            f"name the model of the store with --model"
        )
    return HookedMDLM.from_pretrained(directory)


@torch.no_grad()
def _recomputed(forward: Oracle | HookedMDLM, sample: Sample) -> dict[str, Tensor]:
    """A sequence's recorded rows as a forward pass has them, float32."""
    hooks = list(sample.rows)
    sigma = LogLinearSchedule().sigma(torch.tensor([sample.t], dtype=torch.float64))
    _, cache = forward.run_with_cache(
        sample.x_t.long()[None].to(_device_of(forward)),
        hooks,
        timesteps=sigma.to(_device_of(forward)),
        stop_at_block=last_block_needed(hooks),
        device="cpu",
    )
    return {hook: cache[hook][0][sample.positions.long()] for hook in hooks}


def _device_of(forward: Oracle | HookedMDLM) -> torch.device:
    """Where a forward pass runs."""
    model = forward.model if isinstance(forward, Oracle) else forward
    return next(model.parameters()).device


def _allowed(exact: Tensor, native: Tensor, dtype: StoredType) -> Tensor:
    """How far each value of native arithmetic may be from the oracle's."""
    exact = exact.double()
    rounding = float((native.double() - exact).abs().max())
    rms = float(exact.square().mean().sqrt())
    return (MARGIN * rounding + FLOOR * rms) + TYPE_BOUND[dtype] * exact.abs()


def _compared(name: str, first_row: int, stored: Tensor, expected: Tensor, allowed: Tensor) -> dict[str, Any]:
    """The value that is furthest from the oracle's, of what it may be.

    Raises:
        StoreError: If that is further.
    """
    difference = (stored.double() - expected.double()).abs()
    # A NaN is not within anything.
    share = torch.where(difference == 0, 0.0, difference / allowed).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )
    row, *rest = (int(index) for index in torch.unravel_index(share.argmax(), share.shape))
    place = (row, *rest)
    if not float(share[place]) <= 1.0:
        raise StoreError(
            f"{name} of row {first_row + row} at {rest} is {float(stored[place])!r}, the oracle computes "
            f"{float(expected[place])!r}, and rounding explains a difference of {float(allowed[place]):.1e}; capture "
            f"again, or run mdlm-interp capture verify to see what is wrong"
        )
    return {
        "n_different": int((difference > 0).sum()),
        "row": first_row + row,
        "at": rest,
        "stored": float(stored[place]),
        "oracle": float(expected[place]),
        "difference": float(difference[place]),
        "share_of_allowed": float(share[place]),
    }
