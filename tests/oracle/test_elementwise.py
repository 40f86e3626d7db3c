"""The recipes that are no matrix product: against the witness, against mpmath, and both paths against each other."""

from __future__ import annotations

from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from torch.nn import functional

from oracle import elementwise, ops, plain_path, witness, witness_blocks
from oracle.recipes import EXP_COEFFICIENTS, GELU_CUBE, GELU_LINE, LOG2E
from tests.oracle import exact_reference as reference
from tests.oracle.exact_reference import same_bits

EDGES = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1.1754944e-38,
    3.4028235e38,
    -3.4028235e38,
    88.7,
    -88.7,
    -103.97,
    -104.1,
    -745.0,
]


def sweep(seed: int = 0) -> torch.Tensor:
    """Float32 of all magnitudes and signs, dense where the functions bend, odd in number."""
    spread = reference.draw(seed, (4000,), -148, 126)
    dense = reference.draw(seed + 1, (6001,), -3, 3)
    return torch.cat((spread, dense, torch.linspace(-110, 12, 5000), torch.tensor(EDGES)))


def from_witness(function, *tensors):
    return torch.from_numpy(function(*(tensor.numpy() for tensor in tensors)))


# Exact: the same bits as the witness, element for element


@pytest.mark.parametrize("name", ["gelu_tanh", "silu"])
def test_activations_have_the_bits_of_the_witness(name, path):
    x = sweep()
    assert same_bits(getattr(ops, name)(x), from_witness(getattr(witness, name), x))


@pytest.mark.parametrize("cols", [1, 2, 7, 129, 1000])
def test_softmax_has_the_bits_of_the_witness(cols, path):
    for low, high in ((-3, 2), (-20, 6), (0, 60)):
        scores = reference.draw(cols, (5, cols), low, high)
        assert same_bits(ops.softmax(scores), from_witness(witness.softmax, scores))


def test_softmax_of_long_rows_has_the_bits_of_the_witness(path):
    scores = reference.draw(9, (2, 5000), -6, -2)
    assert same_bits(ops.softmax(scores), from_witness(witness.softmax, scores))


def test_totals_of_long_rows_are_rounded_once():
    """Beyond 2048 counts of 2^42 a float64 sum rounds as it goes. In softmax this moves the last bits of float64,
    which float32 hides: it is looked for where it is made."""
    counts = torch.from_numpy(np.random.default_rng(1).integers(2**42 - 2**20, 2**42 + 1, (50, 5000)))
    exact = [float(sum(row)) for row in counts.tolist()]
    assert elementwise.exact_total(counts.double())[:, 0].tolist() == exact
    assert counts.double().sum(1).tolist() != exact
    few = counts[:, :2048]
    assert elementwise.exact_total(few.double())[:, 0].tolist() == [float(sum(row)) for row in few.tolist()]


def test_compiled_totals_of_long_rows_are_rounded_once():
    pytest.importorskip("numba", reason="the compiled loops need numba")
    from oracle import kernels

    scores, work = reference.draw(9, (50, 5000), -6, -2).numpy(), np.empty(5000)
    found, exact, rounded = [], [], []
    for row in scores:
        found.append(kernels.numerators(row, work)[1])
        counts = np.rint(work)
        exact.append(1.0 / (float(sum(map(int, counts))) * 2.0**-42))
        rounded.append(1.0 / (float(np.add.accumulate(counts)[-1]) * 2.0**-42))
    assert found == exact
    assert rounded != exact
    values = reference.integers(2, (20, 5000), 23).double().numpy()
    means = [kernels.mean(row, np.abs(row).max().view(np.int64)) for row in values]
    assert means == [float(sum(map(int, row))) * (1.0 / 5000) for row in values]


@pytest.mark.parametrize("d", [1, 2, 33, 768])
@pytest.mark.parametrize("kind", ["normal", "large mean", "outliers", "tiny", "huge", "constant", "zeros"])
def test_layer_norm_has_the_bits_of_the_witness(kind, d, path):
    x, weight = reference.draw(d, (3, 2, d)), 1 + 0.3 * reference.draw(d + 1, (d,))
    if kind == "large mean":
        x += 3000.0
    elif kind == "outliers":
        x[..., ::97] *= 5000.0
    elif kind == "tiny":
        x *= 2.0**-147
    elif kind == "huge":
        x *= 2.0**60
    elif kind == "constant":
        x[:] = 0.7
    elif kind == "zeros":
        x[:] = -0.0
    found, scale = ops.layer_norm(x, weight)
    expected, expected_scale = witness.layer_norm(x.numpy(), weight.numpy())
    assert same_bits(scale, torch.from_numpy(expected_scale))
    assert same_bits(found, torch.from_numpy(expected))
    again, _ = ops.layer_norm(x, weight, scale)
    assert same_bits(again, found)
    other, used = ops.layer_norm(x, weight, scale * 0.5)
    assert same_bits(
        other, torch.from_numpy(witness.layer_norm(x.numpy(), weight.numpy(), (0.5 * scale).numpy())[0])
    )
    assert same_bits(used, scale * 0.5)


def test_sums_products_and_modulation_have_the_bits_of_the_witness(path):
    x, y = (reference.draw(seed, (2, 5, 33), -70, 50) for seed in (1, 2))
    shift, scale = (reference.draw(seed, (2, 1, 33), -40, 40) for seed in (3, 4))
    x[0, 0, :4] = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    y[0, 0, :4] = torch.tensor([-0.0, -0.0, 0.25, 0.25])
    for a, b in ((x, y), (x, scale), (scale, x), (x[:, :1], y)):
        for name in ("add", "mul"):
            assert same_bits(getattr(ops, name)(a, b), from_witness(getattr(witness, name), a, b)), name
    for other in (scale, y):
        assert same_bits(ops.modulate(x, shift, other), from_witness(witness.modulate, x, shift, other))


def test_rotation_has_the_bits_of_the_witness(path):
    x = reference.draw(5, (2, 6, 3, 10), -30, 30)
    cos, sin = ops.rotary_tables(torch.tensor([1.0, 0.5, 0.1, 0.01, 0.001]), 6)
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2), torch.stack((x, -x), -1)[..., 0]):
        assert same_bits(ops.rotate(given, cos, sin), from_witness(witness.rotate, x, cos, sin))


def test_no_result_is_minus_zero(path):
    zeros = torch.tensor([[[-0.0, 0.0, -1e-45, -1e-40]]])
    row = zeros[:, :1]
    cos, sin = torch.ones(1, 2), torch.zeros(1, 2)
    results = [
        ops.add(zeros, zeros),
        ops.mul(zeros, -zeros.abs() * 1e-10),
        ops.modulate(zeros * 0.0, row * 0.0, row),
        ops.gelu_tanh(zeros),
        ops.gelu_tanh(torch.full((1, 1, 4), -50.0)),
        ops.silu(torch.full((1, 1, 4), -200.0)),
        ops.layer_norm(zeros * 0.0, -torch.ones(4))[0],
        ops.rotate(zeros.reshape(1, 1, 1, 4), cos, sin),
        ops.linear(zeros * 0.0, torch.ones(3, 4)),
        ops.linear(torch.tensor([[-(2.0**-100)]]), torch.tensor([[2.0**-100]])),
        ops.matmul(zeros, zeros.mT),
    ]
    for index, result in enumerate(results):
        assert not bool((torch.signbit(result) & (result == 0)).any()), index


# Exact: the two paths agree on dense sweeps


@pytest.mark.parametrize("name", ["gelu_tanh", "silu"])
def test_both_paths_agree_on_a_dense_sweep(name):
    pytest.importorskip("numba", reason="the compiled loops need numba")
    x = every_float32(0, 2**32, 1021)
    with plain_path():
        expected = getattr(ops, name)(x)
    assert same_bits(getattr(ops, name)(x), expected)


@pytest.mark.parametrize("name", ["gelu_tanh", "silu"])
@pytest.mark.parametrize(
    ("start", "stop", "step"),
    [
        (0, 2**32, 2003),  # all sizes and signs
        (0x3F000000, 0x42000000, 29),  # 0.5 to 32: where the functions bend, and where they end
        (0xBF000000, 0xC3000000, 37),  # the same below zero, down to results that underflow
        (0x80000000, 0x80010000, 1),  # the smallest below zero
    ],
)
def test_activations_have_the_bits_of_the_witness_on_dense_sweeps(name, start, stop, step, path):
    for first in range(start, stop, step << 16):
        x = every_float32(first, min(first + (step << 16), stop), step)
        assert same_bits(getattr(ops, name)(x), from_witness(getattr(witness, name), x)), hex(first)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["gelu_tanh", "silu"])
def test_activations_have_the_bits_of_the_witness_for_every_float32(name):
    """Exact and exhaustive: 2^32 inputs less those that are not finite, with the compiled loops if there are any."""
    for first in range(0, 2**32, 1 << 16):
        x = every_float32(first, first + (1 << 16), 1)
        assert same_bits(getattr(ops, name)(x), from_witness(getattr(witness, name), x)), hex(first)


def every_float32(start: int, stop: int, step: int) -> torch.Tensor:
    """The finite numbers of every `step`-th bit pattern."""
    patterns = np.arange(start, stop, step, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return torch.from_numpy(patterns[np.isfinite(patterns)])


def test_values_do_not_depend_on_where_they_stand(path):
    """The vector loop and its scalar tail, other layouts, other neighbours."""
    x = sweep(3)
    whole = ops.gelu_tanh(x)
    order = torch.from_numpy(np.random.default_rng(0).permutation(x.numel()))
    assert same_bits(ops.gelu_tanh(x[order]), whole[order])
    assert same_bits(ops.gelu_tanh(x[::3]), whole[::3])
    for i in (0, 5, 4000, x.numel() - 1):
        assert same_bits(ops.gelu_tanh(x[i : i + 1]), whole[i : i + 1])


# Exact, before anything is rounded to float32, which hides all but a few in a million differences of float64


def softmax_by_definition(row: np.ndarray) -> list[float]:
    """SPEC's e times r, with the witness's EXP and Python's integers."""
    e = witness_blocks.exp(row - row.max())
    total = sum(map(int, np.rint(e * 2.0**42).tolist()))
    r = 1.0 / (float(total) * 2.0**-42)
    return [value * r for value in e.tolist()]


@pytest.mark.parametrize("cols", [1, 3, 100, 3000])
def test_softmax_has_the_bits_of_its_definition_before_rounding(cols, path):
    scores = reference.draw(cols, (20, cols), -4, 4).double()
    if path == "plain":
        found = elementwise.softmax_float64(scores.clone()).tolist()
    else:
        from oracle import kernels

        found, work = [], np.empty(cols)
        for row in scores.float().numpy():
            factor, _ = kernels.numerators(row, work)
            found.append((work * factor).tolist())
    assert found == [softmax_by_definition(row) for row in scores.numpy()]
    # The control: torch's exp gives other bits, and so does dividing by the sum.
    if cols == 3000:
        assert found != scores.softmax(-1).tolist()


@pytest.mark.parametrize("d", [1, 5, 768])
def test_the_scale_of_a_norm_has_the_bits_of_its_definition_before_rounding(d, path):
    x = reference.draw(d, (200, d), -6, 6).double().numpy()
    centred = x - witness_blocks.mean(x)
    squares = centred * centred
    expected = witness_blocks.rsqrt(witness_blocks.mean(squares) + witness_blocks.EPS)
    if path == "plain":
        found = elementwise.scale_float64(torch.from_numpy(centred)).numpy()
    else:
        from oracle import kernels

        tops = squares.max(-1).view(np.int64)
        found = np.array([[kernels.scale_float64(row, top)] for row, top in zip(squares, tops, strict=True)])
    assert found.tobytes() == expected.tobytes()
    # The control: a square root and a quotient, each correctly rounded, give other bits.
    if d > 1:
        assert found.tobytes() != (1.0 / np.sqrt(witness_blocks.mean(squares) + witness_blocks.EPS)).tobytes()


# Bounded: how far the recipes are from the functions they stand for


def test_exp_is_within_its_stated_error():
    x = torch.linspace(-104, 104, 20011, dtype=torch.float64)
    found = elementwise.exp_(x.clone())
    with mpmath.workprec(120):
        errors = [
            abs(mpmath.mpf(f) / mpmath.exp(mpmath.mpf(v)) - 1)
            for f, v in zip(found.tolist(), x.tolist(), strict=True)
        ]
        assert max(errors) < mpmath.mpf(2) ** -45


def test_the_constants_are_what_they_stand_for():
    with mpmath.workprec(200):
        line = -2 * mpmath.sqrt(2 / mpmath.pi)
        assert float(line) == GELU_LINE
        assert float(line * mpmath.mpf("0.044715")) == GELU_CUBE
        assert float(1 / mpmath.log(2)) == LOG2E
        # The fit's own error, without rounding, over all of its interval.
        points = [mpmath.mpf(i) / 1000 for i in range(-500, 501)]
        fit = [mpmath.polyval(list(map(mpmath.mpf, reversed(EXP_COEFFICIENTS))), f) for f in points]
        assert (
            max(abs(p / mpmath.power(2, f) - 1) for p, f in zip(fit, points, strict=True))
            < mpmath.mpf(2) ** -45.9
        )


def test_activations_are_nearly_always_correctly_rounded():
    """Within half an ulp and a millionth of one, for normal results."""
    x = torch.cat((reference.draw(1, (1500,), -6, 3), torch.linspace(-12, 12, 500)))
    for name in ("gelu_tanh", "silu"):
        found = getattr(ops, name)(x)
        with mpmath.workprec(120):
            for value, result in zip(x.tolist(), found.tolist(), strict=True):
                v = mpmath.mpf(value)
                u = (
                    v / 2
                    if name == "silu"
                    else mpmath.sqrt(2 / mpmath.pi) * (v + mpmath.mpf("0.044715") * v**3)
                )
                exact = v / (1 + mpmath.exp(-2 * u))
                if abs(exact) > 2.0**-126:
                    ulp = mpmath.mpf(2) ** (mpmath.floor(mpmath.log(abs(exact), 2)) - 23)
                    assert abs(result - exact) <= 0.500001 * ulp, (name, value)


def test_softmax_is_within_an_ulp_and_a_half_of_the_function():
    scores = reference.draw(3, (4, 50), -4, 3)
    found = ops.softmax(scores)
    for row, result in zip(scores.tolist(), found.tolist(), strict=True):
        with mpmath.workprec(120):
            numerators = [mpmath.exp(mpmath.mpf(s)) for s in row]
            total = mpmath.fsum(numerators)
            for numerator, p in zip(numerators, result, strict=True):
                exact = numerator / total
                ulp = mpmath.mpf(2) ** (mpmath.floor(mpmath.log(exact, 2)) - 23)
                assert abs(p - exact) <= 0.51 * ulp


def test_layer_norm_is_close_to_the_function():
    x, weight = reference.draw(4, (1, 6, 200)) + 5.0, torch.ones(200)
    found, scale = ops.layer_norm(x, weight)
    wide = x.double()
    exact_scale = (wide.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    assert float((scale / exact_scale - 1).abs().max()) < 2.0**-24
    expected = functional.layer_norm(wide, [200], eps=1e-5)
    assert float((found - expected).abs().max()) < 2.0**-21


# Controls: what torch would have given is seen to be something else


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
        ("silu", functional.silu),
        ("softmax", lambda x: x.reshape(-1, 3).softmax(-1)),
    ],
)
def test_torch_s_own_kernels_give_other_bits(name, replacement):
    x = sweep()
    x = x[: x.numel() // 3 * 3]
    mine = ops.softmax(x.reshape(-1, 3)) if name == "softmax" else getattr(ops, name)(x)
    assert not same_bits(mine, replacement(x))


def test_exp_has_the_bits_of_the_witness_before_any_rounding_and_torch_s_has_not():
    x = torch.cat((torch.linspace(-800, 800, 4001), sweep().clamp(-800, 800))).double()
    expected = from_witness(witness_blocks.exp, x)
    assert torch.equal(elementwise.exp_(x.clone()), expected)
    assert not torch.equal(x.clamp(-708, 709).exp(), expected)


def test_compiled_exp_has_the_same_bits_so_nothing_is_fused():
    numba = pytest.importorskip("numba", reason="the compiled loops need numba")
    from oracle import kernels

    @numba.njit
    def all_of(x, out):
        for i in range(x.size):
            out[i] = kernels.exp(x[i], kernels.ONE)

    @numba.njit(fastmath={"contract"})
    def with_fused_operations(x, out):
        for i in range(x.size):
            p = EXP_COEFFICIENTS[9]
            for j in range(8, -1, -1):
                p = p * x[i] + EXP_COEFFICIENTS[j]
            out[i] = p

    x = torch.linspace(-800, 800, 40_001).double()
    expected, out = elementwise.exp_(x.clone()), torch.empty_like(x)
    all_of(x.numpy(), out.numpy())
    assert torch.equal(out, expected)
    # The control: where the processor can fuse, letting the compiler do so gives other bits.
    small = torch.linspace(-0.5, 0.5, 10_001).double()
    plain, fused = torch.full_like(small, EXP_COEFFICIENTS[9]), torch.empty_like(small)
    for coefficient in reversed(EXP_COEFFICIENTS[:9]):
        plain = plain * small + coefficient
    with_fused_operations(small.numpy(), fused.numpy())
    if "vfmadd" in "".join(with_fused_operations.inspect_asm().values()):
        assert not torch.equal(plain, fused)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_compiled_activations_divide_too_before_rounding(name):
    """A product with the reciprocal gives the same float32 for every one of 2^32 inputs; float64 tells."""
    numba = pytest.importorskip("numba", reason="the compiled loops need numba")
    from oracle import kernels

    recipe = getattr(kernels, f"{name}_float64")

    @numba.njit
    def all_of(x, out):
        for i in range(x.size):
            out[i] = recipe(x[i])

    x = torch.cat((reference.draw(8, (20_001,), -3, 3), sweep(4))).double()
    out = torch.empty_like(x)
    all_of(x.numpy(), out.numpy())
    assert torch.equal(out, getattr(elementwise, f"{name}_float64")(x.clone()))


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_activations_divide_correctly_before_rounding_and_a_reciprocal_is_caught(name):
    """Float32 rounding hides the last bits of float64, so the recipes are compared before it."""
    x = reference.draw(8, (3000,), -3, 3).double()
    inner = ((x * x) * GELU_CUBE + GELU_LINE) * x if name == "gelu" else -x
    denominator = elementwise.exp_(inner) + 1.0
    exact = [float(Fraction(a) / Fraction(b)) for a, b in zip(x.tolist(), denominator.tolist(), strict=True)]
    recipe = elementwise.gelu_float64 if name == "gelu" else elementwise.silu_float64
    assert recipe(x.clone()).tolist() == exact
    assert (x * (1.0 / denominator)).tolist() != exact


def test_the_mean_is_exact_where_a_rational_can_tell():
    """Quantised at 2^-40 of the largest: integers below that are averaged without error."""
    values = reference.integers(1, (3, 64), 20).double()
    exact = [float(sum(map(Fraction, row), Fraction(0)) / 64) for row in values.tolist()]
    assert elementwise.mean(values)[:, 0].tolist() == exact
