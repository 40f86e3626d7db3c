"""Interruptions at a moment that a test chooses."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from capture import CaptureConfig, open_store, run_capture
from mdlm_interp import HookedMDLM


@contextmanager
def interrupted(*, at_work: threading.Event, then: Callable[[], object]) -> Iterator[None]:
    """Interrupt what the main thread waits for in this context.

    Args:
        at_work: Set by the thread that it waits for.
        then: Called a while after the interrupt.
    """
    entered = threading.Event()
    main = threading.main_thread().ident
    assert main == threading.get_ident(), "only the main thread is interrupted"
    assert main is not None

    def interrupt() -> None:
        entered.wait()
        at_work.wait(20)
        time.sleep(0.2)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.4)
        then()

    # A shell's background job begins with it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        entered.set()
        yield
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


def interrupted_capture(config: CaptureConfig, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Begin a capture, and interrupt it instead of the numbered pass of the model."""
    with monkeypatch.context() as patch:
        original, calls = HookedMDLM.forward, 0

        def failing(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        patch.setattr(HookedMDLM, "forward", failing)
        with pytest.raises(KeyboardInterrupt):
            run_capture(config)
    assert not open_store(config.out).complete
