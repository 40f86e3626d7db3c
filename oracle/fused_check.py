"""Compares the compiled loops with the plain path, bit for bit, on a small input.

Asked once in each process: it covers this machine's compiler. Compiled code that was kept on disk is made again if
it comes from other sources than today's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mdlm_interp.randomness import random_bits
from oracle import elementwise, fused, kernels, product_kernels, products

MODULES = (kernels, product_kernels)


def renew() -> None:
    """Compile again what numba kept on disk from other sources; call before the first use of a loop."""
    for module in MODULES:
        if module.compiled_from() != kernels.SOURCES:
            for loop in vars(module).values():
                if hasattr(loop, "recompile"):
                    loop.recompile()


def kept_in() -> str | None:
    """The directory of compiled loops on disk; None if they are not kept."""
    directory: str | None = kernels.compiled_from.stats.cache_path
    return directory


def disagreements() -> list[str]:
    """Names of the loops whose bits differ from the plain path's on a small input; there should be none."""
    renew()
    n = 96
    words = random_bits(0, "oracle:fused", 0, 4 * 8 * n)
    exponents = ((words & np.uint64(15)).astype(np.int64) - 10).astype(np.float64)
    fractions = (words >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0
    drawn = torch.from_numpy((fractions * 2.0**exponents).astype(np.float32)).reshape(4, 1, 8, n)
    x, y, z = drawn[0], drawn[1], drawn[2]
    shift, scale = drawn[3, :, :1], drawn[3, :, 1:2]
    table, heads = drawn[3, 0, :, : n // 4], x.reshape(1, 8, 2, n // 2)
    found = []
    for name, arguments in (
        ("gelu_tanh", (x,)),
        ("silu", (x,)),
        ("softmax", (x,)),
        ("layer_norm", (x, shift.reshape(n), None)),
        ("layer_norm", (x, shift.reshape(n), y[..., :1])),
        ("add", (x, y)),
        ("mul", (x, scale)),
        ("modulate", (x, shift, scale)),
        ("rotate", (heads, table, table.flip(0))),
    ):
        mine, plain = getattr(fused, name)(*arguments), getattr(elementwise, name)(*arguments)
        pairs = zip(mine, plain, strict=True) if isinstance(mine, tuple) else [(mine, plain)]
        if not all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs):
            found.append(name)
    return found + _product_disagreements(x, y, z)


def _product_disagreements(x: Tensor, y: Tensor, z: Tensor) -> list[str]:
    """The same for matrix products and what follows them."""
    rows, cols = products.as_rows(x, "check"), products.as_rows(torch.cat((y, z), 1), "check")
    bias, found = y[0, :, 0].repeat(2).double(), []
    for factor in (1.0, 0.7):
        # Bounds that leave everything, a part, and nothing undecided.
        for width in (1.0, 2.0**24, 0.0):
            product = torch.bmm(rows.values, cols.values.mT).add_(bias).mul_(factor)
            bound = rows.norms * (width * 2.0**-46)
            out = x.new_empty(product.shape)
            fused.certify(
                product,
                rows.values,
                cols.values,
                bound,
                cols.norms,
                bias.abs() * 0.0,
                bias,
                factor,
                rows.norms,
                out,
            )
            plain = product.float()
            if width:
                plain = _all_repaired(rows, cols, bias, factor)
            if not torch.equal(out, plain + 0.0):
                found.append(f"certify with factor {factor}")
        product = torch.bmm(rows.values, cols.values.mT).mul_(factor)
        fused.attend(product, rows.values, cols.values, rows.norms * 2.0**-46, cols.norms, factor, rows.norms)
        if not torch.equal(product, elementwise.softmax(_all_repaired(rows, cols, None, factor)).double()):
            found.append(f"attend with factor {factor}")
    return found


def _all_repaired(rows: products.Rows, cols: products.Rows, bias: Tensor | None, factor: float) -> Tensor:
    """The product with every output computed by the plain repair."""
    shape = rows.values.shape[0], rows.values.shape[1], cols.values.shape[1]
    group, row, col = torch.ones(shape, dtype=torch.bool, device="cpu").nonzero().unbind(1)
    return products.dot_pairs(rows, cols, group, row, col, bias, factor).reshape(shape)
