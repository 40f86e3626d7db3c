"""A process forked from one that reads goes on reading, or is told at once why it cannot."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
from obstore.store import MemoryStore

from capture import open_store
from capture.reader import ActivationStore
from capture.remote import ObjectStore
from mdlm_interp.errors import StoreError
from tests.capture.stores import HEADS, MLP

ROWS = [3, 600]


def said_in_a_fork(read: Callable[[], object], answer: Path) -> str:
    """What a forked process is told: nothing if it reads, and nothing more if it waits for ever."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(20)
            read()
            status = 0
        except StoreError as error:
            answer.write_text(str(error))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    return answer.read_text() if answer.exists() else ""


def test_a_forked_process_reads_a_local_store_on(made, tmp_path):
    store = open_store(made.root)
    store.read([3], MLP)

    def read() -> None:
        for hook in (MLP, HEADS):  # a file that is open, and one that is not
            assert np.array_equal(store.read(ROWS, hook)[hook].numpy(), made.acts[hook][ROWS])

    assert said_in_a_fork(read, tmp_path / "answer") == ""


def test_a_forked_process_is_refused_an_object_store_and_does_its_parent_no_harm(made, tmp_path):
    place = ObjectStore(MemoryStore(), name="s3://bucket/run.zarr")
    for file in made.root.rglob("*"):
        if file.is_file():
            place.replace(file.relative_to(made.root).as_posix(), file.read_bytes())
    store = ActivationStore(place)
    store.read([3], MLP)
    reads = {"a hook": lambda: store.read(ROWS, HEADS), "the manifest": lambda: ActivationStore(place)}
    for name, read in reads.items():
        said = said_in_a_fork(read, tmp_path / name)
        assert said == (
            "s3://bucket/run.zarr cannot be reached from a process that was forked after a request to an object "
            'store; start it by "spawn" or "forkserver", and open the store there'
        )
    assert np.array_equal(store.read(ROWS, HEADS)[HEADS].numpy(), made.acts[HEADS][ROWS])
