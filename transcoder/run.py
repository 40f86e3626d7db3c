"""A training run: activations in, a transcoder's directory out, continued where it stopped.

1. The rows are proved to be the model's, unless a saved state has the proof.
2. The loop trains and saves states.
3. A BatchTopK is calibrated on held-out rows, plots are drawn, and the transcoder is saved: config.json last, so that
   a run which dies before continues from its last state.

Processes that torchrun started do step 2 together; the first does 1 and 3 for all, with the whole transcoder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from capture import ActivationStore, open_store
from mdlm_interp import __version__
from mdlm_interp.config_files import to_mapping
from mdlm_interp.devices import usable_device
from mdlm_interp.errors import CheckpointError, DataError, OutputExistsError
from transcoder.calibration import calibrated
from transcoder.checkpoint import CONFIG, load_clt, read_json, save_clt, write_json
from transcoder.config import METRICS, CLTRunConfig, TranscoderConfig
from transcoder.data import coverage
from transcoder.exclusive import only_run
from transcoder.initialisation import set_firing_rates
from transcoder.model import CrossLayerTranscoder
from transcoder.run_plots import draw_run
from transcoder.scale_out.layout import Layout, layout_of
from transcoder.scale_out.processes import Processes, joined_processes, own_device, threads_of
from transcoder.scale_out.shards import feature_blocks, whole
from transcoder.sources import Source, StoreSource
from transcoder.trainer import Trainer
from transcoder.training_log import trim_log
from transcoder.training_loop import fit
from transcoder.training_state import (
    CHECKPOINTS,
    damaged_state,
    latest_training_state,
    load_training_state,
)

RUN = "run.json"
"""File beside the saved states that says whose they, and the metrics, are; there from the run's start."""

RESUMABLE_CHANGES = frozenset(
    {"store", "out", "device", "model", "train.mesh", "train.timeout_s"}
    | {
        f"train.{name}"
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "plots", "tensorboard")
    }
    | {"train.wandb", "train.verify_sequences"}
)
"""Settings that may differ between the run that was stopped and the one that continues it."""

logger = logging.getLogger(__name__)


def train(
    config: CLTRunConfig, *, store: ActivationStore | None = None, progress: bool = False
) -> CrossLayerTranscoder:
    """Train to the end, continuing the run found in config.out, and save the transcoder there.

    Started by torchrun, its processes train together, and each returns the transcoder. They must see the same
    store and the same config.out.

    Args:
        store: The opened store, if not the one at config.store.
        progress: Show a bar on a terminal.
    Raises:
        ConfigError: If the processes cannot share the rows and features evenly.
        OutputExistsError: If config.out holds a finished run, or metrics that no run here can continue.
        CheckpointError: If it holds a run with other settings or on another store, or another process trains in it.
        StoreError: If the store does not say with which model and tokenizer it was captured, or a row of it is not
            what that model computes.
        DataError: If the loss is not finite, or the store has too little in it.
        LostProcessError: If another process is gone; the same command continues from the last saved state.
        WriteError: If the disk is full or failing; the same command continues from the last saved state.
        KeyboardInterrupt: After saving the state, on Ctrl-C or SIGTERM.
    """
    settings = config.train

    def layout(rank: int, world_size: int) -> Layout:
        return layout_of(
            settings.blocks,
            settings.mesh,
            rank=rank,
            world_size=world_size,
            batch_size=settings.batch_size,
            n_features=config.n_features,
        )

    with (
        joined_processes(usable_device(config.device), settings.timeout_s, layout) as processes,
        # Sums within a kernel go by threads.
        threads_of(None if settings.blocks is None else 1),
    ):
        return _train(config, store, processes, progress=progress)


def _train(
    config: CLTRunConfig, store: ActivationStore | None, processes: Processes, *, progress: bool
) -> CrossLayerTranscoder:
    processes.first(lambda: _refuse_existing(config.out))
    with ExitStack() as stack:
        processes.first(lambda: stack.enter_context(only_run(config.out)))
        # Again, for what another run did until it gave the directory free.
        processes.first(lambda: _refuse_existing(config.out))
        source = source_of(config, store)
        trainer = prepare(config, source, processes)
        processes.first(lambda: begin_log(config.out, trainer))
        fit(trainer, config.out, progress=progress)
        clt = whole(trainer.blocks, processes)
        found: list[CrossLayerTranscoder] = []  # of the first process
        processes.first(lambda: found.append(finish(config, clt, source)))
    return found[0] if found else load_clt(config.out, device=clt.b_enc.device)


def _refuse_existing(out: Path) -> None:
    if (out / CONFIG).exists():
        raise OutputExistsError(f"{out} holds a finished transcoder; choose another out directory")
    refuse_foreign_log(out)


def source_of(config: CLTRunConfig, store: ActivationStore | None = None) -> Source:
    """What a run trains on.

    Args:
        store: The opened store, if not the one at config.store.
    """
    if store is None and config.store is None:
        from transcoder.live_source import LiveSource

        return LiveSource(config)
    if store is None:
        assert config.store is not None
        store = open_store(config.store)
    held = coverage(store)
    if not held.complete:
        logger.warning("the store has only %s; training goes on with these", held)
    return StoreSource(store, config)


def finish(config: CLTRunConfig, clt: CrossLayerTranscoder, source: Source) -> CrossLayerTranscoder:
    """Calibrate, draw, save, and remove the states."""
    drawn = config.train.plots
    held_out = source.held_out(clt.config) if drawn or clt.config.activation == "batchtopk" else []
    if clt.config.activation == "batchtopk":
        clt = calibrated(clt, [batch.x.to(clt.b_enc.device) for batch in held_out])
    if drawn:
        draw_run(clt, held_out, config.out, config.k if config.selects else None)
    save_clt(clt, config.out)
    shutil.rmtree(config.out / CHECKPOINTS, ignore_errors=True)
    return clt


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


def prepare(config: CLTRunConfig, source: Source, processes: Processes | None = None) -> Trainer:
    """A new run, or the one saved in config.out.

    Args:
        processes: That train together; none for this one alone.
    """
    together = processes or Processes()
    device = own_device(usable_device(config.device))
    shape = config.shape(*source.dimensions)
    batches = source.batches(shape)
    norms = (source.normalisation(shape.input_hooks), source.normalisation(shape.output_hooks))
    seed, layout = config.train.seed, together.layout
    blocks = feature_blocks(shape, norms, seed=seed, init=config.init, layout=layout, device=device)
    record = {**source.record(shape), "text_windows": source.split.windows}
    provenance = _provenance(config, blocks[0], record)
    trainer = Trainer(blocks, batches, config.train, together)
    saved = latest_training_state(config.out)
    if saved is None:
        if config.init.active_features is not None:
            rows = _first_rows(trainer, config.init.rows).to(device)
            for block in blocks:
                set_firing_rates(block, rows, config.init.active_features)
        if config.activation == "batchtopk":
            together.first(lambda: _need_held_out_rows(source, shape, config.train.select))
        verification = together.first(lambda: source.verified(shape))
    else:
        tensors, state = load_training_state(saved, together)
        try:
            _check_same_run(state["provenance"], provenance, saved)
            verification = state["provenance"].get("verification")
            trainer.restore(tensors, state)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise damaged_state(saved, error) from None
        logger.info("continuing from %s", saved)
    for block in blocks:
        block.training_sequences = source.split.hashes
        block.provenance = {**provenance, "verification": verification}
    return trainer


def _need_held_out_rows(source: Source, shape: TranscoderConfig, select: str) -> None:
    # What calibration would otherwise say after all the training.
    if not source.held_out(shape):
        raise DataError(
            f"a batchtopk is calibrated on held-out rows when training ends, and there are none of those selected "
            f"({select}); raise held_out_fraction, or set train.select to all"
        )


def _first_rows(trainer: Trainer, count: int) -> torch.Tensor:
    """Inputs [layer row d_model] of the run's first batches."""
    size = trainer.config.batch_size
    steps = range(-(-count // size))
    return torch.cat([trainer.batches.batch(step).x for step in steps], 1)[:, :count]


def _provenance(config: CLTRunConfig, clt: CrossLayerTranscoder, record: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": to_mapping(config),
        **record,
        "normalisation_sha256": normalisation_sha256(clt),
        "versions": {"mdlm_interp": __version__, "torch": str(torch.__version__)},
    }


def normalisation_sha256(clt: CrossLayerTranscoder) -> str:
    """Hash of the means and scales that a transcoder's activations are normalised with."""
    digest = hashlib.sha256()
    for tensor in (clt.in_mean, clt.in_scale, clt.out_mean, clt.out_scale):
        digest.update(tensor.detach().cpu().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


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
