"""Stages work jobs in order, hold few, and pass errors to whoever feeds them."""

import threading
import time

import pytest

from capture.stages import EndedError, Stage
from tests.capture.interrupts import interrupted


def waiting(gate: threading.Event) -> None:
    gate.wait()


def feed(stage: Stage[int], jobs: range) -> None:
    for job in jobs:
        stage.put(job)


def test_jobs_are_worked_in_order_and_all_before_close_returns():
    done: list[int] = []
    stage = Stage(done.append, depth=2, name="test")
    for job in range(50):
        stage.put(job)
    stage.close()
    assert done == list(range(50))


def test_no_more_jobs_wait_than_the_depth():
    gate, handed = threading.Event(), []
    stage: Stage[int] = Stage(lambda _: waiting(gate), depth=2, name="test")

    def feed():
        for job in range(6):
            stage.put(job)
            handed.append(job)

    feeder = threading.Thread(target=feed)
    feeder.start()
    time.sleep(0.2)
    # One is being worked, two wait, and the fourth is held back.
    assert len(handed) == 3
    gate.set()
    feeder.join()
    stage.close()
    assert len(handed) == 6


def test_an_error_reaches_the_feeder_and_nothing_after_it_is_worked():
    done: list[int] = []

    def work(job: int) -> None:
        if job == 3:
            raise OSError(5, "Input/output error")
        done.append(job)

    stage = Stage(work, depth=1, name="test")
    with pytest.raises(OSError, match="Input/output error"):
        feed(stage, range(100))
    with pytest.raises(OSError, match="Input/output error"):
        stage.close()
    assert done == [0, 1, 2]


def test_abandoning_drops_what_waits_and_leaves_no_thread():
    gate, done = threading.Event(), []

    def work(job: int) -> None:
        gate.wait()
        done.append(job)

    stage = Stage(work, depth=3, name="abandoned-stage")
    for job in range(3):
        stage.put(job)
    threading.Timer(0.05, gate.set).start()
    stage.abandon()
    assert len(done) <= 1
    assert not [thread for thread in threading.enumerate() if thread.name == "abandoned-stage"]


def test_a_wait_that_is_interrupted_leaves_no_thread():
    at_work, gate, done = threading.Event(), threading.Event(), []

    def work(job: int) -> None:
        at_work.set()
        gate.wait(20)
        done.append(job)

    stage = Stage(work, depth=3, name="interrupted-stage")
    for job in range(3):
        stage.put(job)
    with pytest.raises(KeyboardInterrupt), interrupted(at_work=at_work, then=gate.set):
        stage.close()
    assert done == [0]
    assert not [thread for thread in threading.enumerate() if thread.name == "interrupted-stage"]


def test_a_stage_may_be_abandoned_again_and_after_its_end():
    stage: Stage[int] = Stage(lambda _: None, depth=1, name="test")

    def end() -> None:
        stage.close()
        for _ in range(3):
            stage.abandon()

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    ending.join(20)
    assert not ending.is_alive()


def test_a_stage_that_has_ended_drops_no_job_in_silence():
    stage: Stage[int] = Stage(lambda _: None, depth=1, name="test")
    stage.close()
    with pytest.raises(EndedError):
        stage.put(1)


def test_who_waits_to_hand_a_job_over_is_let_go_at_the_end():
    gate = threading.Event()
    stage: Stage[int] = Stage(lambda _: waiting(gate), depth=1, name="test")
    ended: list[BaseException] = []

    def hand_over() -> None:
        try:
            feed(stage, range(9))
        except EndedError as error:
            ended.append(error)

    feeder = threading.Thread(target=hand_over, daemon=True)
    feeder.start()
    time.sleep(0.1)
    threading.Timer(0.1, gate.set).start()
    stage.abandon()
    feeder.join(20)
    assert not feeder.is_alive()
    assert len(ended) == 1
