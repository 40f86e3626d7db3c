"""Samplers: from masks to text. `sampler` says how they are put together."""

from mdlm_interp.decoding.ancestral import ancestral_sample, draw, generate
from mdlm_interp.decoding.denoiser import predict
from mdlm_interp.decoding.draws import Draw, DrawArithmetic
from mdlm_interp.decoding.interventions import Intervention
from mdlm_interp.decoding.remasking import ReMDM, TakeBack
from mdlm_interp.decoding.rewriting import Rewrite
from mdlm_interp.decoding.sampler import sample, start_tokens
from mdlm_interp.decoding.schedules import Ancestral, Even, FirstHitting, Fixed, Threshold
from mdlm_interp.decoding.settings import Record, Sampler
from mdlm_interp.decoding.trajectory import Seen, Trajectory

__all__ = [
    "sample",
    "start_tokens",
    "Sampler",
    "Ancestral",
    "FirstHitting",
    "Even",
    "Fixed",
    "Threshold",
    "ReMDM",
    "TakeBack",
    "Rewrite",
    "Draw",
    "DrawArithmetic",
    "Intervention",
    "Record",
    "Trajectory",
    "Seen",
    "generate",
    "ancestral_sample",
    "draw",
    "predict",
]
