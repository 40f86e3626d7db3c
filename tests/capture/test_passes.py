"""Forward passes side by side: the batches' order, the same bytes, errors in their place, threads given back."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.__config__ import parallel_info

from capture import run_capture
from capture.forward import Forward
from capture.native import on_threads
from capture.passes import AHEAD, Passes, Shares
from capture.plan import Batch
from capture.request import prepared
from capture.row_pool import RowPool
from capture.verify import verify_store
from capture.writer import WAITING_BATCHES, StoreWriter
from mdlm_interp.errors import ConfigError, HookError
from mdlm_interp.layers import Block

HOOKS = ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]


@pytest.fixture
def four_threads():
    with on_threads(4):
        yield


def number_in_a_thread() -> int:
    """Torch's threads in a thread that begins now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.fixture
def planned(config):
    """A forward pass and six batches of four sequences."""
    request = prepared(replace(config, batch_size=4))
    forward = Forward(request.network, HOOKS, together=True)
    return forward, list(request.batches(None))


def slower_first(monkeypatch):
    """The first pass to start of each pair ends last; names of the threads that ran one."""
    run, names, numbers = Forward._run, [], iter(range(1000))

    def slow(self, *args):
        if next(numbers) % 2 == 0:
            time.sleep(0.1)
        names.append(threading.current_thread().name)
        run(self, *args)

    monkeypatch.setattr(Forward, "_run", slow)
    return names


def test_activations_come_in_the_order_of_the_batches_whichever_pass_ends_first(
    planned, monkeypatch, four_threads
):
    forward, batches = planned
    with on_threads(2):
        alone = [
            {hook: acts.clone() for hook, acts in forward(batch, check=True).items()} for batch in batches
        ]
    names = slower_first(monkeypatch)
    with Passes(forward, Shares.of(None, alone=False)) as passes:
        for number, (batch, lent) in enumerate(passes.run((batch, True) for batch in batches)):
            assert batch is batches[number]
            assert lent is not None
            for hook in HOOKS:
                assert torch.equal(lent[0][hook], alone[number][hook])
            lent[1]()
    assert len(set(names)) == 2


def test_each_pass_has_its_share_of_the_threads_and_the_caller_all_of_them_again(
    planned, monkeypatch, four_threads
):
    forward, batches = planned
    seen, run = [], Forward._run

    def counting(self, *args):
        run(self, *args)
        # What OpenMP and MKL, where torch has them, take for an operation of this thread.
        seen.append(
            {torch.get_num_threads(), *map(int, re.findall(r"_max_threads\(\) : (\d+)", parallel_info()))}
        )

    monkeypatch.setattr(Forward, "_run", counting)
    with Passes(forward, Shares(2, 2)) as passes:
        for _ in passes.run((batch, False) for batch in batches):
            pass
    assert seen == [{2}] * len(batches)
    assert number_in_a_thread() == torch.get_num_threads() == 4


def test_other_threads_have_the_callers_number_while_passes_run(planned, four_threads):
    forward, batches = planned
    with Passes(forward, Shares(2, 2)) as passes:
        for _ in passes.run((batch, False) for batch in batches):
            assert number_in_a_thread() == torch.get_num_threads() == 4


@pytest.mark.parametrize("failing", [1, 2])
def test_threads_that_cannot_begin_leave_none_behind(planned, monkeypatch, four_threads, failing):
    """The process would wait for them for ever at its end."""
    forward, _ = planned
    start, numbers = threading.Thread.start, iter(range(1, 10))

    def refused(self):
        if next(numbers) == failing:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="can't start new thread"), Passes(forward, Shares(2, 2)):
        pass
    monkeypatch.setattr(threading.Thread, "start", start)
    assert number_in_a_thread() == torch.get_num_threads() == 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("capture-forward")]


def test_batches_of_others_keep_their_place(planned, four_threads):
    forward, batches = planned
    with Passes(forward, Shares(2, 2)) as passes:
        jobs = ((batch, None if number % 2 else False) for number, batch in enumerate(batches))
        found = [(batch, lent is not None) for batch, lent in passes.run(jobs)]
    assert found == [(batch, number % 2 == 0) for number, batch in enumerate(batches)]


def test_few_batches_are_read_ahead(planned, four_threads):
    forward, batches = planned
    read = []

    def jobs():
        for batch in batches:
            read.append(batch)
            yield batch, False

    with Passes(forward, Shares(2, 2)) as passes:
        for number, _ in enumerate(passes.run(jobs())):
            assert len(read) <= number + 2 + AHEAD + 1


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_slow_disk_holds_no_more_batches_in_memory_than_may_be_under_way(
    config, monkeypatch, four_threads, passes
):
    """Exact: those that are computed, ahead or handed over, and those that wait for the disk or are written."""
    take, write, lent, most = RowPool.take, StoreWriter._write, set(), 0
    allowed = (passes + AHEAD if passes > 1 else 0) + 1 + WAITING_BATCHES + 1

    def counting(self, rows, room=0):
        nonlocal most
        acts, release = take(self, rows, room)
        key = next(iter(acts.values())).data_ptr()
        lent.add(key)
        most = max(most, len(lent))

        def back():
            lent.remove(key)
            release()

        return acts, back

    def held(self, rows):
        deadline = time.monotonic() + 60
        while most < allowed and time.monotonic() < deadline:
            time.sleep(0.01)
        if not rows.start:
            time.sleep(0.3)  # time for one too many
        write(self, rows)

    monkeypatch.setattr(RowPool, "take", counting)
    monkeypatch.setattr(StoreWriter, "_write", held)
    run_capture(replace(config, batch_size=1, forwards=passes))
    assert most == allowed
    assert not lent


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_store_depends_on_the_threads_of_a_pass_and_not_on_how_many_run(
    config, small_shards, four_threads, tmp_path, passes
):
    with on_threads(2):
        alone = run_capture(replace(config, batch_size=4, out=str(tmp_path / "alone"), forwards=1))
    with on_threads(2 * passes):
        found = run_capture(replace(config, batch_size=4, forwards=passes))
    assert found.provenance["threads"] == 2
    assert found.fingerprint() == alone.fingerprint()


def test_exact_passes_side_by_side_give_the_same_bytes(config, small_shards, four_threads, tmp_path):
    exact = replace(config, batch_size=4, arithmetic="exact", hooks=(HOOKS[0],))
    alone = run_capture(replace(exact, out=str(tmp_path / "alone")))
    assert alone.provenance["threads"] == 4  # one pass has them all
    assert run_capture(replace(exact, forwards=2)).fingerprint() == alone.fingerprint()


def test_a_store_is_verified_bit_for_bit_on_the_threads_it_was_made_with(config, small_shards, four_threads):
    store = run_capture(replace(config, batch_size=4))
    with on_threads(3):
        found = verify_store(store.path, batches=100)
        assert torch.get_num_threads() == 3
    assert found.bitwise
    assert found.largest == 0.0


def test_an_error_comes_where_its_batch_is_due_and_everything_ends(planned, monkeypatch, four_threads):
    forward, batches = planned
    run = Forward._run
    bad = batches[2].sequences

    def broken(self, sequences, *args):
        if sequences is bad:
            raise HookError("the third batch is bad")
        run(self, sequences, *args)

    monkeypatch.setattr(Forward, "_run", broken)
    done: list[Batch] = []
    with pytest.raises(HookError, match="the third batch is bad"), Passes(forward, Shares(2, 2)) as passes:
        done.extend(batch for batch, _ in passes.run((batch, False) for batch in batches))
    assert done == batches[:2]
    assert torch.get_num_threads() == 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("capture-forward")]


@pytest.mark.parametrize("pack", ["blocks", "documents"])
def test_an_interrupted_capture_waits_for_no_more_than_a_block(
    config, monkeypatch, small_shards, four_threads, pack
):
    """Exact: of the two passes that are in their first block then, none begins its second."""
    inside, shut, begun = threading.Barrier(3), threading.Event(), []
    block, shutdown = Block.forward, ThreadPoolExecutor.shutdown

    def held(self, *args):
        if not threading.current_thread().name.startswith("capture-forward"):
            return block(self, *args)  # of the probe of native bits
        if not shut.is_set():
            inside.wait(60)
            assert shut.wait(60)
        begun.append(self)
        return block(self, *args)

    def shutting(self, *args, **kwargs):
        if self._thread_name_prefix == "capture-forward":
            shut.set()
        shutdown(self, *args, **kwargs)

    class Interrupting(Passes):
        def run(self, jobs):
            assert self._threads is not None
            for job in [next(iter(jobs)) for _ in range(2)]:
                self._threads.submit(self._one, *job)
            inside.wait(60)
            raise KeyboardInterrupt
            yield

    monkeypatch.setattr(Block, "forward", held)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutting)
    monkeypatch.setattr("capture.run.Passes", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        run_capture(replace(config, batch_size=4, pack=pack, hooks=("hook_logits",)))
    assert len(begun) == 2


def test_a_twin_has_the_same_weights_and_hook_points_of_its_own(planned):
    forward, batches = planned
    twin = forward.twin()
    for mine, other in zip(forward._model.parameters(), twin._model.parameters(), strict=True):
        assert mine is other
    heard = []
    with forward._model.hooks({HOOKS[0]: lambda acts, hook: heard.append(hook)}, read_only=True):
        twin(batches[0], check=False)
    assert not heard


@pytest.mark.parametrize(
    ("threads", "passes", "alone", "expected"),
    [
        (8, None, False, (2, 4)),
        (1, None, False, (1, 1)),
        (8, None, True, (1, 8)),
        (8, 3, True, (3, 2)),
        (1, 2, False, (2, 1)),
    ],
)
def test_threads_are_shared_out(threads, passes, alone, expected):
    with on_threads(threads):
        shares = Shares.of(passes, alone=alone)
    assert (shares.passes, shares.threads) == expected


def test_passes_below_one_and_beside_a_sampler_are_refused(config):
    with pytest.raises(ConfigError, match="forwards must be at least 1, got 0"):
        replace(config, forwards=0)
    from capture.sampler_source import SamplerSource

    with pytest.raises(ConfigError, match="forwards must be 1 with a sampler"):
        replace(config, files=(), sampler=SamplerSource(), forwards=2)


def test_documents_of_any_length_take_one_piece_of_memory(config):
    """Exact: memory that a longer document replaced would leave gaps behind, more the longer the capture."""
    documents = replace(config, pack="documents", batch_size=2, length=32, max_sequences=None)
    request = prepared(documents)
    batches = sorted(request.batches(None), key=lambda batch: batch.stop - batch.start)
    assert len({batch.stop - batch.start for batch in batches}) > 3
    places = set()
    with Passes(Forward(request.network, HOOKS, together=False), Shares(1, 1)) as passes:
        for batch, lent in passes.run((batch, False) for batch in batches):
            assert lent is not None
            assert len(lent[0][HOOKS[0]]) == batch.stop - batch.start
            places.add(lent[0][HOOKS[0]].data_ptr())
            lent[1]()
    assert len(places) == 1
