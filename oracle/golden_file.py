"""What a golden file must hold, asked when one is read.

A file may be old, cut short or edited by hand; each rule has one line that says which entry breaks it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from typing import Any

from mdlm_interp.config import MDLMConfig
from mdlm_interp.errors import MdlmError
from oracle.errors import GoldenError
from oracle.fingerprint import combine

FORMAT = "mdlm-interp exact golden 1"
SAMPLES = 24
"""Elements of each hook point that a file holds, evenly spread."""

KEYS = ("source", "config", "weights", "input_ids", "timesteps", "fingerprint", "points")
LARGEST_ID = 2**63 - 1
SHOWN = 60
"""Characters of a wrong entry that an error shows."""


def places(n: int) -> list[int]:
    """Flat indices of the sampled elements of n: first, last and evenly between."""
    count = min(n, SAMPLES)
    return sorted({i * (n - 1) // max(1, count - 1) for i in range(count)})


def require_valid(content: object, where: str) -> dict[str, Any]:
    """The content of a golden file, every entry of its kind, its fingerprint that of its own digests.

    Raises:
        GoldenError: If it is not.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        kind = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise GoldenError(
            f"{where} is no golden file of this version: expected format {FORMAT!r}, got {_shown(kind)}"
        )
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise GoldenError(f"{where} lacks {missing[0]!r}; record it again")
    for key, holds, rule in (
        ("source", isinstance(content["source"], str), "the name of a model, as text"),
        ("weights", _is_digest(content["weights"]), "a SHA-256 of 64 hexadecimal digits"),
        ("fingerprint", _is_digest(content["fingerprint"]), "a SHA-256 of 64 hexadecimal digits"),
        (
            "input_ids",
            _are_ids(content["input_ids"]),
            "rows of one length of token ids, whole numbers from 0",
        ),
        (
            "timesteps",
            content["timesteps"] is None or _are_floats(content["timesteps"]),
            f"null or {_FLOATS}",
        ),
        ("points", isinstance(content["points"], dict) and content["points"], "an object of hook points"),
        ("config", isinstance(content["config"], dict), "an object: the model's config.json"),
    ):
        if not holds:
            raise GoldenError(f"{where}: {key} must be {rule}, got {_shown(content[key])}; record it again")
    sigmas, rows = content["timesteps"], content["input_ids"]
    if sigmas is not None and len(sigmas) != len(rows):
        raise GoldenError(
            f"{where}: timesteps must have one for each of {len(rows)} rows of input_ids, got {len(sigmas)}; "
            f"record it again"
        )
    for name, point in content["points"].items():
        _require_point(name, point, where)
    recorded_config(content, where)
    own = combine({name: point["sha256"] for name, point in content["points"].items()})
    if own != content["fingerprint"]:
        raise GoldenError(
            f"{where} contradicts itself: its fingerprint is {content['fingerprint']}, that of the digests it holds "
            f"is {own}; it was edited or damaged: take the original, or record it again"
        )
    return content


def recorded_config(content: Mapping[str, Any], where: str) -> MDLMConfig:
    """The model's configuration as it was recorded."""
    try:
        return MDLMConfig.from_mapping(content["config"], source="config")
    except MdlmError as error:
        raise GoldenError(f"{where}: {error}; record it again") from None


_FLOATS = "float32 numbers as hexadecimal text, such as '0x1.8000000000000p+0'"


def _require_point(name: str, point: object, where: str) -> None:
    at = f"{where}: points[{name!r}]"
    if not isinstance(point, dict):
        raise GoldenError(
            f"{at} must be an object of shape, sha256 and samples, got {_shown(point)}; record it again"
        )
    shape, samples = point.get("shape"), point.get("samples")
    if not (isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**31 for n in shape)):
        raise GoldenError(f"{at}.shape must be a list of sizes, got {_shown(shape)}; record it again")
    if not _is_digest(point.get("sha256")):
        raise GoldenError(
            f"{at}.sha256 must be a SHA-256 of 64 hexadecimal digits, got {_shown(point.get('sha256'))}; "
            f"record it again"
        )
    expected = len(places(math.prod(shape)))
    if not _are_floats(samples) or len(samples) != expected:  # type: ignore[arg-type]
        raise GoldenError(
            f"{at}.samples must be {expected} {_FLOATS}, got {_shown(samples)}; record it again"
        )


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _are_ids(value: object) -> bool:
    if not (isinstance(value, list) and value and all(isinstance(row, list) and row for row in value)):
        return False
    same = len({len(row) for row in value}) == 1
    return same and all(type(n) is int and 0 <= n <= LARGEST_ID for row in value for n in row)


def _are_floats(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_float32, value))


def _is_float32(text: object) -> bool:
    """Whether it is a finite float32 as `float.hex` writes it."""
    try:
        number = float.fromhex(text)  # type: ignore[arg-type]
        if struct.unpack("<f", struct.pack("<f", number))[0] != number:
            return False
    except (TypeError, ValueError, OverflowError):
        return False
    return math.isfinite(number) and number.hex() == text


def _shown(value: object) -> str:
    """The beginning of a wrong entry."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
