"""Activations of a masked diffusion language model over text, as a Zarr store.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdlm_interp.lazy_exports import lazily

if TYPE_CHECKING:
    from capture.config import CaptureConfig
    from capture.forecast import Forecast, forecast_capture
    from capture.iteration import ShuffledRows
    from capture.reader import ActivationStore, open_store
    from capture.run import run_capture
    from capture.verify import verify_store
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "open_store": "capture.reader",
            "CaptureConfig": "capture.config",
            "run_capture": "capture.run",
            "forecast_capture": "capture.forecast",
            "Forecast": "capture.forecast",
            "verify_store": "capture.verify",
            "ActivationStore": "capture.reader",
            "ShuffledRows": "capture.iteration",
        },
    )

__all__ = [
    "open_store",
    "CaptureConfig",
    "run_capture",
    "forecast_capture",
    "Forecast",
    "verify_store",
    "ActivationStore",
    "ShuffledRows",
]
