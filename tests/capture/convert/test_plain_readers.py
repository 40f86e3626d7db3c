"""Exports open with their format's own library and nothing of ours, in the lines that the README shows."""

import hashlib
import json

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from capture import schema
from capture.convert import export_store
from tests.capture.convert.checks import assert_same_bits
from tests.capture.stores import HEADS, MLP, SCALE, Plan


def test_h5py_alone_reads_an_export(made, store, tmp_path):
    export_store(store, tmp_path / "run.h5", to="hdf5")

    file = h5py.File(tmp_path / "run.h5")
    mlp_out = file[f"acts/{MLP}"][256:512]
    x0, is_masked = file["rows/x0"][:], file["rows/is_masked"][:]
    seed = json.loads(file.attrs["config"])["seed"]

    assert seed == 7
    assert_same_bits(mlp_out, made.stored[MLP][256:512])
    assert_same_bits(x0, made.columns["x0"])
    assert_same_bits(is_masked, made.columns["is_masked"])
    assert sorted(file["acts"]) == sorted(made.acts)
    assert sorted(file["seqs"]) == sorted(schema.SEQUENCE_COLUMNS)
    for name, values in made.sequences.items():
        assert_same_bits(file[f"seqs/{name}"][:], values)
    assert_same_bits(file[f"stats/{SCALE}/mean"][:], made.moments[SCALE].arrays()["mean"])
    assert file.attrs["format"].decode() == schema.FORMAT
    assert [axis.label for axis in file[f"acts/{HEADS}"].dims] == ["row", "head", "d_head"]
    assert file["rows/doc"].attrs["description"] == schema.ROW_COLUMNS["doc"].description


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_h5py_finds_each_type_as_what_it_is(another, tmp_path, dtype):
    store = another(Plan(dtype=dtype))
    export_store(store, tmp_path / "run.h5", to="hdf5")
    data = h5py.File(tmp_path / "run.h5")[f"acts/{MLP}"]
    assert data.dtype == {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[dtype]
    assert data.attrs.get("logical_dtype", "float32") == dtype
    assert data.chunks == (256, 5)
    assert data.fletcher32
    values = data[:]
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(values, store.read(slice(None), MLP)[MLP].numpy())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_alone_reads_an_export(another, tmp_path, dtype):
    store = another(Plan(dtype=dtype))
    export_store(store, tmp_path / "run", to="safetensors")

    part = load_file(tmp_path / "run" / "shard-00001.safetensors")
    mlp_out, is_masked = part[f"acts.{MLP}"], part["rows.is_masked"]

    assert mlp_out.dtype == getattr(torch, dtype)
    start = json.loads((tmp_path / "run" / "store.json").read_text())["rows_per_file"]
    assert 256 < start < len(store)
    assert torch.equal(mlp_out.float(), store.read(slice(start, None), MLP)[MLP])
    assert torch.equal(is_masked, store.coords(slice(start, None))["is_masked"])
    assert set(part) == {*(f"acts.{h}" for h in store.hooks), *(f"rows.{c}" for c in schema.ROW_COLUMNS)}
    sequences = load_file(tmp_path / "run" / "sequences-00000.safetensors")
    assert torch.equal(sequences["seqs.xt"], store.sequence_column("xt"))
    statistics = load_file(tmp_path / "run" / "statistics.safetensors")
    assert torch.equal(statistics[f"stats.{MLP}.count"], store.statistics(MLP).count)


def test_the_index_of_safetensors_files_has_their_hashes_and_what_a_store_says(store, tmp_path):
    out = tmp_path / "run"
    export_store(store, out, to="safetensors")
    index = json.loads((out / "store.json").read_text())
    assert (index["config"], index["provenance"]) == (store.config, store.provenance)
    assert index["shapes"] == {HEADS: [2, 3], MLP: [5], SCALE: [1]}
    assert index["rows_per_file"] == 512
    listed = {entry["file"]: (entry["bytes"], entry["sha256"]) for entry in index["files"]}
    there = {file.name: file.read_bytes() for file in out.iterdir() if file.suffix == ".safetensors"}
    assert listed == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in there.items()}
    assert len([name for name in there if name.startswith("shard-")]) == -(-len(store) // 512)
    with safe_open(out / "shard-00000.safetensors", "pt") as file:
        assert len(json.loads(file.metadata()["crc32c"])[f"acts.{MLP}"].split()) == 2
