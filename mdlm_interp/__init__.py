"""Masked diffusion language models with every intermediate in reach.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdlm_interp.lazy_exports import lazily

if TYPE_CHECKING:
    from mdlm_interp.arithmetic import NativeArithmetic
    from mdlm_interp.config import MDLMConfig
    from mdlm_interp.hf import export_hf
    from mdlm_interp.hooks import ActivationCache
    from mdlm_interp.model import HookedMDLM
    from mdlm_interp.tokenizers import load_tokenizer
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "HookedMDLM": "mdlm_interp.model",
            "MDLMConfig": "mdlm_interp.config",
            "NativeArithmetic": "mdlm_interp.arithmetic",
            "ActivationCache": "mdlm_interp.hooks",
            "export_hf": "mdlm_interp.hf",
            "load_tokenizer": "mdlm_interp.tokenizers",
        },
    )

__version__ = "0.1.0"

__all__ = [
    "HookedMDLM",
    "MDLMConfig",
    "NativeArithmetic",
    "ActivationCache",
    "export_hf",
    "load_tokenizer",
    "__version__",
]
