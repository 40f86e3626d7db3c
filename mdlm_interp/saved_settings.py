"""The JSON file of what is saved as a directory of settings and tensors: its format and version are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mdlm_interp.errors import DataError


def read_settings(path: Path, *, form: str, version: int, what: str) -> dict[str, Any]:
    """The settings.

    Args:
        form: What the key "format" must be.
        version: What the key "version" must be.
        what: What the directory should be, with its article, for messages.
    Raises:
        DataError: If the file is missing, no JSON, or of another format or version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path.parent} has no {path.name}; is it {what}?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); save it again") from None
    if not isinstance(found, dict) or found.get("format") != form:
        raise DataError(f"{path} is not the settings of {what}: its format is not {form!r}")
    if found.get("version") != version:
        raise DataError(
            f"{path} has version {found.get('version')!r}, this program reads {version}; "
            f"read it with the one that wrote it"
        )
    return found
