"""Attention received, the sink and its moves, against loops over queries."""

import math

import pytest
import torch

from mdlm_interp.analysis import attention_sinks, sigma_at
from mdlm_interp.analysis.sinks import QUERIES, Sinks
from mdlm_interp.errors import DataError


@pytest.mark.parametrize("queries", QUERIES)
def test_received_attention_is_the_mean_over_the_queries_that_count(exact, trajectory, queries):
    found = attention_sinks(exact, trajectory, queries=queries)
    for step in range(trajectory.n_steps):
        x = trajectory.states[step]
        _, cache = exact.run_with_cache(x, "*.hook_pattern", timesteps=sigma_at(trajectory, step))
        for layer in range(2):
            pattern = cache["attn.hook_pattern", layer]
            for b in range(2):
                wanted = [
                    q
                    for q in range(x.shape[1])
                    if queries == "all" or (int(x[b, q]) == trajectory.mask_id) == (queries == "masked")
                ]
                got = found.received[step, layer, :, b]
                if not wanted:
                    assert bool(got.isnan().all())
                    assert found.position[step, layer, :, b].tolist() == [-1] * 3
                    continue
                expected = sum(pattern[b, :, q] for q in wanted) / len(wanted)
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
                assert found.position[step, layer, :, b].tolist() == expected.argmax(-1).tolist()
                torch.testing.assert_close(got.sum(-1), torch.ones(3).double(), rtol=1e-12, atol=0)
                for head in range(3):
                    token = int(x[b, int(expected[head].argmax())])
                    assert float(found.on_mask[step, layer, head, b]) == float(token == trajectory.mask_id)


def made():
    """One layer, one head, one sequence of four positions; no queries in the last state."""
    received = torch.tensor(
        [[0.1, 0.2, 0.6, 0.1], [0.7, 0.1, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1], [math.nan] * 4],
        dtype=torch.float64,
    )
    masked = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    return Sinks(
        steps=(0, 2, 3, 4),
        layers=(5,),
        rows=(1,),
        queries="masked",
        tokens=torch.arange(16).reshape(4, 1, 4),
        is_masked=masked[:, None],
        received=received[:, None, None, None],
    )


def test_share_moves_and_summary_of_a_drift_written_by_hand():
    sinks = made()
    assert sinks.position.flatten().tolist() == [2, 0, 0, -1]  # the first of equals
    assert sinks.share.flatten()[:3].tolist() == pytest.approx([0.6, 0.7, 0.4])
    assert sinks.moved.flatten().nan_to_num(-1).tolist() == [2.0, 0.0, -1.0]
    assert sinks.on_mask.flatten().nan_to_num(-1).tolist() == [1.0, 0.0, 1.0, -1.0]
    (row,) = sinks.summary()
    assert (row["layer"], row["head"], row["moves"], row["mean_distance"]) == (5, 0, 0.5, 2.0)
    assert row["share"] == pytest.approx(17 / 30)
    assert row["on_mask"] == pytest.approx(2 / 3)
    assert row["distinct_positions"] == 2
    table = sinks.table()
    assert [entry["step"] for entry in table] == [0, 2, 3]
    assert table[1] == {
        "step": 2, "layer": 5, "head": 0, "row": 1, "position": 0, "token": 4, "is_masked": False, "share": 0.7,
    }  # fmt: skip


def test_chosen_steps_layers_and_rows_are_a_part_of_the_whole(exact, trajectory):
    whole = attention_sinks(exact, trajectory)
    part = attention_sinks(exact, trajectory, steps=[4, 0], layers=[1], rows=[1])
    torch.testing.assert_close(part.received, whole.received[[4, 0]][:, [1]][..., [1], :], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [2]}, r"layers must be in \[0, 2\), got 2"),
        ({"steps": [70]}, r"steps must be in \[0, \d\), got 70"),
        ({"queries": "mask"}, "queries must be all, masked or unmasked, got 'mask'; did you mean 'masked'"),
    ],
)
def test_what_is_out_of_range_is_named(exact, trajectory, unchecked, settings, message):
    with pytest.raises(DataError, match=message):
        attention_sinks(exact, trajectory, **settings)
