"""A training run: an activation store in, a transcoder's directory out, continued where it stopped."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from mdlm_interp import __version__
from mdlm_interp.config_files import to_mapping
from mdlm_interp.errors import CheckpointError, OutputExistsError
from transcoder.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    LOOP,
    OPTIMISER,
    latest_training_state,
    load_clt,
    read_json,
    read_tensors,
    save_clt,
)
from transcoder.config import METRICS, CLTRunConfig, TranscoderConfig, torch_device
from transcoder.data import BatchLoader, RowOrder, RowStore, infer_shape, split_sequences, store_normalisation
from transcoder.identity import make_probe
from transcoder.model import CrossLayerTranscoder
from transcoder.trainer import Trainer, fit

RESUMABLE_CHANGES = ("store", "out", "device", "train.log_every", "train.checkpoint_every")
"""Settings that may differ between the run that was stopped and the one that continues it."""

logger = logging.getLogger(__name__)


def train(
    config: CLTRunConfig, *, store: RowStore | None = None, progress: bool = False
) -> CrossLayerTranscoder:
    """Train to the end, continuing the run found in config.out, and save the transcoder there.

    Args:
        store: The opened store, if not the one at config.store.
        progress: Show a bar on a terminal.
    Raises:
        OutputExistsError: If config.out holds a finished run.
        CheckpointError: If it holds a run with other settings or on another store.
        DataError: If the loss is not finite, or the store has too little in it.
        KeyboardInterrupt: After saving the state, on Ctrl-C or SIGTERM.
    """
    if (config.out / CONFIG).exists():
        raise OutputExistsError(f"{config.out} holds a finished transcoder; choose another out directory")
    if store is None:
        from capture import open_store

        store = open_store(config.store)
    trainer = prepare(config, store)
    config.out.mkdir(parents=True, exist_ok=True)
    trim_log(config.out / METRICS, trainer.step_number)
    with (config.out / METRICS).open("a", encoding="utf-8") as log:
        fit(trainer, config.out, log, progress=progress)
    save_clt(trainer.clt, config.out)
    shutil.rmtree(config.out / CHECKPOINTS, ignore_errors=True)
    return trainer.clt


def prepare(config: CLTRunConfig, store: RowStore) -> Trainer:
    """A new run, or the one saved in config.out."""
    device = torch_device(config.device)
    n_layers, d_model = infer_shape(store, config.input_hook, config.output_hook)
    shape = TranscoderConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_features=config.n_features,
        k=config.k,
        input_hook=config.input_hook,
        output_hook=config.output_hook,
    )
    split = split_sequences(store.tokens()[0], config.held_out_fraction, config.train.seed)
    order = RowOrder(
        split.train, store.length, seed=config.train.seed, window_chunks=config.train.window_chunks
    )
    loader = BatchLoader(store, order, config.train.batch_size, shape.input_hooks, shape.output_hooks)
    provenance = _provenance(config, shape, store)
    saved = latest_training_state(config.out)
    if saved is None:
        norms = (
            store_normalisation(store, shape.input_hooks),
            store_normalisation(store, shape.output_hooks),
        )
        clt = CrossLayerTranscoder(shape, *norms, seed=config.train.seed).to(device)
    else:
        clt = load_clt(saved, device=device)
        _check_same_run(clt.provenance, provenance, saved)
        logger.info("continuing from %s", saved)
    clt.provenance = provenance
    trainer = Trainer(clt, loader, config.train)
    if saved is not None:
        trainer.restore(read_json(saved / LOOP), read_tensors(saved / OPTIMISER))
    return trainer


def _provenance(config: CLTRunConfig, shape: TranscoderConfig, store: RowStore) -> dict[str, Any]:
    return {
        "run": to_mapping(config),
        "store": {"fingerprint": store.fingerprint(), "provenance": dict(store.provenance)},
        "probe": make_probe(store, shape),
        "versions": {"mdlm_interp": __version__, "torch": str(torch.__version__)},
    }


def _check_same_run(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    before, now = _flat(saved["run"]), _flat(json.loads(json.dumps(wanted["run"])))
    for name in now:
        if name not in RESUMABLE_CHANGES and before.get(name) != now[name]:
            raise CheckpointError(
                f"{path} was trained with {name} = {before.get(name)!r}, the run asks for {now[name]!r}; "
                f"restore the setting or choose another out directory"
            )
    if saved["store"]["fingerprint"] != wanted["store"]["fingerprint"]:
        raise CheckpointError(
            f"{path} was trained on another store than this one; choose another out directory"
        )


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def trim_log(path: Path, step: int) -> None:
    """Drop the lines that a stopped run wrote after its last state; they will be written again."""
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
