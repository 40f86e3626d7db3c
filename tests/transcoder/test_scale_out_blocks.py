"""Blocks of rows and features give what the whole gives; what cannot be divided evenly is refused in one line."""

import socket
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mdlm_interp.errors import ConfigError
from transcoder.activations import batch_topk_mask, topk_mask
from transcoder.block_terms import DataBlock
from transcoder.config import InitConfig, TrainConfig, TranscoderConfig
from transcoder.kernels import GradientBuffers, select_topk
from transcoder.model import CrossLayerTranscoder
from transcoder.normalisation import Normalisation
from transcoder.objective import objective, objective_of_blocks
from transcoder.run import train
from transcoder.scale_out import (
    Layout,
    LostProcessError,
    Processes,
    feature_blocks,
    joined_processes,
    layout_of,
    whole,
)
from transcoder.scale_out.selection import largest_of_batch, largest_of_rows
from transcoder.scale_out.shards import feature_axis, joined, parts_of

SHAPE = TranscoderConfig(n_layers=3, d_model=32, n_features=24, k=4)
NORMS = Normalisation.identity(3, 32), Normalisation.identity(3, 32)
CPU = torch.device("cpu")


def laid_out(blocks=None, mesh=None, world_size=1, rank=0, batch_size=48, n_features=64):
    sizes = {"batch_size": batch_size, "n_features": n_features}
    return layout_of(blocks, mesh, rank=rank, world_size=world_size, **sizes)


@pytest.mark.parametrize(
    ("blocks", "mesh", "world_size", "expected"),
    [
        (None, None, 1, (1, 1)),
        (None, None, 4, (1, 4)),
        (None, (2, 2), 4, (2, 2)),
        ((4, 4), None, 4, (1, 4)),
        ((4, 2), None, 8, (4, 2)),
        ((4, 1), None, 2, (2, 1)),
        ((2, 2), (2, 1), 2, (2, 1)),
    ],
)
def test_every_block_is_one_process_s_and_shares_are_equal(blocks, mesh, world_size, expected):
    layouts = [laid_out(blocks, mesh, world_size, rank) for rank in range(world_size)]
    assert {layout.mesh for layout in layouts} == {expected}
    assert [layout.ordered for layout in layouts] == [blocks is not None] * world_size
    pairs = [(i, j) for layout in layouts for i in layout.data_blocks for j in layout.feature_blocks]
    n_data, n_feature = blocks or expected
    assert sorted(pairs) == [(i, j) for i in range(n_data) for j in range(n_feature)]
    assert [layout.place == (0, 0) for layout in layouts] == [True] + [False] * (world_size - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh": (2, 2), "world_size": 2},
            "train.mesh must have as many places as there are processes, got 2 x 2 for 2; start 4 "
            "(torchrun --nproc-per-node 4), or leave it out",
        ),
        (
            {"blocks": (2, 2), "mesh": (4, 1), "world_size": 4},
            "train.mesh must divide train.blocks, both (data, feature), got mesh 4 x 1 for blocks 2 x 2: 4 processes "
            "cannot share 2 data blocks evenly; change either",
        ),
        (
            {"blocks": (2, 2), "world_size": 3},
            "the number of processes must divide train.blocks (data, feature) into equal shares, got 3 for 2 x 2; "
            "start 4 or a divisor, or change train.blocks",
        ),
        (
            {"blocks": (5, 1)},
            "train.batch_size must be a multiple of the data blocks, got 48 and 5 from train.blocks 5 x 1; "
            "change either",
        ),
        (
            {"world_size": 3},
            "n_features must be a multiple of the feature blocks, got 64 and 3 from train.mesh 1 x 3; change either",
        ),
    ],
)
def test_what_cannot_be_shared_evenly_is_one_line(changes, message):
    with pytest.raises(ConfigError) as caught:
        laid_out(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            "must be whole numbers with 0 <= RANK < WORLD_SIZE, got '2' and '2'",
        ),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "got 'x' and '2'; unset both, or start with torchrun"),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "MASTER_ADDR does not say where the processes meet; start with torchrun",
        ),
    ],
)
def test_an_environment_that_is_not_torchrun_s_is_one_line(run_config, monkeypatch, variables, message):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        train(run_config)
    assert message in str(caught.value)
    assert not run_config.out.exists()


@pytest.mark.parametrize("name", ["blocks", "mesh"])
def test_pairs_are_of_numbers_from_one(name):
    changes: dict[str, Any] = {name: (0, 2)}
    with pytest.raises(
        ConfigError, match=rf"{name} must be two numbers from 1, data and feature, got \(0, 2\)"
    ):
        TrainConfig(**changes)


def test_others_that_do_not_come_are_one_line(monkeypatch, free_port):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": free_port,
    }.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(LostProcessError, match=r"gone or does not answer .*start all again"),
        joined_processes(CPU, 1, lambda rank, world_size: Layout(mesh=(1, 2), place=(0, 1))),
    ):
        pass


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


# Selection


@pytest.fixture
def ties():
    """Pre-activations [layer row feature] of few different values, some of them negative, zero or NaN."""
    values = torch.randint(-3, 4, (2, 12, 24), generator=torch.Generator().manual_seed(1)) / 4
    values[1, 5, 7] = torch.nan
    return values


def cells(values, layout):
    """The values of each data block, of each feature block."""
    n_rows, n_features = values.shape[1:]
    return [
        [
            values[:, layout.rows(i, n_rows), layout.features(j, n_features)].contiguous()
            for j in range(layout.blocks[1])
        ]
        for i in range(layout.blocks[0])
    ]


def to_whole(found, layout, shape):
    """Which places of [layer row feature] are among the entries of each block."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, of_rows in enumerate(found):
        for j, of_layers in enumerate(of_rows):
            start = layout.rows(i, shape[1]).start, layout.features(j, shape[2]).start
            for layer, acts in enumerate(of_layers):
                mask[layer, start[0] + acts.rows(), start[1] + acts.indices.long()] = True
    return mask


@pytest.mark.parametrize("k", [1, 3, 6, 9])
@pytest.mark.parametrize("blocks", [(1, 2), (2, 1), (3, 4), (1, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_keep_of_rows_and_batches_what_the_whole_keeps_ties_too(ties, k, blocks, dtype):
    layout = Layout(blocks=blocks)
    ties = ties.to(dtype)
    positive = ~(ties <= 0)
    found = largest_of_batch(cells(ties, layout), k, Processes(layout))
    by_blocks = to_whole(found, layout, ties.shape)
    expected = batch_topk_mask(ties, k) & positive
    assert torch.equal(by_blocks, expected)
    found = []
    for of_rows in cells(ties, layout):
        offers = [[select_topk(of_layer, k) for of_layer in cell] for cell in of_rows]
        found.append(largest_of_rows(offers, k, Processes(layout)))
    by_blocks = to_whole(found, layout, ties.shape)
    assert torch.equal(by_blocks, topk_mask(ties, k) & positive)
    for of_rows, values in zip(found, cells(ties, layout), strict=True):
        for of_layers, cell in zip(of_rows, values, strict=True):
            for acts, of_layer in zip(of_layers, cell, strict=True):
                there = of_layer[acts.rows(), acts.indices.long()]
                assert torch.equal(acts.values.nan_to_num(9.0), there.nan_to_num(9.0))


def test_fewer_positive_values_than_a_batch_may_keep_are_all_kept():
    layout = Layout(blocks=(2, 2))
    values = torch.full((1, 4, 8), -1.0)
    values[0, 2, 5] = 1.0
    values[0, 3, 1] = 1e-45  # the smallest there is
    found = largest_of_batch(cells(values, layout), 3, Processes(layout))
    assert torch.equal(to_whole(found, layout, values.shape), values > 0)


# Weights


@pytest.mark.parametrize("init", [InitConfig(), InitConfig(decoder="own_layer", encoder="d_model")])
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_initial_weights_do_not_depend_on_blocks(init, kind):
    shape = replace(SHAPE, activation=kind, k=4 if kind == "topk" else None, skip=True)
    expected = CrossLayerTranscoder(shape, *NORMS, seed=4, init=init).state_dict()
    layout = Layout(blocks=(1, 4))
    blocks = feature_blocks(shape, NORMS, seed=4, init=init, layout=layout, device=CPU)
    assert [block.W_enc.shape for block in blocks] == [(3, 6, 32)] * 4
    found = whole(blocks, Processes(layout)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_tensor_that_goes_by_features_is_known_as_such(clt):
    for name, parameter in clt.named_parameters():
        axis = feature_axis(f"adam.exp_avg.{name}")
        assert (24 in parameter.shape) == (axis is not None), name
        assert axis is None or parameter.shape[axis] == 24
        assert feature_axis(f"adam.step.{name}") is None
        whole_tensor, processes = parameter.detach(), Processes(Layout(blocks=(1, 4)))
        parts = parts_of(f"clt.{name}", whole_tensor, processes.layout)
        assert torch.equal(joined(f"clt.{name}", parts, processes), whole_tensor)
        assert len({part.data_ptr() for part in parts}) == 4  # Adam counts in place


# Gradients

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "topk": ({}, {"sparsity": "l1", "pre_act": "zero"}),
    "batchtopk": ({"activation": "batchtopk", "skip": True}, {"sparsity": "tanh"}),
    "jumprelu": (
        {"activation": "jumprelu", "k": None, "ste_width": 0.3},
        {"sparsity": "tanh", "pre_act": "threshold"},
    ),
    "relu": ({"activation": "relu", "k": None}, {"sparsity": "l1", "pre_act": "zero", "pre_act_on": "all"}),
}


def drawn(kind):
    """A float64 transcoder, every parameter drawn."""
    clt = CrossLayerTranscoder(replace(SHAPE, **KINDS[kind][0]), seed=4).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in clt.named_parameters():
            if name in ("b_enc", "b_dec", "W_skip", "log_threshold"):
                parameter.copy_(
                    0.1 * torch.randn(parameter.shape, generator=generator) - 1.0 * (name[0] == "l")
                )
    return clt


def cut(clt, layout):
    """The transcoder's feature blocks."""
    blocks = feature_blocks(clt.config, NORMS, seed=0, init=InitConfig(), layout=layout, device=CPU)
    for number, block in enumerate(blocks):
        block.double()
        for name, tensor in clt.state_dict().items():
            *path, last = name.split(".")
            part = parts_of(f"clt.{name}", tensor, layout)[number]
            owner = block.get_submodule(".".join(path))
            setattr(owner, last, nn.Parameter(part.clone()) if last in owner._parameters else part)
    for block in blocks[1:]:
        block.b_dec, block.W_skip = blocks[0].b_dec, blocks[0].W_skip
    return blocks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(1, 2), (4, 1), (2, 4)])
def test_loss_metrics_and_gradients_of_blocks_are_those_of_the_whole_in_float64(kind, counts):
    clt = drawn(kind)
    generator = torch.Generator().manual_seed(9)
    x, y = torch.randn(2, 3, 64, 32, generator=generator, dtype=torch.float64)
    weights = torch.rand(3, 64, generator=generator, dtype=torch.float64)
    is_dead = torch.rand(3, 24, generator=generator) < 0.4
    config = TrainConfig(
        sparsity_coefficient=0.05,
        sparsity_warmup=0.0,
        pre_act_coefficient=0.02,
        auxk=3,
        auxk_alpha=0.03,
        **KINDS[kind][1],
    )
    expected = objective(clt, x, y, config, step=0, is_dead=is_dead, row_weights=weights)
    torch.autograd.backward(expected.loss)
    layout = Layout(blocks=counts)
    blocks = cut(clt, layout)
    large = [p for block in blocks for p in (block.W_enc, *block.W_dec)]
    buffers = [GradientBuffers(large) for _ in layout.data_blocks]
    rows = [
        DataBlock(
            x[:, layout.rows(i, 64)], y[:, layout.rows(i, 64)], weights[:, layout.rows(i, 64)], buffers[i]
        )
        for i in layout.data_blocks
    ]
    dead = [is_dead[:, layout.features(j, 24)] for j in layout.feature_blocks]
    found = objective_of_blocks(blocks, rows, config, step=0, is_dead=dead, processes=Processes(layout))
    for name in ("loss", "nmse", "fvu", "sparsity", "pre_act", "auxk"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-12, atol=0, msg=name
        )
    assert torch.equal(found.active_counts, expected.active_counts)
    sums: dict[str, torch.Tensor] = {}
    for share, own in zip(found.shares, buffers, strict=True):
        for block in blocks:
            block.zero_grad(set_to_none=True)
        own.release()
        torch.autograd.backward(share)
        for name, _ in clt.named_parameters():
            gradients = [block.get_parameter(name).grad.clone() for block in blocks]
            gradient = joined(f"clt.{name}", gradients, Processes(layout))
            sums[name] = sums.get(name, 0) + gradient
    for name, parameter in clt.named_parameters():
        # Float64 sums in other orders.
        torch.testing.assert_close(sums[name], parameter.grad, rtol=1e-9, atol=1e-14, msg=name)
        assert bool(parameter.grad.any())
