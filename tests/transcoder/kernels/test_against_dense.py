"""Encoding and decoding by entries equal a dense float64 reference, in value and in every gradient."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder import kernels
from transcoder.activations import batch_topk_mask, topk_mask
from transcoder.sparse import from_mask

SHAPES = {
    "clt": lambda n_layers, source: n_layers - source,
    "plt": lambda n_layers, source: 1,
    "band": lambda n_layers, source: min(2, n_layers - source),
}
CLOSE = 1e-5
"""Sums of at most 40 products of numbers around 1, in another order: a hundred roundings of float32."""


def tensors(
    connectivity: str, n_layers: int, batch: int, d_model: int, n_features: int, seed: int
) -> list[Tensor]:
    """x, W_enc, b_enc, b_dec, the cotangent of the output, and each W_dec."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_layers, batch, d_model), (n_layers, n_features, d_model), (n_layers, n_features)]
    shapes += [(n_layers, d_model), (n_layers, batch, d_model)]
    targets = [SHAPES[connectivity](n_layers, source) for source in range(n_layers)]
    shapes += [(n_features, count, d_model) for count in targets]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def largest(values: Tensor, k: int) -> Tensor:
    """Which of each row's values are among its k largest, by a sort; ties go to the first, and NaNs are largest."""
    keys = np.where(np.isnan(values.detach().numpy()), np.inf, values.detach().numpy())
    order = np.argsort(-keys, axis=-1, kind="stable")
    mask = np.zeros(values.shape, np.bool_)
    np.put_along_axis(mask, order[..., :k], True, -1)
    return torch.from_numpy(mask)


def reference(given: list[Tensor], k: int) -> list[Tensor | None]:
    """Output and gradients of all parameters, dense and in float64."""
    x, W_enc, b_enc, b_dec, cotangent, *W_dec = [tensor.double() for tensor in given]
    parameters = [W_enc, b_enc, b_dec, *W_dec]
    for parameter in parameters:
        parameter.requires_grad_()
    pre_acts = torch.einsum("lbd,lfd->lbf", x, W_enc) + b_enc[:, None]
    acts = pre_acts.clamp(min=0) * largest(pre_acts, k)
    y_hat = [b_dec[target].expand(x.shape[1], -1) for target in range(len(x))]
    for source, weight in enumerate(W_dec):
        for later in range(weight.shape[1]):
            y_hat[source + later] = y_hat[source + later] + acts[source] @ weight[:, later]
    out = torch.stack(y_hat)
    return [out.detach(), *torch.autograd.grad((out * cotangent).sum(), parameters, allow_unused=True)]


def by_entries(given: list[Tensor], k: int) -> list[Tensor]:
    """The same through the kernels, in float32."""
    x, W_enc, b_enc, b_dec, cotangent, *W_dec = [tensor.clone() for tensor in given]
    parameters = [W_enc, b_enc, b_dec, *W_dec]
    for parameter in parameters:
        parameter.requires_grad_()
    selected, _ = kernels.encode_topk(x, W_enc, b_enc, k)
    out = kernels.decode(selected, W_dec, b_dec)
    return [out.detach(), *torch.autograd.grad((out * cotangent).sum(), parameters, allow_unused=True)]


@pytest.mark.parametrize("path", ["plain", "compiled"])
@pytest.mark.parametrize("connectivity", SHAPES)
@settings(deadline=None, max_examples=15)
@given(
    n_layers=st.integers(1, 4),
    batch=st.integers(0, 9),
    d_model=st.sampled_from([1, 7, 16, 33]),
    n_features=st.sampled_from([3, 20, 64]),
    k=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_values_and_gradients(path, connectivity, n_layers, batch, d_model, n_features, k, seed):
    given_tensors = tensors(connectivity, n_layers, batch, d_model, n_features, seed)
    expected = reference(given_tensors, k)
    with kernels.plain_path() if path == "plain" else nullcontext():
        found = by_entries(given_tensors, k)
    for value, exact in zip(found, expected, strict=True):
        # Where nothing reads a tensor the reference may leave its gradient out.
        exact = torch.zeros_like(value, dtype=torch.float64) if exact is None else exact
        torch.testing.assert_close(value.double(), exact, rtol=CLOSE, atol=CLOSE)


def test_the_number_of_threads_does_not_enter():
    given_tensors = tensors("clt", 3, 40, 48, 200, 1)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(by_entries(given_tensors, 4))
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("path", ["plain", "compiled"])
@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 70),
    n_features=st.sampled_from([1, 20, 67]),
    k=st.integers(0, 9),
    levels=st.sampled_from([2, 6, 10**6]),
    n_nan=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_selections_are_those_of_a_sort_with_ties_and_nans(path, batch, n_features, k, levels, n_nan, seed):
    """Exact: entries, values and rows."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-levels, levels, (batch, n_features), generator=generator) / levels
    values.view(-1)[torch.randperm(values.numel(), generator=generator)[:n_nan]] = torch.nan
    chosen = {
        "select_topk": largest(values, k),
        "select_batch_topk": largest(values.view(-1), k * batch).view_as(values),
    }
    assert torch.equal(topk_mask(values, k), chosen["select_topk"])
    assert torch.equal(batch_topk_mask(values[None], k)[0], chosen["select_batch_topk"])
    for name, mask in chosen.items():
        expected = from_mask(values, mask & ~(values <= 0))
        with kernels.plain_path() if path == "plain" else nullcontext():
            found = getattr(kernels, name)(values, k)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.offsets, expected.offsets)
        torch.testing.assert_close(found.values, expected.values, rtol=0, atol=0, equal_nan=True)
