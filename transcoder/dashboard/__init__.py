"""What each feature of a transcoder does: where it is active in a store, and what its decoders write; as HTML pages.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdlm_interp.lazy_exports import lazily

if TYPE_CHECKING:
    from transcoder.dashboard.features import Dashboards, collect
    from transcoder.dashboard.occurrences import Occurrences, find_occurrences
    from transcoder.dashboard.site import Commitments, write_site
    from transcoder.dashboard.written import Written, read_decoders
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "collect": "transcoder.dashboard.features",
            "Dashboards": "transcoder.dashboard.features",
            "find_occurrences": "transcoder.dashboard.occurrences",
            "Occurrences": "transcoder.dashboard.occurrences",
            "read_decoders": "transcoder.dashboard.written",
            "Written": "transcoder.dashboard.written",
            "Commitments": "transcoder.dashboard.site",
            "write_site": "transcoder.dashboard.site",
        },
    )

__all__ = [
    "collect",
    "Dashboards",
    "find_occurrences",
    "Occurrences",
    "read_decoders",
    "Written",
    "Commitments",
    "write_site",
]
