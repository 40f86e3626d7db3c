"""The command `sample`: text from masks, by any sampler."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from mdlm_interp.atomic_files import refuse_existing
from mdlm_interp.commands import ModelChoice, sequence_length
from mdlm_interp.config_args import parse_args
from mdlm_interp.decoding.choice import SamplerChoice
from mdlm_interp.decoding.draws import DrawArithmetic
from mdlm_interp.decoding.sampler import sample, start_tokens
from mdlm_interp.decoding.settings import Record, Sampler
from mdlm_interp.decoding.trajectory import Seen
from mdlm_interp.errors import ConfigError
from mdlm_interp.filling import encode_prompt
from mdlm_interp.model import HookedMDLM
from mdlm_interp.tokenizers import Tokenizer

Parts = Callable[[HookedMDLM, Sampler], tuple[HookedMDLM, DrawArithmetic]]
"""Another arithmetic's model and draws for a model and what is to be drawn; the oracle hands in its own."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplerChoice, ModelChoice):
    """Write text from masks by denoising."""

    prompt: str = ""
    """Text that the samples begin with; [MASK] inside it is filled too."""
    n: int = 1
    """Number of samples."""
    length: int | None = None
    """Tokens in a sample; the model's context if none."""
    seed: int = 0
    """Key of all draws: the same seed gives the same text."""
    batch_size: int = 16
    """Samples that are denoised together."""
    trajectory: Path | None = None
    """Directory to write every state to, with reveal steps, confidence and entropy."""
    alternatives: int = 0
    """Most probable tokens that the trajectory keeps for each position and step; `explore trajectory` shows them."""
    live: bool = False
    """Show each step in the terminal as it is taken; space pauses, the arrow keys step, q leaves the view."""

    metrics: bool = False
    """Print entropy, rep-n and distinct-n of the samples after them."""
    judge: str | None = None
    """With metrics: directory of a second model, an MDLM or a causal one; its perplexity of the samples is printed."""

    def __post_init__(self) -> None:
        if self.judge is not None and not self.metrics:
            raise ConfigError(
                "a judge's perplexity is printed beside entropy and repetition, or it would mislead; add --metrics"
            )
        for name in ("n", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.trajectory is not None and self.n > self.batch_size:
            raise ConfigError(
                f"a trajectory is of one batch: n is {self.n}, batch_size {self.batch_size}; raise batch_size"
            )
        if self.alternatives < 0 or (self.alternatives and self.trajectory is None):
            raise ConfigError(
                f"alternatives are kept in a trajectory, at least 0 of them, got {self.alternatives}; name --trajectory"
            )
        super().__post_init__()


def main(
    argv: list[str],
    *,
    prog: str = "mdlm-interp sample",
    config_class: type[SampleConfig] = SampleConfig,
    parts: Parts | None = None,
) -> int:
    """`mdlm-interp sample [CONFIG.yaml] [PROMPT]`; with the oracle's config and parts, `mdlm-interp oracle sample`."""
    config = parse_args(config_class, argv, prog=prog, positional=("prompt",), config_file=True)
    if config.trajectory is not None:
        refuse_existing(config.trajectory)
    model, tokenizer = config.load()
    length = sequence_length(config.length, 1, model)
    prompt = encode_prompt(model, tokenizer, config.prompt)[0].tolist() if config.prompt else []
    start = start_tokens(model, length, prompt)
    sampler = config.sampler()
    drawn_from, arithmetic = (model, None) if parts is None else parts(model, sampler)
    written: list[list[int]] = []
    for first in range(0, config.n, config.batch_size):
        numbers = range(first, min(first + config.batch_size, config.n))
        with _view(config, tokenizer) as watch:
            trajectory = sample(
                drawn_from,
                start.expand(len(numbers), -1),
                sampler,
                seed=config.seed,
                indices=numbers,
                arithmetic=arithmetic,
                record=Record(alternatives=config.alternatives),
                watch=watch,
                progress=watch is None,
            )
        for number, row in zip(numbers, trajectory.final.tolist(), strict=True):
            separator = "---\n" if number > 0 else ""
            sys.stdout.write(f"{separator}{tokenizer.decode(row)}\n")
        sys.stdout.flush()
        written += trajectory.final.tolist()
        if config.trajectory is not None:
            trajectory.save(config.trajectory)
    if config.metrics:
        sys.stdout.write("---\n" + "\n".join(_metrics(config, tokenizer, written)) + "\n")
    return 0


def _metrics(config: SampleConfig, tokenizer: Tokenizer, samples: list[list[int]]) -> list[str]:
    """Lines with what the samples look like, and how probable a second model finds them."""
    from mdlm_interp.evaluation.generation import sample_statistics
    from mdlm_interp.evaluation.judges import judge_samples

    found = sample_statistics(samples)
    error = f" +- {found.entropy_error:.4f}" if found.n_samples > 1 else ""
    lines = [
        f"{found.n_samples} samples of {len(samples[0])} tokens",
        f"unigram entropy  {found.entropy:.4f}{error} nats (at most {math.log(len(samples[0])):.4f})",
        *(f"rep-{n}            {value:.4f}" for n, value in found.rep.items()),
        *(f"distinct-{n}       {value:.4f}" for n, value in found.distinct.items()),
    ]
    if config.judge is not None:
        texts = [tokenizer.decode(sample) for sample in samples]
        judged = judge_samples(texts, config.judge, seed=config.seed, device=config.device, progress=True)
        error = f" +- {judged.standard_error:.4f}" if judged.n_texts > 1 else ""
        lines += [
            f"perplexity under {config.judge}  {judged.perplexity:.4g}",
            f"nats per token   {judged.nats_per_token:.4f}{error}",
            f"estimator: {judged.estimator}; {judged.n_cut} of {judged.n_texts} texts cut at its context",
        ]
    return lines


def _view(
    config: SampleConfig, tokenizer: Tokenizer
) -> AbstractContextManager[Callable[[Seen], None] | None]:
    """The live view, if it is wanted; its libraries are loaded only then."""
    if not config.live:
        return nullcontext()
    from mdlm_interp.viewer.player import live_view

    return live_view(tokenizer)
