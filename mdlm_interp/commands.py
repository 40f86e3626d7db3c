"""The commands that need only the model: info, fill, ppl, export-hf."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mdlm_interp.checkpoints import resolve_source, weights_sha256
from mdlm_interp.config_args import parse_args
from mdlm_interp.errors import ConfigError
from mdlm_interp.evaluation.bound import N_TIME_BINS, Nelbo, nelbo, pooled
from mdlm_interp.evaluation.detokenise import TextForm
from mdlm_interp.evaluation.likelihood import order_likelihood
from mdlm_interp.evaluation.packing import text_sequences
from mdlm_interp.filling import check_fits, fill_masks
from mdlm_interp.model import HookedMDLM
from mdlm_interp.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model a command runs."""

    model: str = "bundled"
    """Model directory, Hugging Face repository id, or "bundled"."""
    tokenizer: str | None = None
    """Directory with the tokenizer, if it is not the model's own."""
    device: str = "cpu"
    """Where the model runs, such as cpu or cuda."""

    def load(self) -> tuple[HookedMDLM, Tokenizer]:
        """The model and its tokenizer, which must fit each other."""
        return load_pair(self.model, self.tokenizer, self.device)


def load_pair(source: str, tokenizer_source: str | None, device: str = "cpu") -> tuple[HookedMDLM, Tokenizer]:
    """A model and a tokenizer that fits it: its own, unless another source is given."""
    model = HookedMDLM.from_pretrained(source, device=device)
    tokenizer = load_tokenizer(source if tokenizer_source is None else tokenizer_source)
    check_fits(tokenizer, model)
    return model, tokenizer


def sequence_length(given: int | None, shortest: int, model: HookedMDLM) -> int:
    """Tokens in a sequence: as given, or the model's context if none."""
    context = model.config.model_length
    if given is None:
        return context
    if not shortest <= given <= context:
        raise ConfigError(
            f"length must be in [{shortest}, {context}], the model's context, or none for all of it; got {given}"
        )
    return given


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Describe a model: shape, parameters, weights' hash, hook points."""

    model: str = "bundled"
    """Model directory, Hugging Face repository id, or "bundled"."""
    hooks: bool = False
    """List every hook point."""


def info(argv: list[str]) -> int:
    """`mdlm-interp info [MODEL]`."""
    config = parse_args(InfoConfig, argv, prog="mdlm-interp info", positional=("model",))
    directory = resolve_source(config.model)
    model = HookedMDLM.from_pretrained(directory)
    lines = [
        f"{key:18} {value}" for key, value in model.config.to_mapping().items() if key != "architectures"
    ]
    lines.append(f"{'mask_id':18} {model.config.mask_id}")
    lines.append(f"{'parameters':18} {sum(p.numel() for p in model.parameters()):,}")
    lines.append(f"{'weights sha256':18} {weights_sha256(directory)}")
    lines.append(f"{'hook points':18} {len(model.hook_names)}")
    if config.hooks:
        lines += [f"  {name}" for name in model.hook_names]
    print("\n".join(lines))
    return 0


@dataclass(frozen=True, kw_only=True)
class FillConfig(ModelChoice):
    """Fill every [MASK] of a text, most confident first, and show the best candidates."""

    text: str
    """Text with [MASK] where the model should fill in; a [MASK] includes the space before it."""
    top_k: int = 5
    """Candidates shown for each mask."""


def fill(argv: list[str]) -> int:
    """`mdlm-interp fill TEXT`."""
    config = parse_args(FillConfig, argv, prog="mdlm-interp fill", positional=("text",))
    model, tokenizer = config.load()
    result = fill_masks(model, tokenizer, config.text, config.top_k)
    print(result.text)
    for prediction in result.masks:
        best = "  ".join(f"{word!r} {probability:.3f}" for word, probability in prediction.top)
        print(f"  position {prediction.position}: {best}")
    return 0


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(ModelChoice):
    """Estimate the perplexity bound of text files, or compute their likelihood under a decoding order."""

    files: tuple[Path, ...]
    """Text files, globs or directories of shards; of several, each is reported and then all together."""
    length: int | None = None
    """Tokens in a sequence; the model's context if none."""
    wrap: bool = True
    """Put <|endoftext|> around each sequence, as upstream does."""
    max_sequences: int | None = None
    """Take at most this many sequences of each file; all if none."""
    insert_eos: bool = True
    """Put <|endoftext|> after each document; the paper's zero-shot figures are without it and without wrap."""
    text_form: TextForm = "raw"
    """Corpus whose tokenised text is put back together first: wikitext, ptb, lm1b or lambada."""
    estimator: Literal["nelbo", "order"] = "nelbo"
    """The bound by noised text, or the exact likelihood under the order, which takes a pass for each step."""
    times: int = 4
    """With nelbo: noise levels for each sequence, stratified."""
    n_steps: int | None = None
    """With nelbo: the bound of denoising in so many steps; of continuous time if none."""
    order: Literal["left_to_right", "confidence", "margin", "entropy", "random"] = "left_to_right"
    """With order: which position is revealed next."""
    positions: tuple[int, ...] | None = None
    """With order: positions, counted from 0, in the order in which they are revealed; instead of --order."""
    per_step: int = 1
    """With order: positions revealed in a step."""
    batch_size: int = 32
    """Sequences in a forward pass."""
    seed: int = 0
    """Key of times and masks, and of the random order."""

    def __post_init__(self) -> None:
        for name in ("times", "batch_size", "max_sequences", "n_steps", "per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        of_order: dict[str, object] = {"order": "left_to_right", "positions": None, "per_step": 1}
        unused = of_order if self.estimator == "nelbo" else {"times": 4, "n_steps": None}
        for name, default in unused.items():
            if getattr(self, name) != default:
                raise ConfigError(
                    f"{name} has no effect with estimator {self.estimator!r}, got {getattr(self, name)!r}; leave it out"
                )
        if self.positions is not None and self.order != "left_to_right":
            raise ConfigError(f"positions are an order of their own, got order {self.order!r} too; give one")


def ppl(argv: list[str]) -> int:
    """`mdlm-interp ppl [CONFIG.yaml] FILES...`."""
    config = parse_args(
        PerplexityConfig, argv, prog="mdlm-interp ppl", positional=("files",), config_file=True
    )
    if not config.files:
        raise ConfigError("ppl needs at least one text file")
    twice = next((file for number, file in enumerate(config.files) if file in config.files[:number]), None)
    if twice is not None:  # its sequences would count as independent ones in the standard error
        raise ConfigError(f"each file may be named once, {twice} is named twice; leave one of them out")
    model, tokenizer = config.load()
    length = sequence_length(config.length, 3 if config.wrap else 1, model)
    texts = [_sequences(file, tokenizer, length, config) for file in config.files]
    sizes = [tokenizer.count_bytes(x_0.flatten().tolist()) for x_0 in texts]
    if config.estimator == "order":
        return _print_likelihood(model, torch.cat(texts), sum(sizes), config)
    bounds: list[Nelbo] = []
    for file, x_0, n_bytes in zip(config.files, texts, sizes, strict=True):
        bound = nelbo(
            model,
            x_0,
            seed=config.seed,
            first=sum(earlier.n_sequences for earlier in bounds),
            times_per_sequence=config.times,
            n_steps=config.n_steps,
            batch_size=config.batch_size,
            progress=True,
        )
        bounds.append(bound)
        if len(texts) > 1:
            figures = ", ".join(f"{name} <= {value}" for name, value in _figures(bound, n_bytes).items())
            print(f"{file}: {figures}, over {_counted(bound.n_sequences)}")
    bound = pooled(bounds)
    if len(texts) > 1:
        print(f"all {len(texts)} files together:")
    for name, value in _figures(bound, sum(sizes)).items():
        print(f"{name:15} <= {value}")
    print(f"over {_counted(bound.n_sequences)} of {length} tokens ({sum(sizes):,} bytes)")
    print(f"estimator: {bound.estimator}")
    print("cross-entropy at masked positions by t (nats):")
    for number, (nats, count) in enumerate(zip(bound.by_time, bound.masked_by_time, strict=True)):
        shown = f"{nats:.3f}" if count else "no token was masked at these t"
        print(f"  [{number / N_TIME_BINS:.1f}, {(number + 1) / N_TIME_BINS:.1f})  {shown}")
    return 0


def _sequences(file: Path, tokenizer: Tokenizer, length: int, config: PerplexityConfig) -> torch.Tensor:
    """Token blocks of one file [sequence pos]."""
    return text_sequences(
        file,
        tokenizer,
        length,
        wrap=config.wrap,
        insert_eos=config.insert_eos,
        form=config.text_form,
        max_sequences=config.max_sequences,
    )


def _print_likelihood(model: HookedMDLM, x_0: torch.Tensor, n_bytes: int, config: PerplexityConfig) -> int:
    """The likelihood of all sequences together under one order."""
    found = order_likelihood(
        model,
        x_0,
        config.order if config.positions is None else config.positions,
        per_step=config.per_step,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=True,
    )
    error = f"+- {found.standard_error:.4f}" if found.n_sequences > 1 else "(one sequence)"
    bits = found.nats_per_token * found.n_tokens / n_bytes / math.log(2) if n_bytes else math.nan
    print(f"perplexity       = {found.perplexity:.6g}")
    print(f"nats per token   = {found.nats_per_token:.4f} {error}")
    print(f"bits per byte    = {bits:.4f}")
    print(f"over {_counted(found.n_sequences)} of {x_0.shape[1]} tokens ({n_bytes:,} bytes)")
    print(f"estimator: {found.estimator}")
    return 0


def _counted(sequences: int) -> str:
    return f"{sequences:,} sequence{'s' * (sequences > 1)}"


def _figures(bound: Nelbo, n_bytes: int) -> dict[str, str]:
    """The bound in three units, with what can be said about its error."""
    perplexity = bound.perplexity
    if math.isinf(perplexity) and math.isfinite(bound.nats_per_token):
        shown = "exp of the nats per token, more than float64 holds"
    else:
        shown = f"{perplexity:.3f}" if perplexity < 1e9 else f"{perplexity:.4g}"
    if bound.n_sequences == 1:
        error = "(no standard error: that takes two sequences)"
    elif math.isfinite(bound.standard_error):
        error = f"+- {bound.standard_error:.4f}"
    else:
        error = "(no standard error: the bound is not finite)"
    return {
        "perplexity": shown,
        "nats per token": f"{bound.nats_per_token:.4f} {error}",
        "bits per byte": f"{bound.bits_per_byte(n_bytes):.4f}",
    }


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a folder that transformers loads with trust_remote_code=True, without this package."""

    out: Path
    """Directory to write; it must not exist, or be empty."""
    model: str = "bundled"
    """Model directory, Hugging Face repository id, or "bundled"."""
    tokenizer: str | None = None
    """Directory with the tokenizer, if it is not the model's own."""


def export_hf(argv: list[str]) -> int:
    """`mdlm-interp export-hf OUT`."""
    from mdlm_interp.hf import export_hf as export

    config = parse_args(ExportConfig, argv, prog="mdlm-interp export-hf", positional=("out",))
    model, tokenizer = load_pair(config.model, config.tokenizer)
    export(model, config.out, tokenizer)
    sys.stdout.write(
        f"{config.out}: load it with AutoModelForMaskedLM.from_pretrained(..., trust_remote_code=True)\n"
    )
    return 0
