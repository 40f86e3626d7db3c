"""Plain text tables, as notebooks and terminals show them."""

from __future__ import annotations

from collections.abc import Sequence

from mdlm_interp.tokenizers import Tokenizer


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns of equal width, the first few to the left.

    >>> print(text_table(["token", "p"], [["a", "0.25"], ["bird", "0.5"]]))
    token     p
    a      0.25
    bird    0.5
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def token_text(token: int, tokenizer: Tokenizer | None) -> str:
    """A token in quotes, so that its space is seen; its number without a tokenizer."""
    return str(token) if tokenizer is None else repr(tokenizer.token(token))
