"""Native arithmetic: what decides its last bits beside the inputs, and how a store says which it was made with.

Versions, processor and number of threads have names and are recorded. What else a library goes by when it chooses how
to multiply (the processor's maker, environment variables, settings) has no list, so a store also records what one
forward pass over fixed tokens gave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mdlm_interp.errors import ConfigError
from mdlm_interp.model import HookedMDLM

PROBE_SIGMA = 0.7
STRIDE = 7919
"""Between the tokens that the probe reads; a prime, so that few of them are the same."""
SIDE = 256
"""Of the product that tells rounded factors: smaller ones take another way through the libraries."""


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Forward passes have this many threads, as those that made a store; native bits depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def native_bits(model: HookedMDLM, length: int, threads: int) -> str:
    """SHA-256 of the last residual stream of one sequence of fixed tokens, computed on so many threads."""
    device = next(model.parameters()).device
    ids = torch.arange(length, device=device)[None] * STRIDE % model.config.vocab_size
    sigma = torch.full((1,), PROBE_SIGMA, device=device)
    with on_threads(threads):
        stream = model(ids, sigma, stop_at_block=model.config.n_blocks)
    return hashlib.sha256(stream.cpu().contiguous().numpy().tobytes()).hexdigest()


def refuse_rounded_factors(device: torch.device) -> None:
    """Raise ConfigError if torch was told to round the factors of float32 products to fewer digits (TF32, bfloat16)."""
    value = torch.full((SIDE, SIDE), 1 + 2.0**-11 + 2.0**-23, device=device)
    if not torch.equal(value @ torch.eye(SIDE, device=device), value):
        raise ConfigError(
            f"a capture needs float32 products, and torch was told to round their factors on {device.type}; call "
            f"torch.set_float32_matmul_precision('highest')"
        )
