"""How good a model and its samples are: bounds, likelihoods of decoding orders, and what samples look like."""

from mdlm_interp.evaluation.bound import N_TIME_BINS, Nelbo, Predict, nelbo, pooled
from mdlm_interp.evaluation.detokenise import DETOKENISERS, detokenised
from mdlm_interp.evaluation.generation import SampleStatistics, sample_statistics
from mdlm_interp.evaluation.judges import JudgedSamples, judge_samples
from mdlm_interp.evaluation.likelihood import OrderLikelihood, order_likelihood

__all__ = [
    "N_TIME_BINS",
    "Nelbo",
    "Predict",
    "nelbo",
    "pooled",
    "OrderLikelihood",
    "order_likelihood",
    "SampleStatistics",
    "sample_statistics",
    "JudgedSamples",
    "judge_samples",
    "DETOKENISERS",
    "detokenised",
]
