"""Graphs along a trajectory as a directory: one graph each, and commitments.json, which says how they are linked.

commitments.json             format, commitments with their weights and shares, links, what was not followed
step-S-position-P/           the graph of the commitment at that step and position (`storage.py`)
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mdlm_interp.atomic_files import replacing_directory
from mdlm_interp.errors import DataError
from transcoder.attribution.graph import Graph
from transcoder.attribution.steps import Commitment, CommitmentGraph, Link

FORMAT, VERSION = "mdlm-interp commitment graph", 1
COMMITMENTS = "commitments.json"
PLAIN = tuple(field.name for field in fields(Commitment) if field.name != "graph")


def save_commitments(found: CommitmentGraph, directory: str | Path) -> None:
    """Write the directory, whole or not at all.

    Raises:
        OutputExistsError: If something is there.
        WriteError: If the disk refuses.
    """
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "commitments": [{name: getattr(one, name) for name in PLAIN} for one in found.commitments],
        "links": [asdict(link) for link in found.links],
        "left_out": [list(one) for one in found.left_out],
    }
    with replacing_directory(directory) as partial:
        for one in found.commitments:
            one.graph.save(partial / one.slug)
        (partial / COMMITMENTS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_commitments(directory: str | Path) -> CommitmentGraph:
    """Read a directory that `save_commitments` wrote.

    Raises:
        DataError: If it is none, incomplete or damaged.
    """
    directory = Path(directory)
    path = directory / COMMITMENTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{directory} has no {COMMITMENTS}; is it a commitment graph?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); save it again") from None
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise DataError(
            f"{path} is not {FORMAT} of version {VERSION}; read it with the program that wrote it"
        )
    try:
        commitments = [_commitment(directory, one) for one in found["commitments"]]
        links = [Link(**link) for link in found["links"]]
        left_out = [(int(q), int(step), float(weight)) for q, step, weight in found["left_out"]]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} does not say what it should ({error}); save it again") from None
    return CommitmentGraph(commitments, links, left_out)


def _commitment(directory: Path, one: dict[str, Any]) -> Commitment:
    step, position = int(one["step"]), int(one["position"])
    graph = Graph.load(directory / f"step-{step}-position-{position}")
    return Commitment(**{name: one[name] for name in PLAIN}, graph=graph)
