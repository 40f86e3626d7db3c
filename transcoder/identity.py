"""Whether a transcoder belongs to a model, and a store to a transcoder.

A transcoder records the SHA-256 of the weights files that its activations came from and of the tokenizer,
and a probe: one sequence of the store with a few of its activations. A model's source and another store are
checked by the hashes; a model in memory, which may have been moved or cast since, is run on the probe.
"""

# Axes: layer, pos, d_model

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mdlm_interp.checkpoints import resolve_source, weights_sha256
from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.errors import CheckpointError, DataError, StoreError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Int
from transcoder.config import TranscoderConfig
from transcoder.data import RowStore

if TYPE_CHECKING:
    from transcoder.model import CrossLayerTranscoder

PROBE_VALUES = 4
"""Positions, and dimensions of each, whose activations a probe records."""

ORIGINS = {"weights_sha256": "model", "tokenizer_sha256": "tokenizer"}
"""Entries of a store's provenance that must be the transcoder's, and what each is the hash of."""

PROBE_TOLERANCE = 1e-3
"""In standard deviations of the layer: a hundred times what batch shapes and devices differ by in float32."""


def make_probe(store: RowStore, config: TranscoderConfig) -> dict[str, Any]:
    """The first sequence of a store, and activations of every output hook at a few places of it."""
    rows = store.sequence_rows(0)
    read = store.read(rows, list(config.output_hooks))
    x_t = store.tokens()[1][0]
    x_t = x_t[x_t >= 0]  # the end of a shorter sequence is filled with -1
    positions = store.coords(rows, ["pos"])["pos"]
    return probe_of(x_t, float(store.times()[0]), positions, [read[name] for name in config.output_hooks])


def probe_of(
    x_t: Int[Tensor, " pos"], t: float, positions: Int[Tensor, " row"], outputs: Sequence[Tensor]
) -> dict[str, Any]:
    """A probe of a sequence's rows.

    Args:
        positions: That the rows are of.
        outputs: Activations [row d_model] of each output hook point.
    """
    places, dims = _spread(len(positions)), _spread(outputs[0].shape[1])
    return {
        "x_t": x_t.tolist(),
        "t": t,
        "positions": positions[places].tolist(),
        "dims": dims,
        "values": [acts[places][:, dims].tolist() for acts in outputs],
    }


def check_source(clt: CrossLayerTranscoder, source: str | Path) -> None:
    """Raise CheckpointError if the weights of a model source are not those that the transcoder records."""
    recorded = recorded_sha256(clt)
    if recorded is None:
        return
    found = weights_sha256(resolve_source(source))
    if found != recorded:
        raise CheckpointError(
            f"the transcoder was trained on another model: the weights of {str(source)!r} have sha256 "
            f"{found}, its activations came from {recorded}; give the model that the store was captured from"
        )


@torch.no_grad()
def check_model(clt: CrossLayerTranscoder, model: HookedMDLM) -> None:
    """Raise an error if the transcoder does not fit a model, or the model does not give the probe's values.

    Raises:
        CheckpointError: If it was trained on another model.
        DataError: If the model is in training mode with dropout, which would make errors random.
    """
    if model.training and model.config.dropout > 0:
        raise DataError(
            "the model is in training mode and drops activations at random; call model.eval() first"
        )
    shape, wanted = (
        (model.config.n_blocks, model.config.hidden_dim),
        (clt.config.n_layers, clt.config.d_model),
    )
    if shape != wanted:
        raise CheckpointError(
            f"the transcoder is for {wanted[0]} layers of width {wanted[1]}, the model has {shape[0]} of "
            f"width {shape[1]}; it was trained on another model"
        )
    probe = clt.provenance.get("probe")
    if not isinstance(probe, Mapping):
        return
    x_t = torch.tensor([probe["x_t"]], device=model.device)
    if int(x_t.max()) >= model.config.vocab_size:
        raise CheckpointError("the transcoder was trained on another model, whose vocabulary is larger")
    sigma = LogLinearSchedule().sigma(torch.tensor([probe["t"]], dtype=torch.float64))
    names = list(clt.config.output_hooks)
    _, cache = model.run_with_cache(x_t, names, timesteps=sigma.float().to(model.device), device="cpu")
    for layer, name in enumerate(names):
        found = cache[name][0][probe["positions"]][:, probe["dims"]].double()
        expected = torch.tensor(probe["values"][layer], dtype=torch.float64)
        worst = int((found - expected).abs().argmax())
        difference = abs(float(found.flatten()[worst] - expected.flatten()[worst]))
        if not difference * float(clt.out_scale[layer]) <= PROBE_TOLERANCE:
            raise CheckpointError(
                f"the transcoder was trained on another model: {name} is {float(found.flatten()[worst]):.6g} "
                f"where its training data has {float(expected.flatten()[worst]):.6g} (weights sha256 "
                f"{recorded_sha256(clt) or 'unknown'})"
            )


def store_origin(store: RowStore) -> dict[str, str]:
    """SHA-256 of the weights and of the tokenizer that a store was captured with, by provenance entry.

    Raises:
        StoreError: If the store does not carry them.
    """
    provenance = store.provenance
    for entry, what in ORIGINS.items():
        if not isinstance(provenance.get(entry), str):
            raise StoreError(
                f"the store does not say which {what} it was captured with: its provenance has no {entry}; "
                f"capture it again with mdlm-interp capture run"
            )
    return {entry: provenance[entry] for entry in ORIGINS}


def check_store(clt: CrossLayerTranscoder, store: RowStore) -> None:
    """Raise an error unless a store was captured with the model and tokenizer of the transcoder.

    Raises:
        StoreError: If it was captured with others, or does not say with which.
        CheckpointError: If the transcoder does not say.
    """
    found = store_origin(store)
    recorded = clt.provenance.get("store", {}).get("provenance", {})
    for entry, what in ORIGINS.items():
        if not isinstance(recorded.get(entry), str):
            raise CheckpointError(
                f"the transcoder does not say which {what} its activations came from: its provenance has no "
                f"{entry}; train it again on a store that does"
            )
        if found[entry] != recorded[entry]:
            raise StoreError(
                f"the store was captured with another {what} (sha256 {found[entry][:12]}) than the "
                f"transcoder was trained on (sha256 {recorded[entry][:12]}); capture the text with that {what}"
            )


def recorded_sha256(clt: CrossLayerTranscoder) -> str | None:
    """SHA-256 of the weights whose activations the transcoder was trained on, if recorded."""
    store = clt.provenance.get("store", {})
    found = store.get("provenance", {}).get("weights_sha256")
    return None if found is None else str(found)


def _spread(size: int) -> list[int]:
    """A few numbers spread over range(size)."""
    chosen: Sequence[int] = np.unique(np.linspace(0, size - 1, PROBE_VALUES).round().astype(int)).tolist()
    return list(chosen)
