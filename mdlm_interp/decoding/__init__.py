"""Samplers: from masks to text."""

from mdlm_interp.decoding.ancestral import ancestral_sample, draw

__all__ = ["ancestral_sample", "draw"]
