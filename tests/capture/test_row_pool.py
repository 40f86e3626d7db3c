"""Memory is lent to one batch at a time, and again when it comes back."""

import torch

from capture.row_pool import RowPool

SHAPES = {"a": (3,), "b": (2, 5)}


def address(acts):
    return {hook: values.data_ptr() for hook, values in acts.items()}


def test_what_is_lent_has_the_asked_shape():
    acts, _ = RowPool(SHAPES).take(7)
    assert {hook: tuple(values.shape) for hook, values in acts.items()} == {"a": (7, 3), "b": (7, 2, 5)}
    assert all(values.dtype == torch.float32 and values.is_contiguous() for values in acts.values())


def test_memory_is_used_again_after_it_was_given_back_and_not_before():
    pool = RowPool(SHAPES)
    first, release = pool.take(7)
    second, _ = pool.take(7)
    assert not set(address(first).values()) & set(address(second).values())
    before = address(first)
    release()
    shorter, release = pool.take(4)
    assert address(shorter) == before
    assert len(shorter["a"]) == 4
    release()
    again, _ = pool.take(7)
    assert address(again) == before


def test_a_longer_batch_gets_more_memory():
    pool = RowPool(SHAPES)
    _, release = pool.take(4)
    release()
    longer, _ = pool.take(9)
    assert len(longer["b"]) == 9
    longer["b"].fill_(1)  # all of it is there


def test_new_memory_has_room_for_a_larger_batch():
    pool = RowPool(SHAPES)
    first, release = pool.take(4, 9)
    assert len(first["a"]) == 4
    before = address(first)
    release()
    larger, _ = pool.take(9, 9)
    assert address(larger) == before
