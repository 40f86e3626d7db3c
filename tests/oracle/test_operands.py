"""Operands that do not fit each other are refused in one line, on both paths and before anything is read."""

from __future__ import annotations

import re

import pytest
import torch

from oracle import ExactError, ops

PRODUCTS = (
    r"axes of one name with one size; got {}; nothing is broadcast or cut here: expand, slice or transpose"
)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


MISFITS = {
    "a bias of one": (
        lambda: ops.linear(ones(2, 8), ones(64, 8), ones(1)),
        "x [2, 8], weight [64, 8], bias [1]",
    ),
    "a bias of twice": (lambda: ops.linear(ones(2, 8), ones(5, 8), ones(10)), "bias [10]"),
    "a bias without axes": (lambda: ops.linear(ones(2, 8), ones(5, 8), torch.tensor(1.0)), "bias []"),
    "a bias with two axes": (lambda: ops.linear(ones(2, 8), ones(5, 8), ones(1, 5)), "bias [1, 5]"),
    "another d_in": (lambda: ops.linear(ones(2, 4), ones(3, 8)), "x [2, 4], weight [3, 8]"),
    "a weight of one axis": (lambda: ops.linear(ones(2, 8), ones(8)), "weight [8]"),
    "a short norm weight": (lambda: ops.layer_norm(ones(2, 3, 8), ones(4)), "x [2, 3, 8], weight [4]"),
    "a norm weight of one": (lambda: ops.layer_norm(ones(2, 3, 8), ones(1)), "weight [1]"),
    "a long norm weight": (lambda: ops.layer_norm(ones(2, 3, 8), ones(16)), "weight [16]"),
    "one scale for all": (lambda: ops.layer_norm(ones(2, 3, 8), ones(8), ones(1, 1, 1)), "scale [1, 1, 1]"),
    "wide scales": (lambda: ops.layer_norm(ones(2, 3, 8), ones(8), ones(2, 3, 8)), "scale [2, 3, 8]"),
    "few positions": (lambda: ops.rotate(ones(1, 4, 1, 4), ones(2, 2), ones(2, 2)), "cos [2, 2]"),
    "one position": (lambda: ops.rotate(ones(1, 4, 1, 4), ones(1, 2), ones(1, 2)), "cos [1, 2]"),
    "many positions": (lambda: ops.rotate(ones(1, 2, 1, 4), ones(4, 2), ones(4, 2)), "cos [4, 2]"),
    "two tables": (lambda: ops.rotate(ones(1, 4, 1, 4), ones(4, 2), ones(3, 2)), "sin [3, 2]"),
    "another width": (
        lambda: ops.attention_scores(ones(1, 3, 2, 4), ones(1, 3, 2, 5)),
        "q [1, 3, 2, 4], k [1, 3, 2, 5]",
    ),
    "two sequences of keys": (
        lambda: ops.attention_scores(ones(1, 3, 2, 4), ones(2, 3, 2, 4)),
        "k [2, 3, 2, 4]",
    ),
    "two sequences of queries": (
        lambda: ops.attention_scores(ones(2, 3, 2, 4), ones(1, 3, 2, 4)),
        "k [1, 3, 2, 4]",
    ),
    "four heads of keys": (
        lambda: ops.attention_scores(ones(1, 3, 2, 4), ones(1, 3, 4, 4)),
        "k [1, 3, 4, 4]",
    ),
    "other sequences": (
        lambda: ops.attention(ones(1, 3, 2, 4), ones(2, 3, 2, 4), ones(2, 3, 2, 4)),
        "q [1, 3, 2, 4], k [2, 3, 2, 4], v [2, 3, 2, 4]",
    ),
    "other heads": (
        lambda: ops.attention(ones(1, 3, 2, 4), ones(1, 3, 4, 4), ones(1, 3, 4, 4)),
        "k [1, 3, 4, 4]",
    ),
    "more values": (
        lambda: ops.attention(ones(1, 3, 2, 4), ones(1, 3, 2, 4), ones(1, 5, 2, 4)),
        "v [1, 5, 2, 4]",
    ),
    "wider values": (
        lambda: ops.attention(ones(1, 3, 2, 4), ones(1, 3, 2, 4), ones(1, 3, 2, 6)),
        "v [1, 3, 2, 6]",
    ),
    "values of two sequences": (lambda: ops.mix(ones(1, 2, 3, 4), ones(2, 4, 2, 4)), "pattern [1, 2, 3, 4]"),
    "values of more heads": (lambda: ops.mix(ones(1, 2, 3, 4), ones(1, 4, 5, 4)), "v [1, 4, 5, 4]"),
    "values of more keys": (lambda: ops.mix(ones(1, 2, 3, 4), ones(1, 5, 2, 4)), "v [1, 5, 2, 4]"),
    "other inner sizes": (lambda: ops.matmul(ones(2, 3), ones(2, 3)), "a [2, 3], b [2, 3]"),
    "no axes": (lambda: ops.softmax(torch.tensor(1.0)), "scores []"),
    "sigmas in a table": (lambda: ops.time_features(ones(2, 2), 4), "sigma [2, 2]"),
    "frequencies in a table": (lambda: ops.rotary_tables(ones(2, 2), 4), "inv_freq [2, 2]"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_axes_of_one_name_must_have_one_size(name, path, unchecked):
    call, received = MISFITS[name]
    with pytest.raises(ExactError, match=re.escape(received)) as caught:
        call()
    assert re.search(PRODUCTS.format(".*"), str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.rotate(ones(1, 2, 1, 5), ones(2, 2), ones(2, 2)),
            "rotate: d_head must be twice the tables' half, got x [1, 2, 1, 5], cos [2, 2], sin [2, 2]; make",
        ),
        (
            lambda: ops.rotate(ones(1, 2, 1, 8), ones(2, 2), ones(2, 2)),
            "rotate: d_head must be twice the tables' half, got x [1, 2, 1, 8]",
        ),
        (
            lambda: ops.matmul(ones(2, 3, 4), ones(3, 4, 5)),
            "matmul: all but the last 2 axes must broadcast to one, got a [2, 3, 4], b [3, 4, 5]; expand or slice",
        ),
        (lambda: ops.add(ones(2, 3), ones(2)), "add: the shapes must broadcast to one, got a [2, 3], b [2]"),
        (lambda: ops.mul(ones(2, 3), ones(2)), "mul: the shapes must broadcast to one, got a [2, 3], b [2]"),
        (
            lambda: ops.modulate(ones(2, 3, 4), ones(2, 1, 4), ones(3, 1, 4)),
            "modulate: the shapes must broadcast to one, got x [2, 3, 4], shift [2, 1, 4], scale [3, 1, 4]",
        ),
        (
            lambda: ops.add(ones(2), 1.0),  # type: ignore[arg-type]
            "add: b must be a float32 tensor, got float; make it one",
        ),
        (
            lambda: ops.gelu_tanh(1.0),  # type: ignore[arg-type]
            "gelu_tanh: takes float32 tensors, got float; make them with torch.tensor",
        ),
        (
            lambda: ops.attention_scores(ones(1, 3, 2, 0), ones(1, 3, 2, 0)),
            "attention_scores: d_head must be at least 1, got q [1, 3, 2, 0]",
        ),
        (lambda: ops.rotary_tables(ones(2), -1), "rotary_tables: n_positions must be at least 0, got -1"),
    ],
)
def test_other_misfits_are_named(call, message, path, unchecked):
    with pytest.raises(ExactError, match="^" + re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("width", [7, 1, 0, -2])
def test_a_width_of_time_features_that_is_odd_or_none_is_refused(width, unchecked):
    with pytest.raises(
        ExactError,
        match=f"time_features: width must be even and at least 2, as many sines as cosines, got {width}; the model's",
    ):
        ops.time_features(ones(1), width)


def test_sums_of_no_terms_are_the_bias_and_no_outputs_are_none(path):
    bias = torch.tensor([1.5, -0.0, -2.0])
    found = ops.linear(ones(2, 4, 0), ones(3, 0), bias)
    assert torch.equal(found, bias.expand(2, 4, 3))
    assert not bool((torch.signbit(found) & (found == 0)).any())
    assert torch.equal(ops.linear(ones(2, 0), ones(3, 0)), torch.zeros(2, 3))
    assert ops.linear(ones(2, 3), ones(0, 3), ones(0)).shape == (2, 0)
    assert torch.equal(ops.matmul(ones(2, 0), ones(0, 3)), torch.zeros(2, 3))
    assert ops.attention(ones(0, 3, 2, 4), ones(0, 5, 2, 4), ones(0, 5, 2, 4)).shape == (0, 3, 2, 4)
    assert ops.attention(ones(1, 0, 2, 4), ones(1, 5, 2, 4), ones(1, 5, 2, 4)).shape == (1, 0, 2, 4)
    assert ops.attention(ones(1, 3, 0, 4), ones(1, 5, 0, 4), ones(1, 5, 0, 4)).shape == (1, 3, 0, 4)
    assert ops.rotate(ones(1, 0, 2, 4), ones(0, 2), ones(0, 2)).shape == (1, 0, 2, 4)
    with pytest.raises(ExactError, match=r"linear: bias is not finite at \[1\]"):
        ops.linear(ones(2, 0), ones(3, 0), torch.tensor([1.0, float("nan"), 0.0]))
    with pytest.raises(
        ExactError, match="attention: rows must have 1 to 1048576 values for their sums to be exact"
    ):
        ops.attention(ones(1, 3, 2, 4), ones(1, 0, 2, 4), ones(1, 0, 2, 4))


def test_what_fits_is_not_refused(path):
    """The neighbour of all of the above: broadcasting where an operation says so, and any leading axes."""
    assert ops.linear(ones(8), ones(5, 8), ones(5)).shape == (5,)
    assert ops.linear(ones(2, 3, 4, 8), ones(5, 8)).shape == (2, 3, 4, 5)
    assert ops.layer_norm(ones(8), ones(8))[1].shape == (1,)
    assert ops.matmul(ones(2, 1, 3, 4), ones(5, 4, 6)).shape == (2, 5, 3, 6)
    assert ops.add(ones(2, 3), torch.tensor(1.0)).shape == (2, 3)
    assert ops.modulate(ones(2, 3, 8), ones(8), ones(2, 1, 8)).shape == (2, 3, 8)
    assert ops.mix(ones(1, 2, 3, 4), ones(1, 4, 2, 6)).shape == (1, 3, 2, 6)
    assert ops.time_features(ones(0), 4).shape == (0, 4)
    assert ops.rotary_tables(ones(2), 0)[0].shape == (0, 2)
