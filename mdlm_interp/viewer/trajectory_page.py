"""A trajectory as one HTML page: what its script needs to show every step, and what it says about the run.

States travel as the changes of each step, so that a page grows with what happened and not with steps times positions.
"""

# Axes: state (step + 1), step, batch, pos, rank (of alternatives)

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

from torch import Tensor

from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.errors import DataError
from mdlm_interp.viewer.film import given
from mdlm_interp.viewer.page import Link, html_page, static
from mdlm_interp.viewer.text import Decoder, visible

UNREADABLE = "\ufffd"
"""What a token reads that is a part of a character."""
PROBABILITY_DIGITS, ENTROPY_DIGITS = 4, 3


def trajectory_page(
    trajectory: Trajectory,
    tokenizer: Decoder,
    *,
    title: str = "Decoding",
    sequences: Sequence[int] | None = None,
    nav: Sequence[Link] = (),
) -> str:
    """A page that plays a trajectory.

    Args:
        tokenizer: Of the model that wrote it.
        sequences: Rows of the batch to show, from 0; all if none.
        nav: Pages of the same site.
    Raises:
        DataError: If the tokenizer's mask is another, a row does not exist, or the page would be too large.
    """
    batch = trajectory.states.shape[1]
    rows = list(range(batch)) if sequences is None else list(sequences)
    for row in rows:
        if not 0 <= row < batch:
            raise DataError(f"sequences must be in [0, {batch}), the trajectory's rows; got {row}")
    if not rows:
        raise DataError("a page shows at least one sequence, got none; leave sequences out for all")
    check_tokenizer(trajectory, tokenizer)
    shown = set(trajectory.states[:, rows].flatten().tolist())
    shown |= set(trajectory.top_tokens[:, rows].flatten().tolist()) - {-1}
    texts = {token: visible(tokenizer.token(token)) for token in sorted(shown)}
    joined: dict[str, str] = {}
    data = {
        "mask": trajectory.mask_id,
        "nSteps": trajectory.n_steps,
        "about": about(trajectory),
        "tokens": texts,
        "joined": joined,
        "sequences": [_sequence(trajectory, row, texts, tokenizer, joined) for row in rows],
    }
    return html_page(
        title=title,
        body=static("trajectory.html"),
        data=data,
        styles=["trajectory.css"],
        scripts=["tokens.js", "trajectory_model.js", "trajectory_details.js", "trajectory.js"],
        nav=nav,
    )


def check_tokenizer(trajectory: Trajectory, tokenizer: Decoder) -> None:
    """Raise DataError unless the tokenizer can be the one of the model that wrote a trajectory."""
    if tokenizer.mask_id != trajectory.mask_id:
        raise DataError(
            f"the trajectory's mask is token {trajectory.mask_id}, the tokenizer's {tokenizer.mask_id}; "
            f"name the tokenizer of the model that wrote it"
        )


def about(trajectory: Trajectory) -> list[list[str]]:
    """What the run was, as pairs of a name and a value."""
    pairs = [
        ["steps", str(trajectory.n_steps)],
        ["forward passes", str(trajectory.n_forwards)],
        ["seed", str(trajectory.seed)],
    ]
    return pairs + [[name.replace("_", " "), _plain(value)] for name, value in trajectory.sampler.items()]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        rest = {name: part for name, part in value.items() if name != "kind" and part is not None}
        inside = ", ".join(f"{name} {_plain(part)}" for name, part in rest.items())
        kind = value.get("kind")
        return f"{kind} ({inside})" if kind and inside else str(kind or inside)
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return visible(str(value)) if value is not None else "none"


def _sequence(
    trajectory: Trajectory, row: int, texts: dict[int, str], tokenizer: Decoder, joined: dict[str, str]
) -> dict[str, Any]:
    states = trajectory.states[:, row]
    words = list(_words([texts[token] for token in states[-1].tolist()], given(trajectory)[row].tolist()))
    joined.update(_characters(states, words, texts, tokenizer, trajectory.mask_id))
    return {
        "number": trajectory.indices[row],
        "start": states[0].tolist(),
        "changes": [_changes(before, after) for before, after in pairwise(states)],
        "revealed": trajectory.revealed_at[row].tolist(),
        "given": given(trajectory)[row].tolist(),
        "words": words,
        "t": _numbers(trajectory.t[:, row], PROBABILITY_DIGITS),
        "confidence": [
            _numbers(values, PROBABILITY_DIGITS) for values in trajectory.confidence[:, row].unbind()
        ],
        "entropy": [_numbers(values, ENTROPY_DIGITS) for values in trajectory.entropy[:, row].unbind()],
        "top": [
            _alternatives(*both)
            for both in zip(trajectory.top_tokens[:, row], trajectory.top_probabilities[:, row], strict=True)
        ],
    }


def _changes(before: Tensor, after: Tensor) -> list[list[int]]:
    """Position and token of what a step changed."""
    return [[position, int(after[position])] for position in (before != after).nonzero()[:, 0].tolist()]


def _words(texts: Sequence[str], is_given: Sequence[bool]) -> Iterator[list[int]]:
    """Positions of each word of the final text, so that words stay where they are from step to step.

    A word begins at white space, after a newline, where a prompt begins or ends, and at a token in brackets.
    """
    word: list[int] = []
    for position, text in enumerate(texts):
        before = texts[position - 1] if position else ""
        apart = text[:1].isspace() or before[-1:].isspace() or _special(text) or _special(before)
        if word and (apart or is_given[position] != is_given[position - 1]):
            yield word
            word = []
        word.append(position)
    if word:
        yield word


def _special(text: str) -> bool:
    return (text.startswith("<|") and text.endswith("|>")) or (
        len(text) > 2 and text[0] == "[" and text[-1] == "]"
    )


def _characters(
    states: Tensor, words: Sequence[list[int]], texts: dict[int, str], tokenizer: Decoder, mask_id: int
) -> dict[str, str]:
    """Text of neighbours in a word that only together make a character, by their ids with commas."""
    broken = {token for token, text in texts.items() if UNREADABLE in text}
    found: dict[str, str] = {}
    if not broken:
        return found
    for state in states.tolist():
        for word in words:
            tokens = [state[position] for position in word]
            for masked, group in groupby(tokens, key=mask_id.__eq__):
                run = list(group)
                if not masked and len(run) > 1 and broken.intersection(run):
                    found[",".join(map(str, run))] = visible(tokenizer.decode(run))
    return found


def _numbers(values: Tensor, digits: int) -> list[float | None]:
    return [None if math.isnan(value) else round(value, digits) for value in values.tolist()]


def _alternatives(tokens: Tensor, probabilities: Tensor) -> dict[int, list[list[int | float]]]:
    """Per position that could be written: pairs of token and probability, most probable first."""
    if tokens.shape[-1] == 0:
        return {}
    pairs = enumerate(zip(tokens.tolist(), probabilities.tolist(), strict=True))
    return {
        position: [[token, round(value, PROBABILITY_DIGITS)] for token, value in zip(*both, strict=True)]
        for position, both in pairs
        if both[0][0] >= 0
    }
