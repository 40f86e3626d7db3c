"""`mdlm-interp train-lm`: train a masked diffusion language model and save it as a model directory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mdlm_interp.config_args import parse_args
from mdlm_interp.config_files import to_mapping
from mdlm_interp.errors import OutputExistsError
from mdlm_interp.evaluation import nelbo
from mdlm_interp.tokenizers import load_tokenizer
from mdlm_interp.training.baselines import bigram_nats, unigram_nats
from mdlm_interp.training.config import TrainLMConfig
from mdlm_interp.training.data import TokenStreams, consecutive_blocks, read_streams
from mdlm_interp.training.plots import plot_losses
from mdlm_interp.training.trainer import LOG, Trainer, train

MODEL = "model"
FINAL_TIMES = 8
"""Noise levels a held-out sequence in the final evaluation."""


def main(argv: list[str]) -> int:
    """`mdlm-interp train-lm CONFIG.yaml [--key value]`."""
    config = parse_args(TrainLMConfig, argv, prog="mdlm-interp train-lm", config_file=True)
    finished = config.out / MODEL
    if finished.exists():
        raise OutputExistsError(f"{finished} exists: that run is complete; choose another out directory")
    tokenizer = load_tokenizer(config.tokenizer)
    streams = read_streams(config.files, tokenizer, config.held_out_share)
    sys.stdout.write(f"{len(streams.train):,} training tokens, {len(streams.held_out):,} held out\n")
    trainer = train(config, tokenizer, streams, progress=True)
    plot_losses(config.out / LOG, config.out / "loss.png")
    report = evaluate(trainer, streams)
    trainer.average.save_pretrained(finished)
    tokenizer.save(finished)
    record = {"config": public_config(config), "held_out": report}
    (finished / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(report) + f"model: {finished}\nloss curve: {config.out / 'loss.png'}\n")
    return 0


def evaluate(trainer: Trainer, streams: TokenStreams) -> dict[str, Any]:
    """The bound of the averaged weights on all held-out text, beside two count models of the same tokens."""
    blocks = consecutive_blocks(streams.held_out, trainer.config.model.model_length)
    bound = nelbo(trainer.average, blocks, times_per_sequence=FINAL_TIMES, progress=True)
    bytes_per_token = streams.held_out_bytes / len(streams.held_out)
    vocab_size = trainer.config.model.vocab_size
    nats = {
        "unigram": unigram_nats(streams.train, blocks.numpy(), vocab_size),
        "bigram": bigram_nats(streams.train, blocks.numpy(), vocab_size),
        "model": bound.nats_per_token,
    }
    return {
        "nats_per_token": nats,
        "bits_per_byte": {name: value / bytes_per_token / 0.6931471805599453 for name, value in nats.items()},
        "standard_error_nats": bound.standard_error,
        "masked_cross_entropy_by_time": bound.by_time,
        "tokens": blocks.numel(),
        "estimator": f"continuous-time bound, {FINAL_TIMES} stratified times a sequence of "
        f"{blocks.shape[1]} tokens, t in [0.001, 1], mean over all positions",
    }


def public_config(config: TrainLMConfig) -> dict[str, object]:
    """The config as recorded beside the model: file names without the directories of one machine."""
    mapping = to_mapping(config)
    mapping["files"] = [Path(file).name for file in config.files]
    return {name: value for name, value in mapping.items() if name not in ("out", "tokenizer")}


def table(report: dict[str, Any]) -> str:
    """Held-out figures as text."""
    lines = [f"{'held-out text':14} {'nats/token':>10} {'bits/byte':>10}"]
    for name, nats in report["nats_per_token"].items():
        lines.append(f"{name:14} {nats:10.4f} {report['bits_per_byte'][name]:10.4f}")
    return (
        "\n".join(lines)
        + f"\n(model: upper bound, standard error {report['standard_error_nats']:.4f} nats)\n"
    )
