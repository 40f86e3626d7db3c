"""Stores as other formats: HDF5 and safetensors, written and read, and another project's training layout.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdlm_interp.lazy_exports import lazily

if TYPE_CHECKING:
    from capture.convert.export import Export, Target, export_store
    from capture.convert.exported import ExportedStore
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "export_store": "capture.convert.export",
            "Export": "capture.convert.export",
            "Target": "capture.convert.export",
            "ExportedStore": "capture.convert.exported",
        },
    )

__all__ = ["export_store", "Export", "Target", "ExportedStore"]
