"""Interventions: edits of features, hook points, heads and attention edges, and patching sweeps.

`session` says how they are used, `edits` what there is.
"""

from transcoder.interventions.comparison import Comparison
from transcoder.interventions.edits import Ablate, Edit, Knockout, Patch, Scale, Set, Steer
from transcoder.interventions.frozen import FROZEN, frozen
from transcoder.interventions.metrics import log_odds, logit_difference
from transcoder.interventions.paths import Paths
from transcoder.interventions.session import Interventions, interventions
from transcoder.interventions.subjects import LocalReplacement, Spliced
from transcoder.interventions.sweep import patching_sweep
from transcoder.interventions.swept import Agreement, PatchingSweep

__all__ = [
    "interventions",
    "Interventions",
    "Ablate",
    "Scale",
    "Set",
    "Steer",
    "Patch",
    "Knockout",
    "Edit",
    "Comparison",
    "Paths",
    "Spliced",
    "LocalReplacement",
    "frozen",
    "FROZEN",
    "patching_sweep",
    "PatchingSweep",
    "Agreement",
    "log_odds",
    "logit_difference",
]
