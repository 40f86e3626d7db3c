"""The frame of every page: one HTML file that needs no network and runs nothing but its own script.

1. Styles and scripts are this package's files, written into the page. The scripts share one module scope.
2. Data travel as JSON in a script element that browsers do not run, with "<", ">" and "&" as escapes, so that no
   text in them can end the element. The scripts put it on the page as text, never as markup.
3. A Content-Security-Policy allows those styles and scripts by their SHA-256 and nothing else: should some text
   become markup after all, it can neither run nor load anything.
"""

from __future__ import annotations

import hashlib
import html
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mdlm_interp.atomic_files import replacing
from mdlm_interp.errors import DataError, OutputExistsError

FRAME_STYLE, FRAME_SCRIPT = "page.css", "page.js"
MAX_BYTES = 200 * 2**20
"""Larger pages keep a browser busy for minutes."""


@dataclass(frozen=True)
class Link:
    """A page of the same site, as another page names it."""

    name: str
    href: str
    """Relative, so that the directory can be moved."""
    current: bool = False
    """Whether it is the page that shows the link."""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{nav}<header class="page-head"><h1>{title}</h1></header>
{body}
<noscript><p>This page shows its data with a script; allow it for this file.</p></noscript>
<script type="application/json" id="page-data">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def html_page(
    *,
    title: str,
    body: str,
    data: Mapping[str, Any],
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    nav: Sequence[Link] = (),
) -> str:
    """A whole page.

    Args:
        title: Of the window and the heading; escaped here.
        body: Markup of this package, without anybody's text in it: text belongs into `data`.
        data: What JSON can hold; the scripts read it with `pageData()`.
        styles: Names of the package's files in `viewer/static`, beside the frame's own.
        scripts: Likewise, in the order in which they run.
        nav: Pages of the same site, shown above the heading.
    Raises:
        DataError: If the data hold NaN, an infinity or what JSON has no form for, or are too large.
    """
    style = "\n".join(static(name) for name in (FRAME_STYLE, *styles))
    script = "\n".join(static(name) for name in (FRAME_SCRIPT, *scripts))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return _PAGE.format(
        policy=policy,
        title=html.escape(title),
        style=style,
        nav=_nav(nav),
        body=body,
        data=script_json(data),
        script=script,
    )


def _nav(links: Sequence[Link]) -> str:
    if not links:
        return ""
    here = ' aria-current="page"'
    made = (
        f'<a href="{html.escape(link.href)}"{here if link.current else ""}>{html.escape(link.name)}</a>'
        for link in links
    )
    return f'<nav class="pages" aria-label="Pages">{" ".join(made)}</nav>\n'


def script_json(data: Mapping[str, Any]) -> str:
    """JSON that is safe inside a script element: ASCII, and no character that HTML gives a meaning.

    >>> script_json({"token": "</script><!--"})
    '{"token":"\\\\u003c/script\\\\u003e\\\\u003c!--"}'
    """
    try:
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise DataError(f"a page's data must be what JSON can hold: {error}; use null for NaN") from None
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    if len(text) > MAX_BYTES:
        raise DataError(
            f"a page's data are at most {MAX_BYTES >> 20} MiB, got {len(text) >> 20} MiB; show fewer sequences"
        )
    return text


def static(name: str) -> str:
    """A style or script of this package."""
    return files("mdlm_interp.viewer").joinpath("static", name).read_text("utf-8")


def write_page(path: str | Path, page: str, *, overwrite: bool = False) -> None:
    """Write a page, whole or not at all.

    Raises:
        OutputExistsError: If something is there and `overwrite` was not said.
        WriteError: If the disk refuses.
    """
    refuse_existing_page(path, overwrite=overwrite)
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")


def refuse_existing_page(path: str | Path, *, overwrite: bool) -> None:
    """Raise OutputExistsError if a page cannot go there: ask before the work of making one."""
    path = Path(path)
    if path.is_dir():
        raise OutputExistsError(f"{path} is a directory; give the page a file name in it")
    if not overwrite and (path.exists() or path.is_symlink()):
        raise OutputExistsError(f"{path} exists; choose another path, or replace it with --overwrite")


def _hash(text: str) -> str:
    # A browser hashes the element's text as parsed, where a carriage return would have become a newline.
    return "sha256-" + b64encode(hashlib.sha256(text.encode()).digest()).decode()
