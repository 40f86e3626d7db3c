"""Whether this machine keeps the rules that exact results rest on; asked at first use, refused if not.

Checked: round to nearest with subnormals kept (a library compiled with fast-math may have switched that off),
conversion to float32 with ties to even, correctly rounded division, float64 matrix products that are exact
where they can be and within their bound elsewhere, and no setting that replaces them by emulation.
TF32 and reduced-precision settings do not matter: no float32 matrix product is ever made.
"""

from __future__ import annotations

import os
from fractions import Fraction
from functools import lru_cache
from operator import mul

import numpy as np
import torch
from torch import Tensor

from mdlm_interp.randomness import random_bits, uniforms
from oracle import products
from oracle.errors import UntrustedMachineError
from oracle.paths import fused_for
from oracle.rounding import BINARY64, round_ratio

EMULATION_VARIABLES = ("CUBLAS_EMULATE_DOUBLE_PRECISION", "CUBLAS_EMULATION_STRATEGY")
"""Settings under which cuBLAS may compute float64 products from fewer digits."""

_STREAM = "oracle:selftest"
_trusted: set[tuple[torch.device, bool]] = set()
_SMALLEST_NORMAL, _SUBNORMAL, _HALF, _ONE = 2.0**-1022, 2.0**-1074, 0.5, 1.0

SHARE = 1 << 15
"""Elements that torch gives to a thread at least: it shares out no operation on fewer."""


def require_trusted(device: torch.device, n_elements: int) -> None:
    """Run the self-test once for each device; a cheap part of it each time.

    Args:
        n_elements: Of the largest operand, see `require_workers`.
    Raises:
        UntrustedMachineError: If a rule is broken.
    """
    # Python's floats obey the same switches of this thread's processor as everything else.
    if not (_SMALLEST_NORMAL * _HALF > 0.0 and _SUBNORMAL * _ONE > 0.0):
        raise UntrustedMachineError(
            "this thread flushes subnormal numbers to zero; call torch.set_flush_denormal(False), or find the "
            "library compiled with -ffast-math that switched it on"
        )
    compiled = fused_for(device) is not None
    known = (device, compiled) in _trusted
    require_workers(device, n_elements if known else SHARE)
    if not known:
        failures = [] if (device, False) in _trusted else check(device)
        remedy = "run on another device"
        if compiled and not failures:
            from oracle.fused_check import disagreements, kept_in

            failures = [f"the compiled loop {name} differs from the plain path" for name in disagreements()]
            kept = kept_in()
            remedy = "set MDLM_INTERP_EXACT_PATH=plain"
            if kept is not None:
                remedy = f"delete {kept}/*.nb? if the sources were changed, or {remedy}"
        if failures:
            raise UntrustedMachineError(
                f"exact results cannot be trusted on {device}: {'; '.join(failures)}; {remedy}, and please report it"
            )
        _trusted.update({(device, False), (device, compiled)})


def require_workers(device: torch.device, n_elements: int) -> None:
    """Ask torch's worker threads too, where an operation on so many elements might be shared out to them.

    Each has its own switch, which it takes from the thread that starts it, and they start and end as the number
    of threads goes up and down. So no answer of theirs lasts.

    Raises:
        UntrustedMachineError: If one of them flushes subnormal numbers to zero.
    """
    if (
        device.type != "cpu" or n_elements <= SHARE // 2
    ):  # half of it, should a version of torch share out more
        return
    threads = torch.get_num_threads()
    if threads == 1:
        return
    # Multiples of 2^-149 are added exactly in any order; a thread that flushes adds nothing.
    if float(_subnormals(threads).sum()) != threads * 512 * 2.0**-149:
        raise UntrustedMachineError(
            "a worker thread of torch flushes subnormal numbers to zero: it was started while that was switched on, "
            "and switching it off no longer reaches it; call torch.set_num_threads(1), or start the program again "
            "without torch.set_flush_denormal(True)"
        )


@lru_cache(maxsize=4)
def _subnormals(threads: int) -> Tensor:
    """As many elements as go to so many threads, 512 of each thread's the smallest positive float32, the rest 0."""
    bits = torch.zeros(threads, 512, SHARE // 512, dtype=torch.int32, device="cpu")
    bits[..., 0] = 1
    return bits.view(-1).view(torch.float32)


def check(device: torch.device) -> list[str]:
    """What is wrong on a device; empty if nothing is."""
    if device.type not in ("cpu", "cuda"):
        return [f"{device.type} has no float64 arithmetic that was examined"]
    if device.type == "cuda":
        set_ones = [name for name in EMULATION_VARIABLES if os.environ.get(name, "0") not in ("", "0")]
        if set_ones:
            return [f"the environment variable {set_ones[0]} lets float64 products be emulated; unset it"]
    failures = []
    for what, test in (
        ("rounding is not to nearest with ties to even and subnormals kept", _rounding_is_ieee),
        ("float64 division is not correctly rounded", _division_is_correct),
        ("a float64 matrix product of integers is not exact", _integer_products_are_exact),
        ("a float64 matrix product is not within its error bound", _products_are_within_bound),
    ):
        if not test(device):
            failures.append(what)
    return failures


def _rounding_is_ieee(device: torch.device) -> bool:
    # Long enough that every vector lane and worker thread takes part.
    def same(given: Tensor, expected: float) -> bool:
        return bool((given == expected).all())

    n = SHARE * max(4, torch.get_num_threads())
    ones = torch.ones(n, dtype=torch.float64, device=device)
    singles = ones.float()
    return (
        same(singles * 2.0**-126 * 0.5, 2.0**-127)
        and same((ones * (3 * 2.0**-150)).float(), 2.0**-148)
        and same((singles * 2.0**-149).double(), 2.0**-149)
        and same((ones * (1 + 2.0**-24)).float(), 1.0)
        and same((ones * (1 + 3 * 2.0**-24)).float(), 1 + 2.0**-22)
        and same(ones + 2.0**-53, 1.0)
        and same(ones + 3 * 2.0**-53, 1 + 2.0**-51)
        and same(ones * 2.0**-1022 * 0.5, 2.0**-1023)
        and same((-ones * 2.0**-200).float() + 0.0, 0.0)
    )


def _division_is_correct(device: torch.device) -> bool:
    draws = uniforms(0, _STREAM, 0, 512) + 0.5
    a, b = draws[:256].tolist(), draws[256:].tolist()
    tensors = (torch.tensor(v, dtype=torch.float64, device=device) for v in (a, b))
    found = torch.div(*tensors).tolist()
    exact = [Fraction(x) / Fraction(y) for x, y in zip(a, b, strict=True)]
    return found == [round_ratio(q.numerator, q.denominator, BINARY64) for q in exact]


def _wide_integers(index: int, shape: tuple[int, int], bits: int) -> Tensor:
    """Integers of up to so many bits, of all sizes and both signs."""
    words = random_bits(0, _STREAM, index, shape[0] * shape[1])
    sizes = (words & np.uint64(63)) % np.uint64(bits) + np.uint64(64 - bits)
    values = ((words >> np.uint64(8)) << np.uint64(8) >> sizes).astype(np.int64)
    return torch.from_numpy(np.where(words & np.uint64(64), values, -values).reshape(shape))


def _integer_products_are_exact(device: torch.device) -> bool:
    # 24 + 24 bits and 32 terms: every partial sum is below 2^53, so any order of additions is exact.
    for index, (rows, cols) in enumerate(((1, 64), (3, 17), (130, 65)), start=1):
        a, b = _wide_integers(2 * index, (rows, 32), 24), _wide_integers(2 * index + 1, (cols, 32), 24)
        expected = (a[:, None] * b[None]).sum(-1)
        found = a.double().to(device) @ b.double().to(device).T
        if not torch.equal(found.to(torch.int64).cpu(), expected):
            return False
    return True


def _products_are_within_bound(device: torch.device) -> bool:
    n = 1500
    a, b = (
        torch.from_numpy(uniforms(0, _STREAM, index, 8 * n)).float().reshape(8, n) - 0.5 for index in (8, 9)
    )
    rows, cols = (products.as_rows(x.to(device), "self-test") for x in (a, b))
    found, unit = products.raw_product(rows, cols, products.Workspace(device))
    bound = (rows.norms[0, :, None] * cols.norms[0, None, :] * unit).cpu().tolist()
    # Multiples of 2^-25 as integers.
    whole = [[[int(value * 2.0**25) for value in row] for row in x.tolist()] for x in (a, b)]
    for i, row in enumerate(whole[0]):
        for j, column in enumerate(whole[1]):
            exact = Fraction(sum(map(mul, row, column)), 1 << 50)
            if abs(Fraction(float(found[0, i, j])) - exact) > Fraction(bound[i][j]):
                return False
    return True
