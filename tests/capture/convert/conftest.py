"""Small stores to export, and exports cut into many small pieces."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capture import open_store
from capture.reader import ActivationStore
from tests.capture.stores import Plan, Truth, make_store

FORMATS = ("hdf5", "safetensors")
"""Those that are read again."""


@pytest.fixture(params=FORMATS)
def to(request: pytest.FixtureRequest) -> str:
    """Each of them."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """Blocks of 256 rows and files of two of them, so that a small store takes several of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("capture.convert.selection.BLOCK_BYTES", 2048)
        patch.setattr("capture.convert.safetensors_files.FILE_BYTES", 40_000)
        patch.setattr("capture.convert.crosslayer.CHUNK_ROWS", 300)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """A complete store with sequences of differing numbers of rows, in several shards; tests only read it."""
    return make_store(tmp_path_factory.mktemp("made") / "run.zarr", Plan(shard_rows=256))


@pytest.fixture
def store(made: Truth) -> ActivationStore:
    """That store, open."""
    return open_store(made.root)


@pytest.fixture
def another(tmp_path: Path) -> Callable[[Plan], ActivationStore]:
    """Makes and opens other stores."""

    def make(plan: Plan) -> ActivationStore:
        return open_store(make_store(tmp_path / f"store{len(list(tmp_path.iterdir()))}", plan).root)

    return make
