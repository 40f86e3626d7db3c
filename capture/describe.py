"""A store in words: what `capture run` and `capture info` print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

from capture.forecast import bytes_text
from capture.reader import ActivationStore
from capture.schema import T_BINS
from mdlm_interp.program import counted

BAR_WIDTH = 30


def summary(store: ActivationStore) -> str:
    """One line: rows, hooks, size, and whether anything is missing."""
    state = "complete" if store.complete else f"INCOMPLETE, about {store.planned_rows:,} rows were planned"
    lossy = "" if store.dtype == "float32" else f" in {store.dtype} (lossy)"
    return (
        f"{store.name}: {counted(len(store), 'row')} ({_positions(store)} of {counted(store.n_sequences, 'sequence')} "
        f"of up to {store.length} tokens), {counted(len(store.hooks), 'hook')}{lossy}, "
        f"{bytes_text(store.bytes_on_disk)}, {state}"
    )


def _positions(store: ActivationStore) -> str:
    every, some = store.config.get("every"), store.config.get("per_sequence")
    if store.positions == "every" and every:
        return f"positions 0, {every}, {2 * every} ..."
    number = f"{some} " if store.positions == "random" and some else ""
    return f"{number}{store.positions} positions"


def strata(store: ActivationStore) -> list[str]:
    """Rows by part of [0, 1] in t and by masked or not, with a bar each."""
    if not len(store):
        return []
    count = store.statistics(store.hooks[0]).count.tolist()
    most = max(unmasked + masked for unmasked, masked in zip(*count, strict=True))
    lines = []
    for t_bin, (unmasked, masked) in enumerate(zip(*count, strict=True)):
        filled = [round(BAR_WIDTH * part / most) for part in (unmasked, masked)]
        bar = "." * filled[0] + "#" * filled[1]
        edges = f"t {t_bin / T_BINS:.1f} to {(t_bin + 1) / T_BINS:.1f}"
        lines.append(f"{edges}  {int(unmasked):>12,} unmasked {int(masked):>12,} masked  {bar}")
    return lines


def hook_lines(store: ActivationStore) -> list[str]:
    """Name, shape of a row and root mean square of every hook point."""
    width = max(map(len, store.hooks))
    lines = []
    for hook in store.hooks:
        size = ""
        if len(store):
            _, _, mean_square = store.statistics(hook).pooled()
            size = f"  rms {sqrt(mean_square):.4g}" if mean_square >= 0 else "  rms nan"
        lines.append(f"{hook:{width}}  {list(store.row_shape(hook))}{size}")
    return lines


def described(store: ActivationStore) -> list[str]:
    """The provenance, a line an item."""
    record, config = store.provenance, store.config
    schedule = record["schedule"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    batch, length = record["batch_shape"]
    threads = f"{counted(record['threads'], 'thread')} a pass"
    source = config["pack"] + ", times " + config["times"] + (f" {config['time']}" if config["time"] else "")
    if store.sampled:
        given = ", ".join(f"{name} {value}" for name, value in config["sampler"].items() if value)
        source = f"decodings by a sampler: {given}"
    return [
        f"model {config['model']}, weights sha256 {record['weights_sha256']}",
        f"tokenizer {config['tokenizer']}, sha256 {record['tokenizer_sha256']}",
        *(
            f"text {file['file']}, {file['bytes']:,} bytes, sha256 {file['sha256']}"
            for file in record["sources"]
        ),
        f"{source}, seed {record['seed']}, {schedule['name']} schedule with eps {schedule['eps']:g}",
        f"{record['arithmetic']} arithmetic on {record['device']}, batches of {batch} x {length}, "
        f"{threads}, {record['cpu']['machine']} {record['cpu']['capability']}",
        *_numbered(record),
        versions,
    ]


def _numbered(record: Mapping[str, Any]) -> Iterator[str]:
    """What has no name, and is compared all the same before a capture goes on."""
    if record.get("packing") is not None:
        yield f"packing rules {record['packing']}"
    if record.get("native_bits") is not None:
        yield f"native arithmetic gave {record['native_bits']} for fixed tokens"
