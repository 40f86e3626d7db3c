"""What to capture: the model, the text, the hook points, which tokens at which times, and where to."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from capture import schema
from capture.sampler_source import SamplerSource
from capture.schema import StoredType
from mdlm_interp.config_files import check_fields, to_mapping
from mdlm_interp.errors import ConfigError

RUN_ONLY = frozenset({"out", "endpoint", "rank", "world_size", "any_disk", "forwards"})
"""Fields that say how a capture runs and not what is in the store; a store does not keep them."""

MOST = {"batch_size": 2**16, "forwards": 2**8, "world_size": 2**12}
"""More of these would take all memory, or make more files than rows, before anything is recorded."""


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Record activations of a model over noised text, one row a token. The same command continues a capture."""

    files: tuple[Path, ...] = ()
    """Text files, globs, directories of shards or @lists of files, in this order; see the README for the kinds."""
    out: str
    """Directory or s3:// URL of the store: new, empty, or one that this command began."""
    endpoint: str | None = None
    """URL of an S3-compatible service, when out is s3://; none takes AWS_ENDPOINT_URL, or Amazon's own."""
    model: str = "bundled"
    """Model directory, hub id, or "bundled" for the small model in this package."""
    tokenizer: str | None = None
    """Directory or hub id of the tokenizer; none takes the model's own."""
    hooks: tuple[str, ...] = ("blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out")
    """Names or globs of the hook points to record; each must have a position axis."""
    pack: Literal["blocks", "documents"] = "blocks"
    """Sequences: equal blocks of joined documents, as upstream packs, or the beginning of each document by itself."""
    length: int | None = None
    """Tokens of a sequence, of a document at most; none takes the model's context."""
    wrap: bool = True
    """Whether each sequence starts and ends with an end-of-text token, as in upstream's training."""
    max_sequences: int | None = None
    """Number of sequences to stop after; none takes all the text."""
    max_rows: int | None = None
    """Rows to stop before exceeding; the last sequence is recorded whole or not at all."""
    times: Literal["low_discrepancy", "uniform", "fixed", "unmasked"] = "low_discrepancy"
    """Diffusion time of a sequence: spread evenly over (0, 1), drawn at random, each of time, or 0 (clean text)."""
    time: tuple[float, ...] = ()
    """Diffusion times in [0, 1] when times is fixed; each block of text becomes a sequence at each, masks nested."""
    positions: Literal["all", "masked", "unmasked", "every", "random"] = "all"
    """Which tokens of a sequence become rows."""
    every: int | None = None
    """With positions every: record positions 0, every, 2 * every and so on."""
    per_sequence: int | None = None
    """With positions random: how many positions of each sequence to record."""
    dtype: StoredType = "float32"
    """Type to store activations in; float16 and bfloat16 lose digits, and the store says so."""
    arithmetic: Literal["native", "exact"] = "native"
    """Arithmetic of the forward pass: torch's, or the oracle's, whose bits are the same on every machine."""
    device: str = "cpu"
    """Device of the forward pass: cpu, cuda, or cuda:1 and so on; several ranks take one each of cuda."""
    seed: int = 0
    """Key of times, masks and subsets, from 0 to 2**64 - 1."""
    batch_size: int = 16
    """Sequences per forward pass; it changes native activations by rounding only, tokens and masks never."""
    shard_rows: int | None = None
    """Rows of a shard file, and between commits, a multiple of 256; none takes 16,384. A URL keeps three in memory."""
    forwards: int | None = None
    """Forward passes side by side, each on its share of torch's threads; none takes 2 on a CPU with several threads."""
    rank: int | None = None
    """Which of world_size processes this is, from 0; none takes RANK of torchrun, or 0."""
    world_size: int | None = None
    """Processes that write this store together; none takes WORLD_SIZE of torchrun, or 1."""
    any_disk: bool = False
    """Start even if the forecast says that the disk cannot hold the store."""
    sampler: SamplerSource | None = None
    """Record a sampler's steps instead of noised text; files stay empty."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sampler is not None:
            self._check_sampler()
        elif not self.files:
            raise ConfigError("files must name at least one text file")
        if not str(self.out):
            raise ConfigError("out must name a directory or a URL, got ''; give one with --out")
        if not self.hooks:
            raise ConfigError("hooks must name at least one hook point")
        for name in ("length", "max_sequences", "max_rows", "every", "per_sequence", *MOST):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
            if value is not None and value > MOST.get(name, value):
                raise ConfigError(f"{name} must be at most {MOST[name]:,}, got {value}; lower it")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed must be in [0, 2**64), got {self.seed}")
        if self.shard_rows is not None and (self.shard_rows < 1 or self.shard_rows % schema.CHUNK_ROWS):
            raise ConfigError(f"shard_rows must be a multiple of {schema.CHUNK_ROWS}, got {self.shard_rows}")
        self._check_times()
        self._needs("positions", "every", "every")
        self._needs("positions", "random", "per_sequence")
        if self.rank is not None and not 0 <= self.rank < (self.world_size or 1):
            raise ConfigError(
                f"rank must be from 0 to world_size - 1, got rank {self.rank} of {self.world_size or 1}"
            )

    def identity(self) -> dict[str, Any]:
        """What a store keeps: every field that has a part in its content, as plain values."""
        values = {name: value for name, value in to_mapping(self).items() if name not in RUN_ONLY}
        if self.sampler is None:
            del values["sampler"]  # as in the stores of text that were made before there were samplers
        return values

    def _check_sampler(self) -> None:
        """Options that would change nothing are mistakes."""
        if self.files:
            raise ConfigError(
                f"a sampler writes its own text, got files {self.files[0]} too; leave one of them out"
            )
        for name, default in (("times", "low_discrepancy"), ("pack", "blocks"), ("wrap", True)):
            if getattr(self, name) != default:
                raise ConfigError(
                    f"{name} is for text, got {getattr(self, name)!r} with a sampler; leave it out"
                )
        if self.forwards not in (None, 1):
            raise ConfigError(
                f"forwards must be 1 with a sampler, which decodes between them, got {self.forwards}; leave it out"
            )

    def _check_times(self) -> None:
        if self.times == "fixed" and not self.time:
            raise ConfigError("times fixed needs time, such as --time 0.1,0.5,0.9")
        if self.times != "fixed" and self.time:
            raise ConfigError(
                f"time {list(self.time)} has no effect with times {self.times!r}; set times to 'fixed'"
            )
        wrong = [time for time in self.time if not 0.0 <= time <= 1.0]
        if wrong:
            raise ConfigError(f"time must be in [0, 1], 0 being clean text, got {wrong[0]}")
        clean = self.times == "unmasked" or (self.times == "fixed" and not any(self.time))
        if clean and self.positions == "masked":
            raise ConfigError(
                f"times {self.times} is clean text at t = 0, where no token is masked, so positions masked would "
                f"record nothing; take other times, or positions all or unmasked"
            )
        if len(set(self.time)) < len(self.time):
            raise ConfigError(f"time names a value twice: {list(self.time)}; name each once")

    def _needs(self, choice: str, value: str, companion: str) -> None:
        chosen, given = getattr(self, choice) == value, getattr(self, companion) is not None
        if chosen and not given:
            option = companion.replace("_", "-")
            raise ConfigError(f"{choice} {value} needs {companion}, a whole number, such as --{option} 8")
        if given and not chosen:
            raise ConfigError(f"{companion} has no effect with {choice} {getattr(self, choice)!r}")


assert {field.name for field in fields(CaptureConfig)} >= RUN_ONLY
