"""Text of tokenised corpora as people write it: what zero-shot figures on them are computed on.

WikiText, Penn Treebank and LM1B are distributed with spaces around punctuation, split contractions and marks of their
own. A model of web text pays for every such space, so published zero-shot perplexities are of text put back together.
These rules are this project's own, so a figure by them is comparable with a published one only roughly; `raw` leaves
the text alone. What a corpus lost stays lost: `<unk>`, Penn Treebank's N for numbers and its lower case are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

TextForm = Literal["raw", "wikitext", "ptb", "lm1b", "lambada"]

Rule = tuple[re.Pattern[str], str]


def _rules(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


CONTRACTIONS = _rules(
    (r"(?<=\w) (n't|'(?:t|s|S|re|ve|ll|d|m|em))\b", r"\1"),
    (r"(?<=s) '(?= [a-z])", "'"),  # the players ' union
)
"""Endings that were split off their word."""
PUNCTUATION = _rules(
    (r" ([,;:!?]|\.+)(?=\s|\"|$)", r"\1"),
    (r"([(\[{]) ", r"\1"),
    (r" ([)\]}])", r"\1"),
    (r"(?<=\d) %", "%"),
    (r"([$£€]) (?=[\dN])", r"\1"),
)
"""Marks that stand at a word without a space."""
MARKS = _rules((r" @([-,.])@ ", r"\1"))
"""WikiText's hyphens and separators inside words and numbers."""
HEADINGS = _rules((r"= =(?= )", "=="), (r"== =(?= |$)", "==="), (r"(?<== )= =", "=="))
"""WikiText's headings of lower levels."""
BRACKETS = _rules((r"-[lL][rR][bB]-", "("), (r"-[rR][rR][bB]-", ")"), (r"`` ?| ?''", '"'))
"""Penn Treebank's names for brackets, and its quotation marks."""


def _applied(text: str, *groups: tuple[Rule, ...]) -> str:
    for group in groups:
        for pattern, replacement in group:
            text = pattern.sub(replacement, text)
    return text


def _closed_quotes(text: str) -> str:
    """Straight double quotes that stand alone between spaces, joined to what they quote, in pairs of a line."""
    return "\n".join(
        re.sub(r'(^|(?<=\s)|(?<=[(\[])) ?" ([^"]*?) "(?=\s|[,.;:!?)\]]|$)', r'\1"\2"', line)
        for line in text.split("\n")
    )


def wikitext(text: str) -> str:
    """WikiText-2 and -103, raw or with <unk>.

    >>> wikitext(' The 1 @,@ 200 " Star @-@ like " ships ( old ) weren \\'t found . ')
    'The 1,200 "Star-like" ships (old) weren\\'t found.'
    """
    text = _applied(_closed_quotes(text), MARKS, CONTRACTIONS, PUNCTUATION, HEADINGS)
    return "\n".join(line.strip() for line in text.split("\n"))


def ptb(text: str) -> str:
    """Penn Treebank as it is used for language models: lower case, N for numbers.

    >>> ptb(" the company 's shares did n't rise $ N -lrb- <unk> -rrb- ")
    "the company's shares didn't rise $N (<unk>)"
    """
    text = _applied(text, BRACKETS, CONTRACTIONS, PUNCTUATION)
    return "\n".join(line.strip() for line in text.split("\n"))


def lm1b(text: str) -> str:
    """The One Billion Word benchmark.

    >>> lm1b('He said : " It \\'s $ 5 , or 20 % . "')
    'He said: "It\\'s $5, or 20%."'
    """
    text = _applied(_closed_quotes(text), BRACKETS, CONTRACTIONS, PUNCTUATION)
    return "\n".join(line.strip() for line in text.split("\n"))


def lambada(text: str) -> str:
    """LAMBADA: quotation marks as on a keyboard, no space around.

    >>> lambada(" \\u201cYes,\\u201d he said. ")
    '"Yes," he said.'
    """
    straight = text.translate({0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'"})
    return _applied(straight, _rules((r"`` ?| ?''", '"'))).strip()


DETOKENISERS: dict[TextForm, Callable[[str], str]] = {
    "raw": lambda text: text,
    "wikitext": wikitext,
    "ptb": ptb,
    "lm1b": lm1b,
    "lambada": lambada,
}
"""By the name of the corpus."""


def detokenised(text: str, form: TextForm) -> str:
    """The text of a document of that corpus as people write it."""
    return DETOKENISERS[form](text)
