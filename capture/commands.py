"""The commands `mdlm-interp capture run` and `mdlm-interp capture info`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from capture.config import CaptureConfig
from capture.manifest import MANIFEST
from capture.reader import ActivationStore, open_store
from mdlm_interp.config_args import parse_args
from mdlm_interp.program import invocation

FINGERPRINT_SHOWN = 16


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Show what an activation store holds."""

    store: Path
    """Directory of the store."""


def run(argv: Sequence[str]) -> int:
    """Capture activations and say what was written."""
    from capture.run import run_capture

    config = parse_args(
        CaptureConfig, argv, prog="mdlm-interp capture run", positional=("files",), config_file=True
    )
    start = perf_counter()
    try:
        store = run_capture(config, progress=True)
    except KeyboardInterrupt:
        if (config.out / MANIFEST).is_file():
            print(summary(open_store(config.out)), file=sys.stderr)
        raise
    seconds = perf_counter() - start
    print(summary(store))
    print(f"took {seconds:.1f} s, {len(store) / seconds:,.0f} rows/s with loading")
    print(f"fingerprint {store.fingerprint()[:FINGERPRINT_SHOWN]}")
    print(f"next: {invocation()} capture info {store.path}")
    return 0


def info(argv: Sequence[str]) -> int:
    """Describe a store without reading its activations."""
    config = parse_args(InfoConfig, argv, prog="mdlm-interp capture info", positional=("store",))
    store = open_store(config.store)
    print(summary(store))
    if len(store):
        t = store.times()
        masked = store.coords(slice(None))["is_masked"].double().mean()
        print(f"time {float(t.min()):.4f} to {float(t.max()):.4f}, {float(masked):.1%} of tokens masked")
    print("hooks:")
    width = max(map(len, store.hooks))
    for hook in store.hooks:
        print(f"  {hook:{width}}  {list(store.row_shape(hook))}")
    print("provenance:")
    for line in described(store):
        print(f"  {line}")
    return 0


def summary(store: ActivationStore) -> str:
    """One line: rows, hooks, size, and whether anything is missing."""
    planned = store.manifest.n_sequences * store.length
    state = "complete" if store.complete else f"incomplete, planned with {planned:,} rows"
    return (
        f"{store.path}: {len(store):,} rows ({store.n_sequences:,} sequences of {store.length} tokens), "
        f"{len(store.hooks)} hooks, {store.bytes_on_disk / 1e6:,.1f} MB, {state}"
    )


def described(store: ActivationStore) -> list[str]:
    """The provenance, a line an item."""
    record, config = store.provenance, store.config
    schedule = record["schedule"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    batch, length = record["batch_shape"]
    return [
        f"model {config['model']}, weights sha256 {record['weights_sha256']}",
        f"tokenizer {config['tokenizer']}, sha256 {record['tokenizer_sha256']}",
        *(
            f"text {file['file']}, {file['bytes']:,} bytes, sha256 {file['sha256']}"
            for file in record["sources"]
        ),
        f"seed {record['seed']}, {schedule['name']} schedule with eps {schedule['eps']:g}",
        f"{record['arithmetic']} arithmetic, batches of {batch} x {length}, {record['threads']} threads, "
        f"{record['cpu']['machine']} {record['cpu']['capability']}",
        versions,
    ]
