"""What the recipes that train a masked diffusion model on plain text share.

A window is sequences of the text, times of low discrepancy over the window, and independent masks; its loss is
the continuous-time bound, the cross-entropy at masked positions weighted by 1 / t, as a mean over positions.
Every held-out figure is that bound too, always at the same times and masks.

Source:
    Sahoo et al. 2024, arXiv:2406.07524, section 3 and equation 10; kuleshov-group/mdlm, diffusion.py.
"""

# Axes: batch, pos

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mdlm_interp.checkpoints import WEIGHTS
from mdlm_interp.diffusion import LogLinearSchedule, corrupt, nelbo_per_token, stratified_times
from mdlm_interp.errors import CheckpointError, DataError
from mdlm_interp.evaluation import Nelbo, nelbo
from mdlm_interp.model import HookedMDLM
from mdlm_interp.randomness import uniforms
from mdlm_interp.shapes import Float, Int64
from mdlm_interp.tokenizers import Tokenizer, load_tokenizer
from mdlm_interp.training.compressors import code_length
from mdlm_interp.training.config import Form, TextConfig
from mdlm_interp.training.data import TokenStreams, consecutive_blocks, read_streams
from mdlm_interp.training.loop import finite
from mdlm_interp.training.recipes import Batch, LogEntry, Network, Recipe
from mdlm_interp.training.sampling import sampler_of
from mdlm_interp.training.text_report import evaluate, table
from mdlm_interp.training.token_cache import mapped_streams

VALIDATION_SEED = 1


class TextRecipe(Recipe):
    """Training on windows of text files.

    Args:
        config: Its settings.
        tokenizer: What the text is encoded with.
        streams: The text's tokens.
    Raises:
        DataError: If the tokenizer does not fit the model, or the text is shorter than one sequence.
    """

    FINISHED: ClassVar[tuple[str, ...]] = ("config.json", WEIGHTS, "tokenizer.json")
    QUANTITY: ClassVar[str] = "bound on the NLL (nats per token)"
    SCHEDULE: ClassVar[LogLinearSchedule]
    """Which share of the tokens is masked at time t."""

    config: TextConfig

    def __init__(self, config: TextConfig, tokenizer: Tokenizer, streams: TokenStreams) -> None:
        if tokenizer.vocab_size != config.shape.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} ids and model.vocab_size is "
                f"{config.shape.vocab_size}; they must be equal"
            )
        super().__init__(config)
        self.tokenizer, self.streams = tokenizer, streams
        self.mask_id = tokenizer.mask_id
        self.sampler = sampler_of(config, streams.train, tokenizer.eos_id)
        self.held_out = self.held_out_blocks(config.validation_sequences)

    @classmethod
    def read(cls, config: TextConfig) -> tuple[Tokenizer, TokenStreams]:
        """The tokenizer, and the text's tokens from the files or from their cache."""
        tokenizer = find_inputs(config)
        if config.token_cache is None:
            return tokenizer, read_streams(config.files, tokenizer, config.held_out_share)
        return tokenizer, mapped_streams(config.token_cache, config.files, tokenizer, config.held_out_share)

    def summary(self) -> str:
        """See `Recipe.summary`."""
        return f"{len(self.streams.train):,} training tokens, {len(self.streams.held_out):,} held out"

    def inputs(self) -> dict[str, Any]:
        """See `Recipe.inputs`."""
        return {
            "sources": [asdict(source) for source in self.streams.sources],
            "tokenizer_sha256": self.tokenizer.sha256,
        }

    @abstractmethod
    def build(self) -> HookedMDLM:
        """See `Recipe.build`."""

    def times(self, step: int, rows: int) -> Float[Tensor, " batch"]:
        """t of each sequence of a window, evenly spread over the window."""
        return stratified_times(torch.from_numpy(uniforms(self.config.seed, "train:t", step, rows)))

    def batch(self, step: int) -> Batch:
        """Clean sequences x_0, what is left of them x_t, and their times t."""
        x_0 = self.sampler.batch(step)
        t = self.times(step, x_0.shape[0])
        x_t = corrupt(
            x_0,
            self.SCHEDULE.move_chance(t),
            self.mask_id,
            seed=self.config.seed,
            indices=self.sampler.indices(step),
        )
        return {"x_0": x_0, "x_t": x_t, "t": t}

    def weight(self, batch: Batch) -> float:
        """All positions, masked or not."""
        return float(batch["x_0"].numel())

    def tokens(self, batch: Batch) -> int:
        """See `Recipe.tokens`."""
        return batch["x_0"].numel()

    def loss_sum(self, network: Network, batch: Batch, step: int) -> Float[Tensor, ""]:
        """The bound in nats, summed over positions."""
        x_t, t = batch["x_t"], batch["t"]
        logits = network(x_t, self.SCHEDULE.sigma(t).float())
        return nelbo_per_token(logits, batch["x_0"], x_t, t, self.mask_id).sum()

    def held_out_blocks(self, limit: int | None = None) -> dict[Form, Int64[Tensor, "batch pos"]]:
        """Held-out sequences in the forms that the config trains, evenly spread ones if limited."""
        return {
            form: consecutive_blocks(
                self.streams.held_out,
                self.config.shape.model_length,
                limit,
                wrap_with=self.tokenizer.eos_id if form == "wrapped" else None,
            )
            for form in self.config.forms
        }

    def bounds(self, module: nn.Module) -> dict[Form, Nelbo]:
        """A model's bound on some held-out text in each form, always at the same times and masks."""
        model = cast(HookedMDLM, module)
        return {
            form: nelbo(model, blocks, seed=VALIDATION_SEED, times_per_sequence=2, batch_size=64)
            for form, blocks in self.held_out.items()
        }

    def opening(self) -> Iterable[LogEntry]:
        """The compressor's code length, if one was asked for."""
        if self.config.compressor is None:
            return
        found = code_length(self.streams.train, self.tokenizer, self.config.compressor)
        yield {
            "compressor": found.compressor,
            "ideal_loss_nats": found.nats_per_token,
            "bits_per_byte": found.bits_per_byte,
            "compressed_tokens": found.n_tokens,
            "note": str(found),
        }

    def validate(self, module: nn.Module) -> Iterable[LogEntry]:
        """One line for each form of sequence that is trained."""
        for form, bound in self.bounds(module).items():
            error = finite(bound.standard_error)
            yield {"form": form, "held_out_nats": bound.nats_per_token, "error": error}

    def evaluate(self, module: nn.Module) -> dict[str, Any]:
        """The bound on all held-out text beside count models of the same tokens, for each form."""
        model = cast(HookedMDLM, module)
        blocks = self.held_out_blocks()
        return {form: evaluate(model, self.streams, form, blocks[form].numpy()) for form in blocks}

    def table(self, report: dict[str, Any]) -> str:
        """See `Recipe.table`."""
        return table(report)

    def save(self, module: nn.Module, directory: Path) -> None:
        """The model directory that every command takes."""
        cast(HookedMDLM, module).save_pretrained(directory)
        self.tokenizer.save(directory)


def find_inputs(config: TextConfig) -> Tokenizer:
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
        return load_tokenizer(str(config.tokenizer))  # a Path is no "bundled"
    except CheckpointError as error:
        if config.tokenizer.exists():
            raise
        raise CheckpointError(
            f"the tokenizer {config.tokenizer} does not exist; name its directory with --tokenizer, or make "
            f"one with mdlm-interp train-tokenizer (as a repository: {error})"
        ) from None
