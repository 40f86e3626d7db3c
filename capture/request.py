"""What a capture was asked for, with everything resolved and found possible before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from capture import schema
from capture.config import CaptureConfig
from capture.decodings import Decodings
from capture.forward import Forward
from capture.manifest import ResumePoint
from capture.native import refuse_rounded_factors
from capture.passes import Shares
from capture.plan import Batch, batches, read_blocks
from mdlm_interp.checkpoints import resolve_source
from mdlm_interp.documents import expand_files
from mdlm_interp.errors import ConfigError, DataError, HookError
from mdlm_interp.hooks import select_names
from mdlm_interp.model import HookedMDLM
from mdlm_interp.tokenizers import Tokenizer, load_tokenizer

BatchesFrom = Callable[[ResumePoint | None], Iterator[Batch]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A capture that was found possible."""

    config: CaptureConfig
    """With nothing left to default."""
    first: Batch
    """The first of the whole capture."""
    batches: BatchesFrom
    """All batches, or those from a place on."""
    model: HookedMDLM
    network: HookedMDLM
    """The model in the arithmetic that was asked for."""
    directory: Path
    """Of the model."""
    tokenizer: Tokenizer
    layout: schema.Layout
    shares: Shares
    """Of this process's threads among forward passes."""
    rank: int
    world_size: int


def prepared(config: CaptureConfig) -> Request:
    """The request with everything resolved and checked; writes nothing."""
    rank, world_size = ranks(config)
    directory = resolve_source(config.model)
    device = device_of(config.device, rank)
    model = HookedMDLM.from_pretrained(directory, device=device)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    config = resolved(config, model, tokenizer)
    assert config.length is not None
    assert config.shard_rows is not None
    hooks = recordable_hooks(config.hooks, model)
    network = in_arithmetic(model, config)
    from_place = batches_of(config, network, tokenizer)
    first = next(from_place(None), None)
    if first is None:
        raise DataError(_too_short(config, tokenizer))
    layout = schema.Layout(
        shapes={hook: schema.row_shape(hook, model.config) for hook in hooks},
        length=config.length,
        dtype=config.dtype,
        shard_rows=config.shard_rows,
        sampled=config.sampler is not None,
    )
    return Request(
        config=config,
        first=first,
        batches=from_place,
        model=model,
        network=network,
        directory=directory,
        tokenizer=tokenizer,
        layout=layout,
        shares=Shares.of(config.forwards, alone=runs_alone(config, device)),
        rank=rank,
        world_size=world_size,
    )


def batches_of(config: CaptureConfig, network: HookedMDLM, tokenizer: Tokenizer) -> BatchesFrom:
    """The batches of a resolved config: of its text, or of what its sampler decodes."""
    if config.sampler is not None:
        return Decodings(config, network, tokenizer).batches
    return lambda resume: batches(config, tokenizer, resume)


def _too_short(config: CaptureConfig, tokenizer: Tokenizer) -> str:
    if config.sampler is not None:
        if config.max_rows is None:
            return (
                f"no step of {config.sampler.n} decodings has {config.positions} positions to record; record others, "
                f"such as --positions all (a sampler that rewrites random tokens never has masks)"
            )
        return (
            f"no step of {config.sampler.n} decodings of length {config.length} with {config.positions} positions fits "
            f"max_rows {config.max_rows}; raise --max-rows or record other positions"
        )
    if config.max_rows is not None or config.positions in ("masked", "unmasked"):
        return (
            f"no sequence of length {config.length} with {config.positions} positions fits the text and max_rows "
            f"{config.max_rows}; raise --max-rows or give more text"
        )
    tokens = sum(1 for _ in read_blocks(replace(config, pack="blocks", length=1, wrap=False), tokenizer))
    needed = (config.length or 0) - (2 if config.wrap else 0)
    return (
        f"the text has {tokens} tokens and one sequence of length {config.length} needs {needed}; lower --length "
        f"or give more text"
    )


def ranks(config: CaptureConfig) -> tuple[int, int]:
    """(rank, world_size): the config's, or torchrun's, or (0, 1)."""
    if config.world_size is None and config.rank is None:
        rank, world_size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
        if not rank and not world_size:
            return 0, 1
        if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
            raise ConfigError(
                f"RANK and WORLD_SIZE in the environment must be whole numbers with 0 <= RANK < WORLD_SIZE, got "
                f"{rank!r} and {world_size!r}; unset both, or give --rank and --world-size"
            )
        return int(rank), int(world_size)
    if config.rank is None or config.world_size is None:
        raise ConfigError("rank and world_size must be given together, such as --rank 0 --world-size 4")
    return config.rank, config.world_size


def device_of(name: str, rank: int) -> torch.device:
    """The device of a rank: on a machine with several, each takes its own."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device {name!r}: this machine has no CUDA device that torch can use; take cpu"
            )
        if device.index is None:
            local = int(os.environ.get("LOCAL_RANK", rank))
            return torch.device("cuda", local % torch.cuda.device_count())
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"device {name!r}: there are {torch.cuda.device_count()}, numbered from 0")
    return device


def resolved(config: CaptureConfig, model: HookedMDLM, tokenizer: Tokenizer) -> CaptureConfig:
    """The config with nothing left to default, checked against the model."""
    if tokenizer.vocab_size != model.config.vocab_size:
        raise DataError(
            f"the tokenizer {config.tokenizer or config.model} has {tokenizer.vocab_size} ids and the model "
            f"{config.model} has {model.config.vocab_size}; name the tokenizer that it was trained with"
        )
    context = model.config.model_length
    length = config.length if config.length is not None else context
    if length > context:
        raise ConfigError(
            f"length {length} is more than the model's context of {context} tokens; lower --length"
        )
    if config.per_sequence is not None and config.per_sequence > length:
        raise ConfigError(f"per_sequence must be at most length {length}, got {config.per_sequence}")
    return replace(
        config,
        files=expand_files(config.files) if config.sampler is None else (),
        length=length,
        tokenizer=config.tokenizer or config.model,
        shard_rows=config.shard_rows or schema.SHARD_ROWS,
    )


def recordable_hooks(patterns: Sequence[str], model: HookedMDLM) -> list[str]:
    """The hook points that the patterns mean, in execution order.

    Raises:
        HookError: If a pattern matches nothing, or a hook point that has no row for each token.
    """
    hooks = select_names(patterns, model.hook_names)
    refused = [hook for hook in hooks if schema.row_axes(hook) is None]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        what = "two position axes" if "attn.hook_" in refused[0] else "no position axis"
        raise HookError(
            f"{refused[0]}{more} has {what}, and a store keeps one row a token; "
            f"leave it out of hooks, or name those wanted, such as 'blocks.*.hook_resid_post'"
        )
    return hooks


def runs_alone(config: CaptureConfig, device: torch.device) -> bool:
    """Whether one forward pass at a time is best: it has all threads already, or needs them between passes."""
    return device.type != "cpu" or config.arithmetic == "exact" or config.sampler is not None


def forward_of(model: HookedMDLM, hooks: Sequence[str], config: CaptureConfig) -> Forward:
    """The forward pass in the arithmetic that was asked for."""
    return Forward(in_arithmetic(model, config), hooks, together=config.pack == "blocks")


def forward_of_request(request: Request) -> Forward:
    """The forward pass that was asked for.

    Raises:
        ConfigError: If torch was told to multiply with fewer digits than a store promises.
    """
    if request.config.arithmetic == "native":
        refuse_rounded_factors(next(request.network.parameters()).device)
    return Forward(request.network, list(request.layout.shapes), together=request.config.pack == "blocks")


def in_arithmetic(model: HookedMDLM, config: CaptureConfig) -> HookedMDLM:
    """The model in the arithmetic that was asked for."""
    if config.arithmetic == "exact":
        from oracle import Oracle

        return Oracle(model).model
    return model
