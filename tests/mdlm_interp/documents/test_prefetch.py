"""Iterators that run ahead: the same items and errors, no further than they may, and no thread left over."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time

import pytest

from mdlm_interp.documents import Document, document_blocks, prefetched, token_blocks


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetched"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """Nothing here leaves one behind."""
    assert threads() == []
    yield
    assert threads() == []


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_items_are_the_same_in_the_same_order(depth):
    assert list(prefetched(range(100), depth)) == list(range(100))
    assert list(prefetched([], depth)) == []
    assert list(prefetched([None, False, 0], depth)) == [None, False, 0]


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_items_are_made_ahead(depth):
    """Exact: counted when the thread cannot go further."""
    made = []

    def items():
        for number in range(50):
            made.append(number)
            yield number

    stream = prefetched(items(), depth)
    for taken in range(1, 5):
        next(stream)
        deadline = time.monotonic() + 30
        while len(made) < taken + depth and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == taken + depth
    stream.close()


def test_items_are_made_while_the_consumer_is_busy():
    """Behavioural: the second is there although nobody asked for it."""
    second = threading.Event()

    def items():
        yield 1
        second.set()
        yield 2

    stream = prefetched(items())
    assert next(stream) == 1
    assert second.wait(30)
    assert list(stream) == [2]


class OddError(BaseException):
    """Not even an Exception."""


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), OddError()])
def test_an_error_comes_after_the_items_before_it_and_once(error):
    def items():
        yield 1
        yield 2
        raise error

    stream = prefetched(items(), 5)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(type(error)) as caught:
        next(stream)
    assert caught.value is error
    assert list(stream) == []


@pytest.mark.parametrize("stop", ["close", "drop", "error"])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_consumer_that_stops_early_stops_the_thread_and_closes_the_source(stop, taken):
    """Exact: the source's own clean-up has run, whether the thread was waiting or at work."""
    closed = []

    def items():
        try:
            yield from range(1000)
        finally:
            closed.append(True)

    stream = prefetched(items())
    for _ in range(taken):
        next(stream)
    if stop == "close":
        stream.close()
    elif stop == "error":
        with pytest.raises(RuntimeError):
            stream.throw(RuntimeError("the consumer failed"))
    del stream
    gc.collect()
    assert closed == ([True] if taken else [])
    assert threads() == []


def test_blocks_leave_no_thread_and_no_open_file(gpt2_tokenizer, write):
    """Exact, for a consumer that leaves its loop; an open file would be a warning, and so an error."""
    from mdlm_interp.documents import read_documents

    path = write("a.jsonl", '{"text": "one two three"}\n' * 5000)
    for cut in (token_blocks, document_blocks):
        for number, _ in enumerate(cut(read_documents([path]), gpt2_tokenizer, 8)):
            assert len(threads()) == 1
            if number == 3:
                break
        gc.collect()
        assert threads() == []
        assert f"{path}" not in open_files()


@pytest.mark.parametrize("cut", [token_blocks, document_blocks])
def test_an_error_in_the_blocks_stops_the_thread_while_the_error_is_kept(gpt2_tokenizer, cut):
    """Exact: an exception keeps the frames that it went through, and with them all that these hold."""
    stream = cut((Document("some text", 0, n) for n in range(10_000)), gpt2_tokenizer, 8)
    next(stream)
    with pytest.raises(RuntimeError) as caught:
        stream.throw(RuntimeError("the consumer failed"))
    assert threads() == []
    assert caught.tb is not None


def open_files() -> list[str]:
    folder = "/proc/self/fd"
    if not os.path.isdir(folder):
        pytest.skip("open files are listed under /proc on Linux only")
    found = []
    for name in os.listdir(folder):
        try:
            found.append(os.readlink(f"{folder}/{name}"))
        except FileNotFoundError:  # the one that listed them
            continue
    return found


def test_a_bad_document_is_an_error_of_the_blocks(gpt2_tokenizer):
    def documents():
        for number in range(1500):
            yield Document(f"text {number}", 0, number)
        raise ValueError("broken")

    expected = list(token_blocks((Document(f"text {n}", 0, n) for n in range(1000)), gpt2_tokenizer, 16))
    assert len(expected) > 10
    found: list[list[int]] = []
    stream = token_blocks(documents(), gpt2_tokenizer, 16)
    with pytest.raises(ValueError, match="broken"):
        found.extend(block.ids.tolist() for block in stream)
    assert found == [block.ids.tolist() for block in expected]


FORKING = """
import os
from mdlm_interp.documents import prefetched

stream = prefetched(range(5))
print(next(stream), flush=True)
child = os.fork()
if child == 0:
    try:
        next(stream)
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), list(stream))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_told_that_the_thread_stayed_behind():
    """Behavioural: it would wait for ever otherwise; the parent goes on."""
    result = run(FORKING)
    assert result.stdout.splitlines() == [
        "0",
        "a prefetched iterator does not survive a fork; start it afterwards",
        "7 [1, 2, 3, 4]",
    ], result.stderr


PROGRAM = """
import atexit, sys, threading
from mdlm_interp.documents import Document, token_blocks
from mdlm_interp.tokenizers import load_tokenizer

# Runs after what is registered later.
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))

def endless():
    number = 0
    while True:
        yield Document("some text about nothing", 0, number)
        number += 1

blocks = token_blocks(endless(), load_tokenizer(sys.argv[1]), 64)
print(len(next(blocks).ids))
if sys.argv[2] == "error":
    raise RuntimeError("failed")
"""


@pytest.mark.parametrize(("way", "code"), [("end", 0), ("error", 1)])
def test_a_program_that_ends_with_an_open_stream_ends_cleanly(gpt2_directory, way, code):
    """Exact: the thread ends while the interpreter is still whole, and is not waited for for ever."""
    result = run(PROGRAM, str(gpt2_directory), way)
    assert result.stdout == "64\n['MainThread']\n"
    assert result.returncode == code
    assert ("RuntimeError: failed" in result.stderr) == (way == "error")
    assert "fatal" not in result.stderr.lower()
