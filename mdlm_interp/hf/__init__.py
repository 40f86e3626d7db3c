"""MDLM for Hugging Face transformers: the classes, their registration, and export of a model folder.

Importing this package needs no transformers; `register` and the two class files do.
"""

from mdlm_interp.hf.export import export_hf
from mdlm_interp.hf.registration import register

__all__ = ["export_hf", "register"]
