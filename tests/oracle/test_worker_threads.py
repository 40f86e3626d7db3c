"""Worker threads that flush subnormal numbers, which a switch in the main thread does not show.

Each thread has its own switch and takes it from the thread that starts it. What a thread flushes stays with it, so
each case runs in a process of its own. Exact: the bits, or a refusal.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oracle import selftest

ROOT = Path(__file__).parents[2]

BEGIN = """
import threading, torch
from oracle import UntrustedMachineError, matrix_products, ops, plain_path, selftest

def start_workers(n):  # torch starts them at the first operation that is long enough
    torch.set_num_threads(n)
    torch.relu(torch.ones(4_000_000))

def flushing_ones(n):
    torch.set_flush_denormal(True)
    start_workers(n)
    torch.set_flush_denormal(False)

x, w = torch.full((400, 1000), 3 * 2.0**-149), torch.eye(1000)[:64] * 2.0**10
calls = {
    "linear": lambda: ops.linear(x, w),
    "linear of few terms": lambda: ops.linear(x[:, :2], w[:, :2]),
    "matmul": lambda: ops.matmul(x[:, :1].expand(400, 2), w[:2, :1000]),
    "scores": lambda: ops.attention_scores(x[None, :, None, :2], x[None, :, None, :2] * 2.0**60),
    "attention": lambda: ops.attention(*(x[None, :, None, :2],) * 3),
    "add": lambda: ops.add(x, x),
}

def refused(call):
    try:
        call()
    except UntrustedMachineError as error:
        return str(error)
    return ""
"""

SWITCHED_BETWEEN = """
torch.set_num_threads(1)
right = {name: call() for name, call in calls.items()}  # this machine is trusted from here on
flushing_ones(4)
for name, call in calls.items():
    assert "call torch.set_num_threads(1), or start the program again without" in refused(call), name
    with plain_path():
        assert refused(call), name
# The control: without the question the linear computes, and it is wrong.
ask = selftest.require_workers
matrix_products.require_workers = selftest.require_workers = lambda *_: None
wrong = ops.linear(x, w)
matrix_products.require_workers = selftest.require_workers = ask
print("wrong", int((wrong != right["linear"]).sum()) > 1000)
torch.set_num_threads(1)  # the advice
print("advice", all(torch.equal(call(), right[name]) for name, call in calls.items()))
"""

FROM_THE_FIRST = """
flushing_ones(4)  # before this machine is trusted
message = refused(calls["add"])
assert "a worker thread of torch flushes subnormal numbers" in message, message
assert "report it" not in message
torch.set_num_threads(1)
print("advice", calls["add"]()[0, 0].item() == 6 * 2.0**-149)
def check(total, good):
    if good > 1:
        start_workers(good)
    flushing_ones(total)
    if not refused(calls["add"]):
        print("missed", total, good)
for total in (2, 3, 4, 6):
    for good in {1, total - 1}:  # a new thread of Python's has workers of its own
        thread = threading.Thread(target=check, args=(total, good))
        thread.start()
        thread.join()
print("all seen")
"""


def run(code: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(autouse=True)
def can_flush() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    torch.set_flush_denormal(False)


def test_workers_that_were_started_flushing_after_the_first_trust_are_refused():
    assert run(SWITCHED_BETWEEN) == ["wrong True", "advice True"]


def test_workers_that_flush_from_the_first_are_refused_and_one_is_enough():
    assert run(FROM_THE_FIRST) == ["advice True", "all seen"]


def test_small_operations_wake_no_workers(monkeypatch):
    """Behavioural: below what torch shares out, and on one thread, the question costs nothing."""
    monkeypatch.setattr(selftest, "_subnormals", None)
    cpu = torch.device("cpu")
    assert torch.get_num_threads() == 1
    selftest.require_workers(cpu, 1 << 30)
    torch.set_num_threads(2)
    selftest.require_workers(cpu, selftest.SHARE // 2)
    with pytest.raises(TypeError):
        selftest.require_workers(cpu, selftest.SHARE // 2 + 1)
