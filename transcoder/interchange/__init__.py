"""Transcoders in the files of other tools, and back: circuit-tracer, SAELens and crosslayer-coding.

What is written has normalisation, and if asked the constant adaLN, folded in in float64 and is rounded once. Every
export is read back before it gets its name and must agree with the original within a derived bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdlm_interp.lazy_exports import lazily

if TYPE_CHECKING:
    from transcoder.interchange.exporting import export_clt
    from transcoder.interchange.importing import import_clt
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "export_clt": "transcoder.interchange.exporting",
            "import_clt": "transcoder.interchange.importing",
        },
    )

__all__ = ["export_clt", "import_clt"]
