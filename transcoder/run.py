"""A training run: an activation store in, a transcoder's directory out, continued where it stopped."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdlm_interp import __version__
from mdlm_interp.atomic_files import write_errors
from mdlm_interp.config_files import to_mapping
from mdlm_interp.devices import usable_device
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
    write_json,
)
from transcoder.config import METRICS, CLTRunConfig, TranscoderConfig
from transcoder.data import (
    BatchLoader,
    RowOrder,
    RowStore,
    coverage,
    infer_shape,
    split_sequences,
    store_normalisation,
)
from transcoder.held_out import cut_of, sequence_hashes
from transcoder.identity import make_probe, store_origin
from transcoder.model import CrossLayerTranscoder
from transcoder.trainer import Trainer, fit
from transcoder.training_log import trim_log

RUN = "run.json"
"""File beside the saved states that says whose they, and the metrics, are; there from the run's start."""

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
        OutputExistsError: If config.out holds a finished run, or metrics that no run here can continue.
        CheckpointError: If it holds a run with other settings or on another store.
        StoreError: If the store does not say with which model and tokenizer it was captured.
        DataError: If the loss is not finite, or the store has too little in it.
        WriteError: If the disk is full or failing; the same command continues from the last saved state.
        KeyboardInterrupt: After saving the state, on Ctrl-C or SIGTERM.
    """
    if (config.out / CONFIG).exists():
        raise OutputExistsError(f"{config.out} holds a finished transcoder; choose another out directory")
    refuse_foreign_log(config.out)
    if store is None:
        from capture import open_store

        store = open_store(config.store)
    held = coverage(store)
    if not held.complete:
        logger.warning("the store has only %s; training goes on with these", held)
    trainer = prepare(config, store)
    with write_errors(config.out):
        config.out.mkdir(parents=True, exist_ok=True)
    begin_log(config.out, trainer)
    fit(trainer, config.out, progress=progress)
    save_clt(trainer.clt, config.out)
    shutil.rmtree(config.out / CHECKPOINTS, ignore_errors=True)
    return trainer.clt


def refuse_foreign_log(out: Path) -> None:
    """Raise OutputExistsError if there are metrics in a directory without a run to continue."""
    log = out / METRICS
    if _has_content(log) and latest_training_state(out) is None and not (out / CHECKPOINTS / RUN).exists():
        raise OutputExistsError(
            f"{log} exists and there is no run that it belongs to; move it away or choose another out directory"
        )


def begin_log(out: Path, trainer: Trainer) -> None:
    """Say whose metrics they are, and take them back to where the run goes on.

    Raises:
        CheckpointError: If the metrics are another run's; nothing is changed then.
    """
    run, log = out / CHECKPOINTS / RUN, out / METRICS
    if trainer.step_number == 0:
        if _has_content(log):
            _check_same_run(read_json(run), trainer.clt.provenance, out)
        write_json(run, trainer.clt.provenance)
    trim_log(log, trainer.step_number)


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def prepare(config: CLTRunConfig, store: RowStore) -> Trainer:
    """A new run, or the one saved in config.out."""
    device = usable_device(config.device)
    store_origin(store)
    n_layers, d_model = infer_shape(store, config.input_hook, config.output_hook)
    shape = TranscoderConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_features=config.n_features,
        k=config.k,
        input_hook=config.input_hook,
        output_hook=config.output_hook,
    )
    x_0 = store.tokens()[0]
    split = split_sequences(x_0, config.held_out_fraction, config.train.seed)
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
    clt.training_sequences = np.unique(sequence_hashes(x_0)[split.train])
    trainer = Trainer(clt, loader, config.train)
    if saved is not None:
        try:
            trainer.restore(read_json(saved / LOOP), read_tensors(saved / OPTIMISER))
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{saved} is damaged ({type(error).__name__}: {error}); restore it from a copy or remove "
                f"{config.out} to start over"
            ) from None
    return trainer


def _provenance(config: CLTRunConfig, shape: TranscoderConfig, store: RowStore) -> dict[str, Any]:
    return {
        "run": to_mapping(config),
        "store": {
            "fingerprint": store.fingerprint(),
            "coverage": coverage(store)._asdict(),
            "cut": cut_of(store),
            "provenance": dict(store.provenance),
        },
        "probe": make_probe(store, shape),
        "versions": {"mdlm_interp": __version__, "torch": str(torch.__version__)},
    }


def _check_same_run(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    before, now = _flat(saved.get("run", {})), _flat(json.loads(json.dumps(wanted["run"])))
    for name in now:
        if name not in RESUMABLE_CHANGES and before.get(name) != now[name]:
            raise CheckpointError(
                f"{path} was trained with {name} = {before.get(name)!r}, the run asks for {now[name]!r}; "
                f"restore the setting or choose another out directory"
            )
    trained, found = (str(run.get("store", {}).get("fingerprint")) for run in (saved, wanted))
    if trained != found:
        raise CheckpointError(
            f"{path} was trained on another store than this one (fingerprint {trained[:12]}, this one has "
            f"{found[:12]}); give that store or choose another out directory"
        )


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
