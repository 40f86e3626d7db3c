"""An export is there whole or not at all, and what cannot work is refused before anything is written."""

import errno
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from capture import open_store
from capture.convert import export_store
from capture.convert.selection import Selection
from mdlm_interp.errors import ConfigError, OutputExistsError, StoreError, WriteError
from tests.capture.convert.conftest import FORMATS
from tests.capture.stores import LENGTH, Plan, make_store

ROOT = Path(__file__).parents[3]
LAYERS = {f"blocks.{layer}.{name}": (64,) for layer in (0, 1) for name in ("mlp.hook_in", "hook_mlp_out")}
TARGETS = (*FORMATS, "crosslayer-coding")


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """Each format that can be written."""
    name: str = request.param
    return name


@pytest.fixture
def layers(another):
    """A store that every format can take."""
    return another(Plan(shapes=LAYERS))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_there_already_is_refused_and_left_alone(layers, tmp_path, target):
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(OutputExistsError, match=rf"^{out} exists.*; choose another path or remove it first$"):
        export_store(layers, out, to=target)
    assert out.read_text() == "mine"
    out.unlink()
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError, match=rf"^{out} exists"):
        export_store(layers, out, to=target)
    out.unlink()
    (out / "inner").mkdir(parents=True)
    with pytest.raises(
        OutputExistsError, match=rf"^{out} (exists and is not empty|is a directory; name the HDF5 file)"
    ):
        export_store(layers, out, to=target)
    assert names(out) == ["inner"]


def test_an_export_into_its_own_store_is_refused(layers, target):
    inside = layers.path / "out"
    with pytest.raises(OutputExistsError, match=rf"^{inside} lies in the store itself; choose another path$"):
        export_store(layers, inside, to=target)
    assert not inside.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, StoreError("damaged")])
def test_an_export_that_is_interrupted_leaves_nothing(layers, tmp_path, target, monkeypatch, error):
    before, acts, calls = names(tmp_path), Selection.acts, []

    def interrupted(self, hook, start, stop, out=None):
        calls.append(hook)
        if len(calls) == 4:
            raise error
        return acts(self, hook, start, stop, out)

    monkeypatch.setattr(Selection, "acts", interrupted)
    with pytest.raises((KeyboardInterrupt, StoreError)):
        export_store(layers, tmp_path / "out", to=target)
    assert len(calls) == 4
    assert names(tmp_path) == before


def test_a_killed_exports_remains_are_no_export_and_no_obstacle(layers, tmp_path, target):
    remains = tmp_path / ".partial-out"
    if target == "hdf5":
        remains.write_bytes(b"half")
    else:
        remains.mkdir()
        (remains / "store.json").write_text("half")
    export_store(layers, tmp_path / "out", to=target)
    assert not remains.exists()


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(layers, tmp_path, target):
    program = (
        "import resource, signal, sys\n"
        "from mdlm_interp.__main__ import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    before = names(tmp_path)
    command = ["capture", "export", str(layers.path), "--to", target, "--out", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-c", program, *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    # 139 would be HDF5's crash at exit.
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert f"error: {tmp_path / 'out'} cannot be written: File too large; " in result.stderr
    assert names(tmp_path) == before


@pytest.mark.parametrize("target", ["hdf5", "crosslayer-coding"])
def test_an_export_stops_soon_after_a_write_that_fails(layers, tmp_path, target, monkeypatch):
    pwrite, acts, calls = os.pwrite, Selection.acts, []

    def full(descriptor, data, offset):
        if len(data) > 10_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    def counted(self, hook, start, stop, out=None):
        calls.append(hook)
        return acts(self, hook, start, stop, out)

    monkeypatch.setattr("capture.convert.sink.os.pwrite", full)
    monkeypatch.setattr(Selection, "acts", counted)
    with pytest.raises(WriteError, match=r"out cannot be written: No space left on device; free some space"):
        export_store(layers, tmp_path / "out", to=target)
    assert len(calls) <= 5  # HDF5 holds the first chunks back; there are 12 or 16 blocks


def test_an_export_that_the_disk_cannot_hold_is_refused(layers, tmp_path, target, monkeypatch):
    monkeypatch.setattr("capture.places.Directory.free_bytes", lambda self: 100_000)
    with pytest.raises(
        StoreError, match=r"out needs [\d.]+ kB and its disk has 100.0 kB free; export fewer --hooks"
    ):
        export_store(layers, tmp_path / "out", to=target)
    export_store(layers, tmp_path / "out", to=target, max_rows=80)


def test_an_incomplete_store_is_refused_unless_asked_for(another, tmp_path, target):
    store = another(Plan(shapes=LAYERS, complete=False, committed_shards=1))
    message = (
        rf"^{store.path} is incomplete \(512 of about \d+ rows\): .* export what there is with --incomplete$"
    )
    with pytest.raises(StoreError, match=message):
        export_store(store, tmp_path / "out", to=target)
    assert export_store(store, tmp_path / "out", to=target, incomplete=True).rows == 512


@pytest.mark.parametrize("target", ["hdf5", "crosslayer-coding"])
def test_without_h5py_one_line_names_the_extra(layers, tmp_path, target, monkeypatch):
    export_store(layers, tmp_path / "out.h5", to="hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    message = r"^HDF5 files need h5py, which is not installed: pip install 'mdlm-interp\[hdf5\]'$"
    with pytest.raises(ConfigError, match=message):
        export_store(layers, tmp_path / "out", to=target)
    with pytest.raises(ConfigError, match=message):
        open_store(tmp_path / "out.h5")
    export_store(layers, tmp_path / "fine", to="safetensors")
    assert open_store(tmp_path / "fine").fingerprint() == layers.fingerprint()


def test_h5py_is_imported_only_when_it_is_used(layers, tmp_path):
    program = (
        "import sys\n"
        "from capture import open_store\n"
        "from capture.convert import export_store\n"
        "export_store(open_store(sys.argv[1]), sys.argv[2], to='safetensors')\n"
        "open_store(sys.argv[2]).fingerprint()\n"
        "assert 'h5py' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, str(layers.path), str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)


def test_places_that_are_not_local_are_refused(layers):
    with pytest.raises(ConfigError, match=r"^s3://bucket/out: an export is written to a local path"):
        export_store(layers, "s3://bucket/out", to="hdf5")


def test_a_format_that_is_not_known_is_refused(tmp_path):
    program = "from capture.convert import export_store\nexport_store('a', 'b', to='hdf')"
    # In a process of its own, where no annotation is checked.
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    last = result.stderr.splitlines()[-1]
    assert last.endswith("ConfigError: to must name a format, got 'hdf'; did you mean 'hdf5'?")


def test_memory_does_not_grow_with_the_rows(tmp_path, target):
    """Behavioural: ten times the rows, of which the peak would show every array that is held whole."""
    peaks = []
    for sequences in (30, 300):
        plan = Plan(sequences=sequences, shapes=dict.fromkeys(LAYERS, (128,)), every_position=True)
        store = open_store(make_store(tmp_path / f"{sequences}.zarr", plan).root)
        store.fingerprint()
        tracemalloc.start()
        export_store(store, tmp_path / f"out{sequences}", to=target)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_hook = 270 * LENGTH * 128 * 4
    assert peaks[1] - peaks[0] < one_hook / 4, peaks
