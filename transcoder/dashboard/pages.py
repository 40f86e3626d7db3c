"""The pages about features: a table of all to search, and their dashboards, so many to a page.

A page carries the data that it shows, since a browser fetches no other file for a page opened from a file. The table
has a few values of each feature, and a dashboard is on the page that `feature_href` names.
"""

# Axes: as in occurrences.py and written.py

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.viewer.page import Link, html_page, static
from mdlm_interp.viewer.text import Decoder, visible
from transcoder.dashboard.features import Dashboards

PER_PAGE = 50
"""Features of a page; its data are then some hundred kilobytes."""
DIRECTORY = "features"
SHOWN_TOKENS = 4
"""Promoted tokens in the table."""
DIGITS = 4
"""Significant digits of what is shown."""


def feature_href(layer: int, number: int) -> str:
    """Where a feature's dashboard is, seen from the site's directory.

    >>> feature_href(2, 117)
    'features/2_100.html#f117'
    """
    return f"{_file(layer, number // PER_PAGE * PER_PAGE)}#f{number}"


def _file(layer: int, first: int) -> str:
    return f"{DIRECTORY}/{layer}_{first}.html"


def table_page(boards: Dashboards, tokenizer: Decoder, nav: Sequence[Link]) -> str:
    """The page that lists and searches all features."""
    found, written = boards.occurrences, boards.written
    count = found.active.sum((2, 3))
    total = found.total.sum((2, 3))
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    masked = np.divide(found.active[:, :, 1].sum(2), count, out=np.zeros_like(mean), where=count > 0)
    shown = written.promoted[:, :, :SHOWN_TOKENS]
    data = {
        "perPage": PER_PAGE,
        "nRows": found.n_rows,
        "nFeatures": boards.config.n_features,
        "nLayers": boards.config.n_layers,
        # By feature, layer after layer.
        "active": count.reshape(-1).tolist(),
        "largest": _rounded(np.nan_to_num(found.values[:, :, 0]).reshape(-1)),
        "mean": _rounded(mean.reshape(-1)),
        "masked": _rounded(masked.reshape(-1)),
        "promoted": shown.reshape(-1, shown.shape[2]).tolist(),
        "tokens": texts(tokenizer, shown),
    }
    return html_page(
        title="Features",
        body=static("features.html"),
        data=data,
        styles=["features.css"],
        scripts=["tokens.js", "features.js"],
        nav=nav,
    )


def dashboard_pages(boards: Dashboards, tokenizer: Decoder, nav: Sequence[Link]) -> Iterator[tuple[str, str]]:
    """File name and page of each block of features."""
    config = boards.config
    for layer in range(config.n_layers):
        for first in range(0, config.n_features, PER_PAGE):
            numbers = range(first, min(first + PER_PAGE, config.n_features))
            data = _page_data(boards, tokenizer, layer, numbers)
            page = html_page(
                title=f"Layer {layer}, features {first} to {numbers[-1]}",
                body=static("feature.html"),
                data=data,
                styles=["features.css", "feature.css"],
                scripts=["tokens.js", "svg.js", "feature.js"],
                nav=nav,
            )
            yield _file(layer, first), page


def texts(tokenizer: Decoder, *ids: NDArray[np.integer[Any]]) -> dict[str, str]:
    """Text of the tokens in some arrays, by id; -1 stands for none."""
    shown = np.unique(np.concatenate([part.reshape(-1) for part in ids]))
    return {str(token): visible(tokenizer.token(token)) for token in shown.tolist() if token >= 0}


def _page_data(boards: Dashboards, tokenizer: Decoder, layer: int, numbers: range) -> dict[str, Any]:
    found, written, config = boards.occurrences, boards.written, boards.config
    part = slice(numbers.start, numbers.stop)
    return {
        "layer": layer,
        "perPage": PER_PAGE,
        "nFeatures": config.n_features,
        "nLayers": config.n_layers,
        "first": numbers.start,
        "mask": tokenizer.mask_id,
        "rows": found.rows.tolist(),
        "targets": list(config.targets(layer)),
        "tokens": texts(
            tokenizer,
            found.clean[layer, part],
            written.promoted[layer, part],
            written.suppressed[layer, part],
        ),
        "features": [_feature(boards, layer, number) for number in numbers],
    }


def _feature(boards: Dashboards, layer: int, number: int) -> dict[str, Any]:
    found, written = boards.occurrences, boards.written
    here = layer, number
    return {
        "active": found.active[here].tolist(),
        "total": [_rounded(sums) for sums in found.total[here]],
        "norms": _rounded(written.norms[layer][number]),
        "promoted": _pairs(written.promoted[here], written.promoted_by[here]),
        "suppressed": _pairs(written.suppressed[here], written.suppressed_by[here]),
        "nearest": [
            [*place, cosine]
            for place, cosine in zip(
                written.nearest[here].tolist(), _rounded(written.cosines[here]), strict=True
            )
        ],
        "examples": [
            _example(boards, layer, number, example)
            for example in np.flatnonzero(found.seqs[here] >= 0).tolist()
        ],
    }


def _example(boards: Dashboards, layer: int, number: int, example: int) -> dict[str, Any]:
    found = boards.occurrences
    here = layer, number, example
    clean, read = found.clean[here], found.read[here]
    is_text = np.flatnonzero(clean >= 0)
    shown = slice(int(is_text[0]), int(is_text[-1]) + 1)
    return {
        "value": _rounded(found.values[here][None])[0],
        "seq": int(found.seqs[here]),
        "pos": int(found.positions[here]),
        "t": round(float(found.times[here]), 3),
        "start": int(found.starts[here]) + shown.start,
        "clean": clean[shown].tolist(),
        "read": read[shown].tolist(),
        "acts": _rounded(found.acts[here][shown]),
    }


def _pairs(tokens: NDArray[np.int64], effects: NDArray[np.float32]) -> list[list[float | int | None]]:
    return [[token, effect] for token, effect in zip(tokens.tolist(), _rounded(effects), strict=True)]


def _rounded(values: NDArray[np.floating[Any]]) -> list[float | None]:
    """To DIGITS significant digits; None for what is no number."""
    return [
        float(f"{value:.{DIGITS}g}") if finite else None
        for value, finite in zip(values.tolist(), np.isfinite(values).tolist(), strict=True)
    ]
