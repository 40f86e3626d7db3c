"""Stores that tests only read, a copy to damage, and ways to open them."""

import shutil
from pathlib import Path

import pytest

from capture import open_store
from capture.reader import ActivationStore
from tests.capture.reader.opening import Opener
from tests.capture.stores import (
    Elsewhere,
    Plan,
    Truth,
    make_store,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """A complete store of two shards, the second shorter; tests only read it."""
    return make_store(tmp_path_factory.mktemp("made") / "run.zarr")


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """The same when 512 of its rows were committed."""
    return make_store(
        tmp_path_factory.mktemp("partial") / "run.zarr", Plan(complete=False, committed_shards=1)
    )


@pytest.fixture
def copy(made: Truth, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(made.root, tmp_path / "run.zarr"))


@pytest.fixture(params=["local", "elsewhere"])
def opened(request: pytest.FixtureRequest) -> Opener:
    """Opens a store as a local directory, and as any other place, through zarr."""
    return open_store if request.param == "local" else lambda root: ActivationStore(Elsewhere(root))
