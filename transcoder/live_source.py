"""Text and a running model as what a run trains on; see `live`."""

# Axes: seq, pos, row, d_model

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capture.config import CaptureConfig
from capture.forward import Forward
from capture.plan import SCHEDULE, read_blocks
from capture.provenance import provenance
from capture.request import Request, prepared
from mdlm_interp.config_files import to_mapping
from mdlm_interp.shapes import Int64
from transcoder.batches import Batch, Batches
from transcoder.config import CLTRunConfig, TranscoderConfig, hook_names
from transcoder.data import Coverage
from transcoder.held_out import split_text
from transcoder.identity import probe_of
from transcoder.live import LiveBatches, LiveText
from transcoder.normalisation import Normalisation, normalisation_from_moments
from transcoder.verified_targets import Sample, proof

STATISTICS, HELD_OUT, SAMPLE = "clt:live:statistics", "clt:live:held_out", "clt:live:sample"
"""Streams of noise beside that of training."""


class LiveSource:
    """A model and the text that it runs over.

    Raises:
        ConfigError, DataError, HookError, CheckpointError: If the request does not fit the model or the text.
    """

    def __init__(self, config: CLTRunConfig) -> None:
        self._config = config
        self._request = _request(config)
        model = self._request.model.config
        self._dimensions = model.n_blocks, model.hidden_dim
        inputs, outputs = (
            hook_names(name, model.n_blocks) for name in (config.input_hook, config.output_hook)
        )
        blocks = read_blocks(self._request.config, self._request.tokenizer)
        self._hooks = list(dict.fromkeys([*inputs, *outputs]))
        self._text = LiveText(
            blocks=list(islice(blocks, config.live.max_sequences)),
            forward=Forward(self._request.model, self._hooks, together=True),
            hooks=(inputs, outputs),
            mask_id=model.mask_id,
            seed=config.train.seed,
            select=config.train.select,
        )
        self._x_0 = torch.from_numpy(np.stack([block.ids for block in self._text.blocks]))
        self.split = split_text(self._x_0, config.held_out_fraction, config.train.seed)

    @property
    def x_0(self) -> Int64[Tensor, "seq pos"]:
        """Clean tokens of all blocks."""
        return self._x_0

    @property
    def dimensions(self) -> tuple[int, int]:
        """Number of layers, and d_model."""
        return self._dimensions

    def normalisation(self, hooks: Sequence[str]) -> Normalisation:
        """From rows of some training sequences, in float64."""
        return normalisation_from_moments([self._moments[name] for name in hooks], list(hooks))

    def batches(self, shape: TranscoderConfig) -> Batches:
        """Of the training sequences, noised anew in every epoch."""
        return LiveBatches(self._text, self.split.train, self._config.train, self._config.live)

    def held_out(self, shape: TranscoderConfig) -> list[Batch]:
        """Of text that training never sees, noised once."""
        limit, size = self._config.train.calibration_rows, self._config.live.batch_sequences
        found, n_rows = [], 0
        for start in range(0, len(self.split.held_out), size):
            numbers = self.split.held_out[start : start + size].tolist()
            sequences = self._text.noised(numbers, start, HELD_OUT)
            if n_rows >= limit:
                break
            if sequences:
                found.append(self._text.rows(sequences, size))
                n_rows += len(found[-1].rows)
        return found

    def record(self, shape: TranscoderConfig) -> dict[str, Any]:
        """The same as of a store: the fingerprint is of the text, the weights and what decides the noise."""
        config, request = self._config, self._request
        origin = provenance(
            model_directory=request.directory,
            model=request.model,
            tokenizer=request.tokenizer,
            config=request.config,
            schedule=SCHEDULE,
            threads=torch.get_num_threads(),
        )
        rows = len(self._text.blocks) * self._text.length
        settings = [to_mapping(config.live), config.train.seed, origin["weights_sha256"], config.train.select]
        content = hashlib.sha256(json.dumps(settings, default=str).encode())
        content.update(self._x_0.numpy().astype("<i8").tobytes())
        of_store = {
            "fingerprint": content.hexdigest(),
            "coverage": Coverage(rows, rows, True)._asdict(),
            "provenance": origin,
        }
        sample = self._sample(0)
        outputs = [sample.rows[name] for name in shape.output_hooks]
        return {"store": of_store, "probe": probe_of(sample.x_t, sample.t, sample.positions, outputs)}

    def verified(self, shape: TranscoderConfig) -> dict[str, Any] | None:
        """How far the native rows are from the oracle's."""
        count = self._config.train.verify_sequences
        if count is None:
            return None
        numbers = range(min(count, len(self._text.blocks)))
        return proof(
            self._request.model, [self._sample(number) for number in numbers], name="the running model"
        )

    def _sample(self, number: int) -> Sample:
        """A block with noise of its own, and all its rows."""
        every = LiveText(**{**vars(self._text), "select": "all"})
        (sequence,) = every.noised([number], number, SAMPLE)
        rows = every.rows([sequence], 1)
        acts = {name: rows.x[layer] for layer, name in enumerate(every.hooks[0])}
        acts |= {name: rows.y[layer] for layer, name in enumerate(every.hooks[1])}
        return Sample(
            number=number,
            first_row=number * self._text.length,
            x_t=torch.from_numpy(sequence.xt),
            t=sequence.t,
            positions=torch.from_numpy(sequence.positions),
            rows={name: acts[name] for name in self._hooks},
        )

    @cached_property
    def _moments(self) -> dict[str, tuple[Tensor, float]]:
        """Mean row and mean square of each hook point."""
        live, train = self._config.live, self.split.train
        totals: dict[str, Tensor] = {}
        squares = dict.fromkeys(self._hooks, 0.0)
        n_rows = 0
        for start in range(0, min(live.statistics_sequences, len(train)), live.batch_sequences):
            numbers = train[start : start + live.batch_sequences].tolist()
            sequences = self._text.noised(numbers, start, STATISTICS)
            if not sequences:
                continue
            rows = self._text.rows(sequences, live.batch_sequences)
            n_rows += len(rows.rows)
            for names, values in zip(self._text.hooks, (rows.x, rows.y), strict=True):
                for name, acts in zip(names, values.double(), strict=True):
                    totals[name] = totals.get(name, torch.zeros(())) + acts.sum(0)
                    squares[name] += float(acts.square().mean(1).sum())
        return {name: (totals[name] / n_rows, squares[name] / n_rows) for name in self._hooks}


def _request(config: CLTRunConfig) -> Request:
    """The model, tokenizer and text, checked as a capture checks them; nothing is written."""
    names = [name.replace("{layer}", "*") for name in (config.input_hook, config.output_hook)]
    return prepared(
        CaptureConfig(
            files=config.live.files,
            out=str(config.out),
            model=config.model or "bundled",
            hooks=tuple(dict.fromkeys(names)),
            length=config.live.length,
            max_sequences=config.live.max_sequences,
            seed=config.train.seed,
            device=config.device,
            batch_size=config.live.batch_sequences,
            rank=0,
            world_size=1,
        )
    )
