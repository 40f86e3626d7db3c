"""`mdlm-interp train-lm`: train a masked diffusion language model and save it as a model directory."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdlm_interp.atomic_files import replacing_directory
from mdlm_interp.checkpoints import WEIGHTS
from mdlm_interp.config_args import parse_args
from mdlm_interp.config_files import to_mapping
from mdlm_interp.errors import CheckpointError, DataError, OutputExistsError
from mdlm_interp.evaluation import nelbo
from mdlm_interp.tokenizers import Tokenizer, load_tokenizer
from mdlm_interp.training.baselines import bigram_nats, unigram_nats
from mdlm_interp.training.checkpoint import LOG, LOSS_CURVE, refuse_foreign, saved_step
from mdlm_interp.training.config import Form, TrainLMConfig
from mdlm_interp.training.data import TokenStreams, read_streams
from mdlm_interp.training.plots import plot_losses
from mdlm_interp.training.trainer import Trainer, finite, held_out_blocks, train

PROG = "mdlm-interp train-lm"
MODEL = "model"
TRAINING = "training.json"
FINISHED = ("config.json", WEIGHTS, "tokenizer.json", TRAINING)
"""Files of a finished model directory."""

FINAL_TIMES = 8
"""Noise levels a held-out sequence in the final evaluation."""

FORMS: dict[Form, str] = {
    "wrapped": "wrapped sequences: an end-of-text at both ends, as trained",
    "bare": "bare sequences: text from end to end, as trained",
}


def main(argv: list[str]) -> int:
    """`mdlm-interp train-lm CONFIG.yaml [--key value]`."""
    config = parse_args(TrainLMConfig, argv, prog=PROG, config_file=True)
    refuse_finished(config.out / MODEL)
    refuse_foreign(config.out)
    try:
        run(config)
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROG}: interrupted; {continuation(config.out)}\n")
        return 130
    return 0


def run(config: TrainLMConfig) -> None:
    """Read, train, evaluate, and save what a later user needs in one directory."""
    tokenizer = find_inputs(config)
    streams = read_streams(config.files, tokenizer, config.held_out_share)
    sys.stdout.write(f"{len(streams.train):,} training tokens, {len(streams.held_out):,} held out\n")
    trainer = train(config, tokenizer, streams, progress=True)
    plot_losses(config.out / LOG, config.out / LOSS_CURVE)
    report = evaluate(trainer, tokenizer, streams)
    finished = config.out / MODEL
    with replacing_directory(finished) as partial:
        trainer.average.save_pretrained(partial)
        tokenizer.save(partial)
        content = {"config": public_config(config), "inputs": trainer.record["inputs"], "held_out": report}
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        (partial / TRAINING).write_text(text, encoding="utf-8")
    sys.stdout.write(table(report) + f"model: {finished}\nloss curve: {config.out / LOSS_CURVE}\n")


def refuse_finished(directory: Path) -> None:
    """Raise OutputExistsError if the model is there, or something else stands in its place."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    lacking = [name for name in FINISHED if not (directory / name).is_file()]
    if lacking:
        raise OutputExistsError(
            f"{directory} exists but is no finished model: it lacks {', '.join(lacking)}; move it away, and "
            f"the same command makes it from the last checkpoint"
        )
    raise OutputExistsError(f"{directory} exists: that run is complete; choose another out directory")


def find_inputs(config: TrainLMConfig) -> Tokenizer:
    """The tokenizer, once the text is known to be there too.

    Raises:
        DataError: If text files do not exist; all of them are named.
        CheckpointError: If there is no tokenizer.
    """
    missing = [str(file) for file in dict.fromkeys(config.files) if not file.exists()]
    if missing:
        missing += [f"the tokenizer {config.tokenizer}"] * (not config.tokenizer.exists())
        raise DataError(
            f"what this run is to be trained on is not here: {', '.join(missing)}; a recipe's text does not "
            f"come with it, name yours with --files A.txt,B.jsonl and --tokenizer DIRECTORY"
        )
    try:
        return load_tokenizer(config.tokenizer)
    except CheckpointError as error:
        if config.tokenizer.exists():
            raise
        raise CheckpointError(
            f"the tokenizer {config.tokenizer} does not exist; name its directory with --tokenizer, or make "
            f"one with mdlm-interp train-tokenizer (as a repository: {error})"
        ) from None


def continuation(directory: Path) -> str:
    """What an interrupted run left, and what to do next."""
    step = saved_step(directory)
    if step is None:
        return "no step was saved yet, and the same command starts anew"
    return f"step {step} is saved in {directory}, and the same command continues from there"


def evaluate(trainer: Trainer, tokenizer: Tokenizer, streams: TokenStreams) -> dict[Form, dict[str, Any]]:
    """The bound of the averaged weights on all held-out text, beside two count models of the same tokens.

    One report for each form of sequence that was trained.
    """
    blocks = held_out_blocks(trainer.config, tokenizer, streams)
    return {form: _evaluate(trainer, streams, form, blocks[form].numpy()) for form in blocks}


def _evaluate(
    trainer: Trainer, streams: TokenStreams, form: Form, blocks: NDArray[np.int64]
) -> dict[str, Any]:
    bound = nelbo(trainer.average, torch.from_numpy(blocks), times_per_sequence=FINAL_TIMES, progress=True)
    wrapped, length = form == "wrapped", blocks.shape[1]
    text_tokens = blocks.shape[0] * (length - 2 if wrapped else length)
    text_bytes = text_tokens * streams.held_out_bytes / len(streams.held_out)
    vocab_size = trainer.config.model.vocab_size
    nats = {
        "unigram": unigram_nats(streams.train, blocks, vocab_size, wrapped=wrapped),
        "bigram": bigram_nats(streams.train, blocks, vocab_size, wrapped=wrapped),
        "model": bound.nats_per_token,
    }
    estimator = (
        f"continuous-time bound, {FINAL_TIMES} stratified times a sequence of {length} tokens, "
        f"t in [0.001, 1], mean over all positions"
    )
    if wrapped:
        estimator += "; the end-of-texts at both ends count as positions and cost the count models nothing"
    return {
        "nats_per_token": nats,
        "bits_per_byte": {
            name: value * blocks.size / text_bytes / math.log(2) for name, value in nats.items()
        },
        "standard_error_nats": finite(bound.standard_error),
        "masked_cross_entropy_by_time": [finite(value) for value in bound.by_time],
        "tokens": blocks.size,
        "estimator": estimator,
    }


def public_config(config: TrainLMConfig) -> dict[str, object]:
    """The config as recorded beside the model: file names without the directories of one machine."""
    mapping = to_mapping(config)
    mapping["files"] = [Path(file).name for file in config.files]
    return {name: value for name, value in mapping.items() if name not in ("out", "tokenizer")}


def table(report: dict[Form, dict[str, Any]]) -> str:
    """Held-out figures as text, a table for each form."""
    lines = []
    for form, figures in report.items():
        lines += [f"held-out text, {FORMS[form]}", f"{'':14} {'nats/token':>10} {'bits/byte':>10}"]
        for name, nats in figures["nats_per_token"].items():
            lines.append(f"{name:14} {nats:10.4f} {figures['bits_per_byte'][name]:10.4f}")
        error = figures["standard_error_nats"]
        spread = "unknown from one sequence" if error is None else f"{error:.4f} nats"
        lines.append(f"(model: upper bound, standard error {spread})")
    return "\n".join([*lines, ""])
