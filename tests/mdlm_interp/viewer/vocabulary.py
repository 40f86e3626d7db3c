"""A tokenizer whose tokens are given as bytes, and trajectories written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from mdlm_interp.decoding import Trajectory

ATTACK = "</script><img src=x onerror=\"document.title='taken over'\">"


class Vocabulary:
    """Tokens are bytes; the last id is the mask."""

    def __init__(self, *tokens: str | bytes) -> None:
        self._tokens = [token.encode() if isinstance(token, str) else token for token in tokens]

    @property
    def mask_id(self) -> int:
        return len(self._tokens)

    def token(self, token_id: int) -> str:
        return "[MASK]" if token_id == self.mask_id else self.decode([token_id])

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._tokens[i] for i in ids).decode("utf-8", "replace")


WORDS = Vocabulary("One", " day", ",", " Tim", "my", "\n", ATTACK, b"\xc3", b"\xa9", " r\u202e\x1b[2Jx", "\t")
"""Among them an attack, two halves of one character, and characters that rule terminals."""
MASK = WORDS.mask_id
ONE, DAY, COMMA, TIM, MY, NEWLINE, EVIL, HALF, OTHER_HALF, RULER, TAB = range(MASK)


def written(states: Sequence[Sequence[int]], *, alternatives: int = 0) -> Trajectory:
    """A trajectory of one sequence with these states; the figures say which step and position they belong to."""
    tokens = torch.tensor(states)[:, None]
    n_steps, length = len(states) - 1, len(states[0])
    revealed = torch.full((1, length), -1)
    for step in range(n_steps):
        changed = (tokens[step] != tokens[step + 1]) & (tokens[step + 1] != MASK)
        revealed = revealed.masked_fill(changed, step).masked_fill(tokens[step + 1] == MASK, -1)
    is_open = tokens[:-1] == MASK
    place = (10 * torch.arange(n_steps)[:, None, None] + torch.arange(length)) / 100
    figures = torch.where(is_open, place.double(), torch.nan)
    ranks = torch.arange(alternatives)
    return Trajectory(
        states=tokens,
        revealed_at=revealed,
        confidence=figures,
        entropy=figures * 2,
        t=torch.linspace(1, 0, n_steps + 1, dtype=torch.float64)[:-1, None],
        top_tokens=torch.where(is_open[..., None], ranks, -1),
        top_probabilities=torch.where(is_open[..., None], 0.5 ** (1 + ranks.double()), torch.nan),
        seed=3,
        indices=(0,),
        mask_id=MASK,
        n_forwards=n_steps,
        sampler={"schedule": {"kind": "Even", "steps": n_steps}, "order": "confidence"},
    )


STORY = [
    [ONE, DAY, MASK, MASK, MASK, MASK],
    [ONE, DAY, COMMA, MASK, MASK, MASK],
    [ONE, DAY, COMMA, TIM, MASK, HALF],
    [ONE, DAY, MASK, TIM, MY, HALF],
    [ONE, DAY, NEWLINE, TIM, MY, OTHER_HALF],
]
"""A prompt, a token taken back and written otherwise, and one rewritten."""
