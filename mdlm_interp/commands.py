"""The commands that need only the model: info, fill, sample, ppl, export-hf."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mdlm_interp.checkpoints import resolve_source, weights_sha256
from mdlm_interp.config_args import parse_args
from mdlm_interp.decoding import ancestral_sample
from mdlm_interp.documents import read_documents, token_blocks
from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.evaluation import N_TIME_BINS, nelbo
from mdlm_interp.filling import check_fits, encode_prompt, fill_masks
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
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ConfigError(f"device must be cpu, cuda or the like, got {self.device!r}") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"device {self.device!r} was asked for, but torch finds no CUDA device; use cpu"
            )
        model = HookedMDLM.from_pretrained(self.model, device=device)
        tokenizer = load_tokenizer(self.tokenizer or self.model)
        check_fits(tokenizer, model)
        return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class InfoConfig(ModelChoice):
    """Describe a model: shape, parameters, weights' hash, hook points."""

    hooks: bool = False
    """List every hook point."""


def info(argv: list[str]) -> int:
    """`mdlm-interp info [MODEL]`."""
    config = parse_args(InfoConfig, argv, prog="mdlm-interp info", positional=("model",))
    model = HookedMDLM.from_pretrained(config.model)
    directory = resolve_source(config.model)
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
class SampleConfig(ModelChoice):
    """Write text from masks by ancestral sampling."""

    prompt: str = ""
    """Text that the samples begin with; [MASK] inside it is filled too."""
    n: int = 1
    """Number of samples."""
    length: int | None = None
    """Tokens in a sample; the model's context if none."""
    steps: int = 64
    """Denoising steps."""
    temperature: float = 1.0
    """Divides the log-probabilities; 0 takes the most probable token."""
    seed: int = 0
    """Key of all draws: the same seed gives the same text."""


def sample(argv: list[str]) -> int:
    """`mdlm-interp sample [PROMPT]`."""
    config = parse_args(SampleConfig, argv, prog="mdlm-interp sample", positional=("prompt",))
    if config.n < 1:
        raise ConfigError(f"n must be at least 1, got {config.n}")
    model, tokenizer = config.load()
    length = config.length or model.config.model_length
    if not 1 <= length <= model.config.model_length:
        raise ConfigError(
            f"length must be in [1, {model.config.model_length}], the model's context; got {length}"
        )
    start = torch.full((config.n, length), model.config.mask_id)
    if config.prompt:
        prompt = encode_prompt(model, tokenizer, config.prompt)
        if prompt.shape[1] > length:
            raise DataError(f"the prompt has {prompt.shape[1]} tokens, a sample {length}; raise length")
        start[:, : prompt.shape[1]] = prompt
    ids = ancestral_sample(
        model, start, steps=config.steps, seed=config.seed, temperature=config.temperature, progress=True
    )
    print("\n---\n".join(tokenizer.decode(row) for row in ids.tolist()))
    return 0


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(ModelChoice):
    """Estimate the perplexity bound of text files."""

    files: tuple[Path, ...]
    """Text files (.txt, .jsonl, .parquet)."""
    length: int | None = None
    """Tokens in a sequence; the model's context if none."""
    wrap: bool = True
    """Put <|endoftext|> around each sequence, as upstream does."""
    max_sequences: int | None = None
    """Stop after this many sequences; all if none."""
    times: int = 4
    """Noise levels for each sequence, stratified."""
    batch_size: int = 32
    """Sequences in a forward pass."""
    seed: int = 0
    """Key of times and masks."""


def ppl(argv: list[str]) -> int:
    """`mdlm-interp ppl FILES...`."""
    config = parse_args(PerplexityConfig, argv, prog="mdlm-interp ppl", positional=("files",))
    for name in ("times", "batch_size"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not config.files:
        raise ConfigError("ppl needs at least one text file")
    model, tokenizer = config.load()
    length = config.length or model.config.model_length
    if not 3 <= length <= model.config.model_length:
        raise ConfigError(
            f"length must be in [3, {model.config.model_length}], the model's context; got {length}"
        )
    blocks = token_blocks(read_documents(config.files), tokenizer, length, wrap=config.wrap)
    rows = [block.ids for block in islice(blocks, config.max_sequences)]
    if not rows:
        raise DataError(f"the text is shorter than one sequence of {length} tokens; lower length")
    x_0 = torch.from_numpy(np.stack(rows))
    bound = nelbo(
        model,
        x_0,
        seed=config.seed,
        times_per_sequence=config.times,
        batch_size=config.batch_size,
        progress=True,
    )
    n_bytes = tokenizer.count_bytes(x_0.flatten().tolist())
    print(f"perplexity      <= {bound.perplexity:.3f}")
    print(f"nats per token  <= {bound.nats_per_token:.4f} +- {bound.standard_error:.4f}")
    print(f"bits per byte   <= {bound.bits_per_byte(n_bytes):.4f}")
    print(f"over {bound.n_sequences:,} sequences of {length} tokens ({n_bytes:,} bytes)")
    print(f"estimator: continuous-time bound, {config.times} stratified times a sequence, t in [0.001, 1]")
    print("cross-entropy at masked positions by t (nats):")
    for number, value in enumerate(bound.by_time):
        print(f"  [{number / N_TIME_BINS:.1f}, {(number + 1) / N_TIME_BINS:.1f})  {value:.3f}")
    return 0


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a folder that transformers loads with trust_remote_code=True, without this package."""

    out: Path
    """Directory to write; it must not hold a model."""
    model: str = "bundled"
    """Model directory, Hugging Face repository id, or "bundled"."""
    tokenizer: str | None = None
    """Directory with the tokenizer, if it is not the model's own."""


def export_hf(argv: list[str]) -> int:
    """`mdlm-interp export-hf OUT`."""
    from mdlm_interp.hf import export_hf as export

    config = parse_args(ExportConfig, argv, prog="mdlm-interp export-hf", positional=("out",))
    model = HookedMDLM.from_pretrained(config.model)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    check_fits(tokenizer, model)
    export(model, config.out, tokenizer)
    sys.stdout.write(
        f"{config.out}: load it with AutoModelForMaskedLM.from_pretrained(..., trust_remote_code=True)\n"
    )
    return 0
