"""What a run trains on, as its shape, normalisation, text, batches and record."""

# Axes: seq, pos

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from capture.reader import ActivationStore
from mdlm_interp.errors import StoreError
from mdlm_interp.shapes import Int64
from transcoder.batches import Batch, Batches, StoreBatches, held_out_batches
from transcoder.config import CLTRunConfig, TranscoderConfig
from transcoder.data import coverage, infer_shape, store_normalisation
from transcoder.held_out import TextSplit, split_text
from transcoder.identity import make_probe, store_origin
from transcoder.normalisation import Normalisation
from transcoder.verified_targets import verified_targets


@runtime_checkable
class Source(Protocol):
    """What a run trains on."""

    split: TextSplit

    @property
    def x_0(self) -> Int64[Tensor, "seq pos"]:
        """Clean tokens of all its sequences."""
        ...

    @property
    def dimensions(self) -> tuple[int, int]:
        """Number of layers, and d_model."""
        ...

    def normalisation(self, hooks: Sequence[str]) -> Normalisation:
        """Of some hook points."""
        ...

    def batches(self, shape: TranscoderConfig) -> Batches:
        """The training batches."""
        ...

    def held_out(self, shape: TranscoderConfig) -> list[Batch]:
        """Some batches of text that training never sees; none if there is no row of those selected."""
        ...

    def record(self, shape: TranscoderConfig) -> dict[str, Any]:
        """What a transcoder keeps about it: where it is from, and a probe of the model."""
        ...

    def verified(self, shape: TranscoderConfig) -> dict[str, Any] | None:
        """Proof that its rows are the model's; None if none is asked for."""
        ...


class StoreSource:
    """An activation store.

    Raises:
        StoreError: If it lacks a hook point, or does not say with which model and tokenizer it was captured.
        DataError: If it has too little text to hold some out.
    """

    def __init__(self, store: ActivationStore, config: CLTRunConfig) -> None:
        store_origin(store)
        self._store, self._config = store, config
        self._dimensions = infer_shape(store, config.input_hook, config.output_hook)
        self._x_0 = store.tokens()[0]
        self.split = split_text(self._x_0, config.held_out_fraction, config.train.seed)

    @property
    def x_0(self) -> Int64[Tensor, "seq pos"]:
        """Clean tokens of all its sequences; -1 after the end of shorter ones."""
        return self._x_0

    @property
    def dimensions(self) -> tuple[int, int]:
        """Number of layers, and d_model."""
        return self._dimensions

    def normalisation(self, hooks: Sequence[str]) -> Normalisation:
        """From the store's statistics."""
        return store_normalisation(self._store, hooks)

    def batches(self, shape: TranscoderConfig) -> Batches:
        """Of the training sequences, in the order of `batches`."""
        store, train = self._store, self._config.train
        return StoreBatches(store, self.split.train, train, shape.input_hooks, shape.output_hooks)

    def held_out(self, shape: TranscoderConfig) -> list[Batch]:
        """Of sequences that an evaluation of the same store takes."""
        store, train = self._store, self._config.train
        return held_out_batches(store, self.split.held_out, train, shape.input_hooks, shape.output_hooks)

    def record(self, shape: TranscoderConfig) -> dict[str, Any]:
        """Hashes of the store, how much of it there is, and the probe."""
        store = self._store
        of_store = {
            "fingerprint": store.fingerprint(),
            "coverage": coverage(store)._asdict(),
            "provenance": dict(store.provenance),
        }
        return {"store": of_store, "probe": make_probe(store, shape)}

    def verified(self, shape: TranscoderConfig) -> dict[str, Any] | None:
        """By the oracle; see `verified_targets`."""
        count = self._config.train.verify_sequences
        if count is None:
            return None
        hooks = list(dict.fromkeys([*shape.input_hooks, *shape.output_hooks]))
        seed = self._config.train.seed
        found = verified_targets(self._store, hooks, self._config.model, n_sequences=count, seed=seed)
        if found["n_blocks"] != shape.n_layers:
            config = self._config
            raise StoreError(
                f"a transcoder stands for the MLPs of all {found['n_blocks']} blocks of the model, and the store has "
                f"the hook points of {shape.n_layers}; capture {config.input_hook!r} and {config.output_hook!r} of all"
            )
        return found
