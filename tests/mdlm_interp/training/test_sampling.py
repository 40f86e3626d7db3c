"""The order in which a text is seen: a pure function of (seed, index), each block once an epoch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mdlm_interp.errors import DataError
from mdlm_interp.training.sampling import PackedSampler, WindowSampler, sampler_of

STREAM = np.arange(1000, 1000 + 107, dtype=np.uint16)


def packed(batch_size: int = 4, seed: int = 0, wrap_with: int | None = None) -> PackedSampler:
    return PackedSampler(stream=STREAM, length=10, batch_size=batch_size, seed=seed, wrap_with=wrap_with)


def blocks_of(sampler: PackedSampler, epoch: int) -> list[list[int]]:
    first = epoch * sampler.steps_per_epoch
    return [row for step in range(sampler.steps_per_epoch) for row in sampler.batch(first + step).tolist()]


def test_an_epoch_has_each_block_once_and_the_next_one_in_another_order():
    sampler = packed()
    whole = [STREAM[start : start + 10].tolist() for start in range(0, 100, 10)]
    epochs = [blocks_of(sampler, epoch) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == whole
        assert epoch != whole
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != blocks_of(packed(seed=1), 0)


def test_the_last_window_of_an_epoch_has_the_rows_that_are_left():
    sampler = packed()
    assert (sampler.n_blocks, sampler.steps_per_epoch) == (10, 3)
    assert [len(sampler.indices(step)) for step in range(7)] == [4, 4, 2, 4, 4, 2, 4]
    numbers = [index for step in range(6) for index in sampler.indices(step)]
    assert numbers == list(range(20))
    assert packed(batch_size=5).steps_per_epoch == 2
    assert packed(batch_size=100).steps_per_epoch == 1


def test_the_block_of_a_number_does_not_depend_on_the_windows():
    """Exact: the same order in windows of any size, read forwards or backwards."""
    rows = {size: blocks_of(packed(size), 1) for size in (1, 3, 4, 10)}
    assert rows[1] == rows[3] == rows[4] == rows[10]
    sampler = packed()
    backwards = [sampler.batch(step) for step in (5, 4, 3)]
    assert all(
        torch.equal(a, b)
        for a, b in zip(backwards, [packed().batch(step) for step in (5, 4, 3)], strict=True)
    )


def test_wrapped_blocks_stand_between_end_of_texts():
    sampler = packed(wrap_with=7)
    rows = blocks_of(sampler, 0)
    assert (sampler.n_blocks, len(rows)) == (13, 13)
    assert all(row[0] == row[-1] == 7 and len(row) == 10 for row in rows)
    inner = sorted(row[1:-1] for row in rows)
    assert [token for row in inner for token in row] == STREAM[:104].tolist()


def test_every_order_of_a_few_blocks_comes_up():
    """Behavioural: 24 orders of four blocks, each within five deviations of its share of 2400 epochs."""
    sampler = PackedSampler(stream=STREAM[:40], length=10, batch_size=4, seed=5)
    seen: dict[tuple[int, ...], int] = {}
    for epoch in range(2400):
        order = tuple(sampler.block(index) for index in sampler.indices(epoch))
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert all(abs(count - 100) < 5 * 98**0.5 for count in seen.values())


def test_crops_lie_anywhere_and_a_number_always_crops_the_same():
    def crops(batch_size: int) -> WindowSampler:
        return WindowSampler(
            stream=STREAM,
            length=10,
            batch_size=batch_size,
            eos_id=0,
            seed=3,
            wrap_share=0.0,
            short_share=0.0,
        )

    rows = crops(50).batch(0)
    assert torch.equal(rows[20:40], crops(20).batch(1))
    starts = rows[:, 0] - 1000
    assert torch.equal(rows, starts[:, None] + 1000 + torch.arange(10))
    many = torch.cat([crops(100).batch(step)[:, 0] for step in range(20)]) - 1000
    # Behavioural: all 98 places, the first and the last among them, in 2000 crops.
    assert sorted(set(many.tolist())) == list(range(98))


@pytest.mark.parametrize(("wrap_share", "expected"), [(0.0, None), (1.0, 9)])
def test_the_config_chooses_the_sampler(learner_config, wrap_share, expected):
    chosen = sampler_of(replace(learner_config, wrap_share=wrap_share), STREAM, 9)
    assert isinstance(chosen, PackedSampler)
    assert (chosen.wrap_with, chosen.batch_size, chosen.length) == (expected, 7, 24)
    assert isinstance(sampler_of(replace(learner_config, order="random"), STREAM, 9), WindowSampler)


def test_a_stream_shorter_than_a_sequence_is_refused(learner_config):
    with pytest.raises(
        DataError, match=r"the training text has 23 tokens, fewer than one window of 24; give"
    ):
        sampler_of(learner_config, STREAM[:23], 9)
