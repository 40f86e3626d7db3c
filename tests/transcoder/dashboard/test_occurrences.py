"""Where features are active in a store, against encoding all rows at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from capture import ActivationStore, CaptureConfig, run_capture
from capture.schema import T_BINS
from mdlm_interp.errors import DataError, StoreError
from transcoder.dashboard import find_occurrences
from transcoder.dashboard.occurrences import Occurrences
from transcoder.model import CrossLayerTranscoder


def all_acts(clt: CrossLayerTranscoder, store: ActivationStore) -> np.ndarray:
    """Activations [layer row feature] of the whole store."""
    read = store.read(slice(0, len(store)), list(clt.config.input_hooks))
    with torch.no_grad():
        return clt.encode(torch.stack([read[name] for name in clt.config.input_hooks])).numpy()


def test_counts_and_sums_are_those_of_all_rows(trained, store):
    found = find_occurrences(trained, store)
    acts = all_acts(trained, store)
    coords = store.coords(slice(0, len(store)))
    masked = coords["is_masked"].numpy()
    t_bin = np.minimum((coords["t"].numpy() * T_BINS).astype(int), T_BINS - 1)
    assert found.n_sequences == 40
    assert found.n_rows == len(store) == 960
    for is_masked in (0, 1):
        for part in range(T_BINS):
            here = (masked == is_masked) & (t_bin == part)
            assert found.rows[is_masked, part] == here.sum()
            # The same numbers but for rounding: other rows stand in a block.
            assert np.array_equal(found.active[:, :, is_masked, part], (acts[:, here] > 0).sum(1))
            assert np.allclose(found.total[:, :, is_masked, part], acts[:, here].sum(1), rtol=1e-5)
    assert np.allclose(found.density, (acts > 0).mean(1))
    assert found.active.sum() > 1000


def test_examples_are_the_strongest_of_their_sequences(trained, store):
    found = find_occurrences(trained, store, n_examples=5)
    acts = all_acts(trained, store)
    seq = store.coords(slice(0, len(store)), ["seq"])["seq"].numpy()
    by_seq = np.stack([acts[:, seq == number].max(1) for number in range(40)], axis=-1)  # layer feature seq
    expected = -np.sort(-by_seq, axis=-1)[:, :, :5]
    expected[expected <= 0] = np.nan
    assert np.allclose(found.values, expected, rtol=1e-5, equal_nan=True)
    assert np.isfinite(found.values).sum() > 500
    for layer, feature, example in np.argwhere(found.seqs >= 0)[::17].tolist():
        here = layer, feature, example
        row = store.row_of(int(found.seqs[here]), int(found.positions[here]))
        assert acts[layer, row, feature] == pytest.approx(found.values[here], rel=1e-5)
        assert store.times()[found.seqs[here]] == found.times[here]


def test_contexts_hold_the_tokens_around_and_their_activations(trained, store):
    found = find_occurrences(trained, store, n_examples=3, before=4, after=2)
    acts = all_acts(trained, store)
    x_0, x_t = (part.numpy() for part in store.tokens())
    outside = 0
    for layer, feature, example in np.argwhere(found.seqs >= 0)[::7].tolist():
        here = layer, feature, example
        seq, pos = int(found.seqs[here]), int(found.positions[here])
        assert found.starts[here] == pos - 4
        for place, position in enumerate(range(pos - 4, pos + 3)):
            if not 0 <= position < 24:
                outside += 1
                assert found.clean[here][place] == found.read[here][place] == -1
                assert np.isnan(found.acts[here][place])
                continue
            assert found.clean[here][place] == x_0[seq, position]
            assert found.read[here][place] == x_t[seq, position]
            expected = acts[layer, store.row_of(seq, position), feature]
            assert found.acts[here][place] == pytest.approx(expected, rel=1e-5)
    assert outside > 10


def same(a: Occurrences, b: Occurrences) -> None:
    for name in ("rows", "active", "seqs", "positions", "clean", "read"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    for name in ("total", "values", "acts", "times"):
        assert np.allclose(getattr(a, name), getattr(b, name), rtol=1e-5, equal_nan=True), name


@pytest.mark.parametrize("rows", [7, 24, 100])
def test_rows_are_read_a_block_at_a_time_and_the_result_is_the_same(trained, store, monkeypatch, rows):
    asked, encoded = [], []
    read, encode = ActivationStore.read, CrossLayerTranscoder.encode_layer

    def watched(self, wanted, hooks=None):
        asked.append(wanted.stop - wanted.start)
        return read(self, wanted, hooks)

    def in_float64(self, x, layer):
        # In float32 a product's last bit depends on how many rows stand beside it, and decides between near ties.
        encoded.append(len(x))
        return encode(self, x.double(), layer).float()

    monkeypatch.setattr(ActivationStore, "read", watched)
    monkeypatch.setattr(CrossLayerTranscoder, "encode_layer", in_float64)
    trained.double()
    whole = find_occurrences(trained, store)
    assert max(asked) == max(encoded) == len(store)
    asked.clear()
    encoded.clear()
    monkeypatch.setattr("transcoder.dashboard.occurrences.BLOCK_ROWS", rows)
    same(find_occurrences(trained, store), whole)
    assert max(asked) == max(rows // 24 * 24, 24)  # sequences of 24 are read whole
    assert max(encoded) == max(rows // 24 * 24, 24)


def test_some_sequences_of_all_times_and_many_texts(trained, model_directory, text, tmp_path: Path):
    """Evenly spaced numbers would meet one of the times alone."""
    store = run_capture(
        CaptureConfig(
            model=str(model_directory), files=(text,), out=str(tmp_path / "fixed.zarr"), length=24,
            max_sequences=24, times="fixed", time=(0.2, 0.5, 0.8),
        )
    )  # fmt: skip
    found = find_occurrences(trained, store, max_sequences=8)
    assert (found.n_sequences, found.n_rows) == (8, 8 * 24)
    seqs = np.unique(found.seqs[found.seqs >= 0])
    assert np.unique(store.times().numpy()[seqs], return_counts=True)[1].tolist() == [3, 3, 2]
    assert len(np.unique(store.sequence_column("block").numpy()[seqs])) == 8


def test_what_was_not_recorded_has_tokens_and_no_activation(trained, model_directory, text, tmp_path: Path):
    store = run_capture(
        CaptureConfig(
            model=str(model_directory),
            files=(text,),
            out=str(tmp_path / "masked.zarr"),
            length=24,
            max_sequences=6,
            seed=3,
            positions="masked",
        )
    )
    found = find_occurrences(trained, store)
    assert found.rows[0].sum() == 0
    assert found.rows[1].sum() == len(store)
    is_mask = found.read == int(store.tokens()[1].max())
    inside = found.clean >= 0
    assert np.isnan(found.acts[inside & ~is_mask]).all()
    assert np.isfinite(found.acts[inside & is_mask]).all()
    assert (inside & ~is_mask).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_examples": 0}, "n_examples must be at least 1, got 0"),
        ({"before": -1}, "before must be at least 0, got -1"),
        ({"max_sequences": 0}, "max_sequences must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_told(trained, store, arguments, message):
    with pytest.raises(DataError, match=message):
        find_occurrences(trained, store, **arguments)


def test_another_models_store_is_refused(trained, store):
    trained.provenance["store"]["provenance"]["weights_sha256"] = "0" * 64
    with pytest.raises(StoreError, match="captured with another model"):
        find_occurrences(trained, store)
