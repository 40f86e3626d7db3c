"""What exact arithmetic refuses, and in which words; and machines that it does not trust."""

from __future__ import annotations

import sys

import pytest
import torch

from mdlm_interp.model import HookedMDLM
from oracle import (
    ExactArithmetic,
    ExactError,
    Oracle,
    UntrustedMachineError,
    golden,
    ops,
    plain_path,
    selftest,
)
from oracle.guard import exact_operation


def test_gradients_are_refused_with_the_remedy():
    x, weight = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    with pytest.raises(ExactError) as caught:
        ops.linear(x, weight)
    assert str(caught.value) == (
        "linear: exact arithmetic is forward only and has no gradients; wrap the call in torch.no_grad() "
        "(Oracle does so), or use NativeArithmetic where gradients are needed"
    )
    with torch.no_grad():
        assert not ops.linear(x, weight).requires_grad


def test_a_model_on_exact_arithmetic_refuses_gradients_as_a_whole(synthetic, inputs):
    ids, sigma = inputs
    model = HookedMDLM(synthetic.config, ExactArithmetic())
    with pytest.raises(ExactError, match="forward only and has no gradients"):
        model(ids, sigma)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_are_refused(dtype, unchecked):
    with pytest.raises(ExactError, match="defined for float32, got " + str(dtype).removeprefix("torch.")):
        ops.gelu_tanh(torch.ones(3, dtype=dtype))
    with pytest.raises(
        ExactError, match=r"defined for float32 weights, the model has .*; load it with dtype"
    ):
        Oracle(golden.synthetic_model().to(dtype))


def test_what_is_no_model_is_refused(unchecked):
    with pytest.raises(ExactError, match="Oracle needs a HookedMDLM, got Linear; if it is compiled"):
        Oracle(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def bad_values() -> list[float]:
    return [float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("bad", bad_values())
def test_values_that_are_not_finite_are_refused_everywhere(bad, path):
    x = torch.ones(1, 4, 6)
    x[0, 2, 3] = bad
    good, weight, row = torch.ones(1, 4, 6), torch.ones(5, 6), torch.ones(1, 1, 6)
    heads, fine = x.reshape(1, 4, 2, 3), good.reshape(1, 4, 2, 3)
    calls = {
        r"linear: x has values that are not finite \(first in row 2\)": lambda: ops.linear(x, weight),
        r"linear: weight has values that are not finite": lambda: ops.linear(good, x[0]),
        r"linear: bias is not finite at \[3\]": lambda: ops.linear(good, torch.ones(6, 6), x[0, 2]),
        r"add: the sum is not finite at \[0, 2, 3\]": lambda: ops.add(good, x),
        r"mul: the product is not finite at \[0, 2, 3\]": lambda: ops.mul(x, row),
        r"modulate: the result is not finite at \[0, 2, 3\]": lambda: ops.modulate(x, row, -row),
        r"layer_norm: the result is not finite at \[0, 2, ": lambda: ops.layer_norm(x, torch.ones(6)),
        r"gelu_tanh: x is not finite at \[0, 2, 3\]": lambda: ops.gelu_tanh(x),
        r"silu: x is not finite at \[0, 2, 3\]": lambda: ops.silu(x),
        r"softmax: scores is not finite at \[0, 2, 3\]": lambda: ops.softmax(x),
        r"attention: q has values that are not finite": lambda: ops.attention(heads, fine, fine),
        r"attention: k has values that are not finite": lambda: ops.attention(fine, heads, fine),
        r"attention: v has values that are not finite": lambda: ops.attention(fine, fine, heads),
        r"attention_scores: k has": lambda: ops.attention_scores(fine, heads),
        r"mix: pattern has values": lambda: ops.mix(x[None], torch.ones(1, 6, 1, 2)),
        r"rotate: the result is not finite": lambda: ops.rotate(
            x[:, :, None], torch.ones(4, 3), torch.ones(4, 3)
        ),
        r"time_features: sigma is not finite at \[3\]": lambda: ops.time_features(x[0, 2], 8),
    }
    for message, call in calls.items():
        with pytest.raises(ExactError, match=message):
            call()


def test_results_beyond_float32_are_refused_and_the_largest_is_not(path):
    largest = torch.tensor([[(2 - 2.0**-23) * 2.0**127]])
    one = torch.ones(1, 1)
    assert ops.linear(largest, one).item() == largest.item()
    with pytest.raises(ExactError, match="linear: a result is beyond float32's range"):
        ops.linear(largest, one * (1 + 2.0**-23))
    # 2^128 - 2^103 is the first that rounds beyond; a hair below it rounds to the largest.
    below = torch.tensor([[largest.item(), 2.0**102 * (2 - 2.0**-23)]])
    assert ops.linear(below, torch.ones(1, 2)).item() == largest.item()
    with pytest.raises(ExactError, match="beyond float32's range"):
        ops.linear(torch.tensor([[largest.item(), 2.0**103]]), torch.ones(1, 2))
    with pytest.raises(ExactError, match="the sum is not finite"):
        ops.add(largest, largest)
    with pytest.raises(ExactError, match="attention_scores: a result is beyond"):
        ops.attention_scores(largest.reshape(1, 1, 1, 1).expand(1, 1, 1, 2), torch.ones(1, 1, 1, 2) * 4)


def test_a_softmax_of_nothing_is_refused():
    with pytest.raises(ExactError, match="softmax: rows must have 1 to 1048576 values"):
        ops.softmax(torch.ones(2, 0))


def test_flushing_subnormals_is_noticed_at_every_call():
    x = torch.ones(2, 2)
    ops.add(x, x)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(
            UntrustedMachineError, match=r"flushes subnormal numbers to zero; call torch.set_flush_denorm"
        ):
            ops.add(x, x)
    finally:
        torch.set_flush_denormal(False)
    ops.add(x, x)


def test_a_machine_that_fails_the_self_test_is_refused(monkeypatch):
    monkeypatch.setattr(selftest, "_trusted", set())
    monkeypatch.setattr(selftest, "_division_is_correct", lambda device: False)
    with (
        plain_path(),
        pytest.raises(
            UntrustedMachineError, match="cannot be trusted on cpu: float64 division is not correctly rounded"
        ),
    ):
        ops.add(torch.ones(1), torch.ones(1))
    monkeypatch.setattr(selftest, "_rounding_is_ieee", lambda device: False)
    with pytest.raises(
        UntrustedMachineError, match="correctly rounded; run on another device, and please report"
    ):
        ops.add(torch.ones(1), torch.ones(1))


def test_emulated_float64_products_are_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", "1")
    assert selftest.check(torch.device("cuda")) == [
        "the environment variable CUBLAS_EMULATE_DOUBLE_PRECISION lets float64 products be emulated; unset it"
    ]
    assert "has no float64 arithmetic" in selftest.check(torch.device("mps"))[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a, b: (a.float() @ b.float()).double(), "a float64 matrix product of integers is not exact"),
        (lambda a, b: (a @ b) * (1 + 2.0**-44), "a float64 matrix product of integers is not exact"),
    ],
)
def test_the_self_test_sees_a_product_with_fewer_digits(wrong, message, monkeypatch):
    true = torch.Tensor.__matmul__
    assert selftest.check(torch.device("cpu")) == []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: wrong_product(true, wrong, a, b))
    assert message in selftest.check(torch.device("cpu"))


def wrong_product(true, wrong, a, b):
    if a.dtype != torch.float64:
        return true(a, b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", true)
        return wrong(a, b)


def test_compiled_loops_that_disagree_are_refused(monkeypatch):
    pytest.importorskip("numba", reason="the compiled loops need numba")
    from oracle import fused_check

    assert fused_check.disagreements() == []
    monkeypatch.setattr(selftest, "_trusted", set())
    monkeypatch.setattr(fused_check, "disagreements", lambda: ["gelu_tanh"])
    with pytest.raises(
        UntrustedMachineError,
        match=r"compiled loop gelu_tanh differs from the plain path; delete .*\.nb\? if the sources were changed, "
        r"or set MDLM_INTERP_EXACT_PATH=plain, and please report it",
    ):
        ops.add(torch.ones(1), torch.ones(1))


def test_the_check_of_compiled_loops_sees_one_wrong_bit(monkeypatch):
    pytest.importorskip("numba", reason="the compiled loops need numba")
    from oracle import elementwise, fused_check

    true = elementwise.silu

    def off_by_one_bit(x):
        out = true(x)
        out.view(torch.int32)[..., -1, 5] ^= 1
        return out

    monkeypatch.setattr(elementwise, "silu", off_by_one_bit)
    assert fused_check.disagreements() == ["silu"]


def test_the_path_is_chosen_by_the_environment(monkeypatch):
    from oracle import paths

    monkeypatch.setenv(paths.VARIABLE, "plain")
    assert paths.fused_for(torch.device("cpu")) is None
    monkeypatch.setenv(paths.VARIABLE, "quick")
    with pytest.raises(ExactError, match="must be plain or fused, got 'quick'"):
        paths.fused_for(torch.device("cpu"))
    monkeypatch.setenv(paths.VARIABLE, "fused")
    monkeypatch.setattr(paths, "_numba_is_installed", lambda: False)
    with pytest.raises(
        ExactError, match=r"is fused, but numba is not installed: pip install 'mdlm-interp\[fast\]'"
    ):
        paths.fused_for(torch.device("cpu"))


def test_an_operation_on_two_devices_is_refused():
    both = exact_operation(lambda a, b: a)
    with pytest.raises(ExactError, match="all tensors must be on one device, got"):
        both(torch.ones(1), torch.ones(1, device="meta"))


def test_no_rows_are_no_trouble(path):
    assert ops.linear(torch.zeros(0, 4), torch.ones(3, 4)).shape == (0, 3)
    assert ops.gelu_tanh(torch.zeros(0)).shape == (0,)
    assert ops.softmax(torch.zeros(0, 4)).shape == (0, 4)
    assert ops.add(torch.zeros(0, 2), torch.zeros(0, 2)).shape == (0, 2)
    assert ops.matmul(torch.zeros(2, 0, 4), torch.zeros(4, 3)).shape == (2, 0, 3)


def test_a_numba_that_cannot_be_imported_is_named(monkeypatch):
    from oracle import paths

    monkeypatch.setattr(paths, "_numba_is_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "oracle.fused", None)
    monkeypatch.delattr("oracle.fused", raising=False)
    with pytest.raises(
        ExactError, match=r"numba is installed but cannot be imported .* MDLM_INTERP_EXACT_PATH=plain"
    ):
        paths.fused_for(torch.device("cpu"))
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert paths.fused_for(torch.device("cpu")) is None
