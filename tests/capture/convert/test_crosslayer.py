"""The layout that crosslayer-coding trains from, read in the steps that its loader takes."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from capture import open_store
from capture.convert import export_store
from mdlm_interp.errors import ConfigError, HookError, StoreError
from tests.capture.stores import Plan, make_store

LAYERS = {f"blocks.{layer}.{name}": (7,) for layer in range(3) for name in ("mlp.hook_in", "hook_mlp_out")}
SHAPES = {"hook_embed": (7,), **LAYERS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """A store with more than what the layout takes."""
    return open_store(make_store(tmp_path_factory.mktemp("made") / "run.zarr", Plan(shapes=SHAPES)).root)


class Loader:
    """What decode-clt 0.0.1's LocalActivationStore does with the files, as far as they are concerned."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metadata = json.loads((directory / "metadata.json").read_text())
        self.norm_stats = json.loads((directory / "norm_stats.json").read_text())
        size = (directory / "index.bin").stat().st_size
        assert size % 16 == 0  # otherwise it is taken for the older form
        entry = np.dtype([("chunk_id", np.int32), ("num_tokens", np.int32), ("offset", np.int64)])
        self.index = np.fromfile(directory / "index.bin", entry)
        assert int(self.index["num_tokens"].sum()) == self.metadata["total_tokens"]

    def rows(self, chunk: int, layer: int, side: str, rows: np.ndarray) -> torch.Tensor:
        with h5py.File(self.directory / f"chunk_{chunk}.h5", "r") as file:
            layers = [key for key in file if key.startswith("layer_")]
            assert len(layers) == self.metadata["num_layers"]
            data = file[f"layer_{layer}"][side][:][rows.astype(np.uint32), :]
        dtype = getattr(torch, self.metadata["dtype"])
        return torch.frombuffer(bytearray(data.tobytes()), dtype=dtype).reshape(-1, self.metadata["d_model"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_row_is_where_the_loader_looks_for_it(trained, tmp_path, dtype):
    export = export_store(trained, tmp_path / "out", to="crosslayer-coding", dtype=dtype)
    loader = Loader(tmp_path / "out")
    assert (loader.metadata["num_layers"], loader.metadata["d_model"]) == (3, 7)
    assert export.rows == len(trained) == loader.metadata["total_tokens"]
    sizes = loader.index["num_tokens"]
    assert len(sizes) == 3
    assert sizes.max() - sizes.min() <= 1
    assert loader.metadata["chunk_tokens"] == sizes.min()
    assert loader.index["offset"].tolist() == [0, *np.cumsum(sizes)[:-1].tolist()]
    for chunk, size, offset in loader.index.tolist():
        rows = np.random.default_rng(chunk).permutation(size)
        for layer in range(3):
            for side, hook in (("inputs", "mlp.hook_in"), ("targets", "hook_mlp_out")):
                name = f"blocks.{layer}.{hook}"
                expected = trained.read(offset + rows, name)[name].to(getattr(torch, dtype))
                assert torch.equal(loader.rows(chunk, layer, side, rows), expected)


def test_norm_stats_are_mean_and_deviation_of_each_dimension(trained, tmp_path):
    export_store(trained, tmp_path / "out", to="crosslayer-coding")
    stats = Loader(tmp_path / "out").norm_stats
    assert list(stats) == ["0", "1", "2"]
    for layer in range(3):
        for side, hook in (("inputs", "mlp.hook_in"), ("targets", "hook_mlp_out")):
            name = f"blocks.{layer}.{hook}"
            acts = trained.read(slice(None), name)[name].double()
            found = stats[str(layer)][side]
            # Bounded: the file has float32, and 1e-6 is 17 of its units in the last place.
            torch.testing.assert_close(
                torch.tensor(found["mean"]), acts.mean(0).float(), rtol=1e-6, atol=1e-6
            )
            torch.testing.assert_close(torch.tensor(found["std"]), acts.std(0).float(), rtol=1e-6, atol=0)


def test_provenance_goes_along(trained, tmp_path):
    export_store(trained, tmp_path / "out", to="crosslayer-coding", rows=slice(100, 500))
    record = Loader(tmp_path / "out").metadata["mdlm_interp"]
    assert record["provenance"] == trained.provenance
    assert record["source"]["of_rows"] == len(trained)
    assert list(record["hooks"]) == list(LAYERS)


def test_bfloat16_is_refused_since_the_loader_misreads_it(trained, another, tmp_path):
    message = r"^crosslayer-coding's loader reads bfloat16 as whole numbers; export with --dtype float32"
    with pytest.raises(ConfigError, match=message):
        export_store(trained, tmp_path / "out", to="crosslayer-coding", dtype="bfloat16")
    store = another(Plan(shapes=LAYERS, dtype="bfloat16"))
    with pytest.raises(ConfigError, match=message):
        export_store(store, tmp_path / "out", to="crosslayer-coding")
    assert export_store(store, tmp_path / "out", to="crosslayer-coding", dtype="float32").dtype == "float32"


def test_a_store_without_the_pairs_is_refused(another, tmp_path):
    shapes = {name: shape for name, shape in LAYERS.items() if name != "blocks.1.hook_mlp_out"}
    store = another(Plan(shapes=shapes))
    message = (
        r"holds no 'blocks.1.hook_mlp_out'; did you mean '[\w.]+'\?; crosslayer-coding needs "
        r"'blocks.\*.mlp.hook_in' and 'blocks.\*.hook_mlp_out' of all 3 blocks$"
    )
    with pytest.raises(StoreError, match=message):
        export_store(store, tmp_path / "out", to="crosslayer-coding")


def test_hooks_that_the_layout_has_no_place_for_are_refused(trained, tmp_path):
    for hooks, differing in (
        (["hook_embed", "blocks.*"], "hook_embed"),
        (["blocks.0.*"], "blocks.1.hook_mlp_out"),
    ):
        with pytest.raises(HookError, match=rf"and nothing else; '{differing}' differs: leave --hooks out$"):
            export_store(trained, tmp_path / "out", to="crosslayer-coding", hooks=hooks)
    export_store(trained, tmp_path / "out", to="crosslayer-coding", hooks=["blocks.*"])


def test_activations_that_are_not_finite_are_refused(another, tmp_path):
    import zarr

    store = another(Plan(shapes=LAYERS))
    zarr.open_array(store.path, path="acts/blocks.0.mlp.hook_in")[5, 3] = np.inf
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(
            StoreError, match=r"^blocks.0.mlp.hook_in has activations that are infinite or not a number"
        ),
    ):
        export_store(open_store(store.path), tmp_path / "out", to="crosslayer-coding")
    assert not (tmp_path / "out").exists()
