"""The metrics of a training run: metrics.jsonl, one line of JSON every few steps.

A line is appended whole; a process that is killed may leave part of one at the end, which continuing drops.
Anything else that is not such a line is an error that names file and line: it is never skipped or replaced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdlm_interp.atomic_files import replacing, write_errors
from mdlm_interp.errors import CheckpointError

NUMBERS = ("step", "rows", "loss", "l0", "dead")
"""Entries of every line that are read again, beside fvu and fvu_by_layer, which null says are undefined."""


def append_entry(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line.

    Raises:
        WriteError: If the disk is full or failing; at most a part of this line is there then.
    """
    with write_errors(path), path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(entry, allow_nan=False) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Every line of a finished run's metrics; none if there is no file.

    Raises:
        CheckpointError: If a line is not one of metrics, or a part of one.
    """
    lines, rest = _lines(path)
    return _parsed([*lines, rest] if rest else lines, path)


def fvu_text(entry: Mapping[str, Any], *, explained: bool = False) -> str:
    """The FVU of a line, or 1 - FVU as a percentage.

    >>> fvu_text({"fvu": 0.25}), fvu_text({"fvu": 0.25}, explained=True), fvu_text({"fvu": None})
    ('0.250', '75.0%', 'undefined')
    """
    if entry["fvu"] is None:
        return "undefined"
    return f"{1 - entry['fvu']:.1%}" if explained else f"{entry['fvu']:.3f}"


def trim_log(path: Path, step: int) -> None:
    """Drop the lines that a stopped run wrote after its last state; they will be written again.

    Raises:
        CheckpointError: If a line is not one of metrics; the file is left as it is.
    """
    lines, rest = _lines(path)
    entries = zip(_parsed(lines, path), lines, strict=True)
    kept = [line for entry, line in entries if entry["step"] <= step]
    if rest or len(kept) < len(lines):
        with replacing(path) as partial:
            partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _lines(path: Path) -> tuple[list[str], str]:
    """The lines that end, and what follows the last of them."""
    if not path.exists():
        return [], ""
    try:
        # Bytes that are no text make a line that does not parse, so that the error has its number.
        *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    return lines, rest


def _parsed(lines: list[str], path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise _damaged(path, number, str(error)) from None
        missing = (
            [key for key in NUMBERS if not _is_number(entry.get(key))] if isinstance(entry, dict) else []
        )
        if not isinstance(entry, dict) or missing:
            raise _damaged(path, number, f"no number {missing[0]!r}" if missing else "no JSON object")
        if "fvu" not in entry or not _is_share(entry["fvu"]):
            raise _damaged(path, number, "no number or null 'fvu'")
        layers = entry.get("fvu_by_layer")
        if not isinstance(layers, list) or not layers or not all(map(_is_share, layers)):
            raise _damaged(path, number, "no list of numbers or nulls 'fvu_by_layer'")
        if entries and len(layers) != len(entries[0]["fvu_by_layer"]):
            raise _damaged(path, number, "another number of layers than the first line has")
        entries.append(entry)
    return entries


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: object) -> bool:
    return value is None or _is_number(value)


def _damaged(path: Path, number: int, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}, line {number} is not a line of training metrics ({reason}); restore the file from a copy, "
        f"or move it away: only the training curve needs it"
    )
