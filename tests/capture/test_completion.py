"""A kill at any of the last events of a completion, and the same call makes the uninterrupted store of it."""

import filecmp
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from capture import open_store, run_capture
from capture.places import Directory

LAST_EVENTS = 40
"""From well before the manifest of the complete store to the removal of the last lock."""

PROGRAM = """
import ast, os, sys
from pathlib import Path
from capture import finish, schema
from capture.places import Directory

schema.CHUNK_ROWS = 16
EVENTS = {"open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.rmtree"}

def complete(root, hook, shapes, rows):
    place = Directory(Path(root))
    layout = schema.Layout(shapes=shapes, length=24, shard_rows=64)
    sys.addaudithook(hook)
    with place.lock("rank-0"), place.lock("finish", wait=True):
        finish.finish(place, layout, world_size=1, rows=rows)

def killed_at(root, number, shapes, rows):
    '''Number of events of a completion that ends at that one, which does not happen; in a process of its own.'''
    reading, writing = os.pipe()
    if os.fork() == 0:
        seen = 0
        def hook(event, arguments):
            nonlocal seen
            if event in EVENTS and root in str(arguments[0] if arguments else ""):
                seen += 1
                if seen == number:
                    os.write(writing, str(seen).encode())
                    os._exit(0)
        complete(root, hook, shapes, rows)
        os.write(writing, str(seen).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        found = stream.read()
    os.wait()
    return int(found)

whole, shapes, rows, *copies = sys.argv[1:]
total = killed_at(whole, 0, ast.literal_eval(shapes), int(rows))
for back, copy in enumerate(copies):
    assert killed_at(copy, total - back, ast.literal_eval(shapes), int(rows)) == total - back
print(total)
"""


def same_trees(left: Path, right: Path) -> bool:
    """What `diff -r` finds nothing in: the same directories and files, byte for byte."""
    trees = [sorted(path.relative_to(root) for path in root.rglob("*")) for root in (left, right)]
    files = [path for path in trees[0] if (left / path).is_file()]
    return trees[0] == trees[1] and filecmp.cmpfiles(left, right, files, shallow=False)[1:] == ([], [])


def test_a_kill_at_any_of_the_last_events_of_a_completion_is_made_good(
    config, small_shards, monkeypatch, tmp_path
):
    whole = run_capture(replace(config, out=config.out + ".whole"))
    ready = tmp_path / "ready.zarr"

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("capture.run.finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_capture(replace(config, out=str(ready)))
    copies = [tmp_path / f"killed{back}.zarr" for back in range(LAST_EVENTS)]
    uninterrupted = tmp_path / "uninterrupted.zarr"
    for copy in (*copies, uninterrupted):
        shutil.copytree(ready, copy)
    shapes = {hook: whole.row_shape(hook) for hook in whole.hooks}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(uninterrupted), repr(shapes), "504", *map(str, copies)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert int(done.stdout) > LAST_EVENTS
    assert same_trees(uninterrupted, whole.path)
    states = [(open_store(copy).complete, same_trees(copy, whole.path)) for copy in copies]
    # Kills before and after the last commit, and none that left nothing to do.
    assert {complete for complete, _ in states} == {True, False}
    assert not any(same for _, same in states)
    for copy in copies:
        assert run_capture(replace(config, out=str(copy))).complete
        assert same_trees(copy, whole.path), copy.name


def test_a_complete_store_that_nobody_may_write_is_no_obstacle(config, monkeypatch):
    """Exact: with nothing to clean up, no lock is taken."""
    run_capture(config)

    def refusing(self: Directory, name: str, *, wait: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self.root))

    monkeypatch.setattr(Directory, "lock", refusing)
    assert run_capture(config).complete
