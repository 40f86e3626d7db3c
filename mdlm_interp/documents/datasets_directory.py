"""What the Hugging Face `datasets` library saves: Arrow streams, and JSON files that say which and in what order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mdlm_interp.documents.failures import COPY_AGAIN, explained
from mdlm_interp.errors import DataError

STATE = "state.json"
"""Of a dataset that save_to_disk wrote: names of its files."""

SPLITS = "dataset_dict.json"
"""Of a directory with a directory for each split."""


def saved_shards(directory: Path) -> list[Path] | None:
    """Files of a saved dataset in its order; None if the directory is something else.

    Raises:
        DataError: If it holds several splits, lists a file that is not there, or is in an order of its own.
    """
    if (directory / SPLITS).is_file():
        splits = _mapping(directory / SPLITS).get("splits", [])
        named = f"such as {directory / str(splits[0])}" if splits else "but it lists none"
        raise DataError(
            f"{directory} holds several splits ({', '.join(map(str, splits))}); name one of them, {named}"
        )
    if not (directory / STATE).is_file():
        return None
    state = _mapping(directory / STATE)
    if any("indices" in key and state[key] for key in state):
        raise DataError(
            f"{directory} keeps the order of its rows apart from them (an old save_to_disk); "
            f"save it again after flatten_indices()"
        )
    try:
        files = [directory / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise DataError(f"{directory / STATE} names no data files; {COPY_AGAIN}") from None
    for file in files:
        if not file.exists():
            raise DataError(f"{file} does not exist and {directory / STATE} lists it; {COPY_AGAIN}")
    return files


def _mapping(path: Path) -> dict[str, Any]:
    with explained(path):
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}); {COPY_AGAIN}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}, expected a JSON object; {COPY_AGAIN}")
    return content
