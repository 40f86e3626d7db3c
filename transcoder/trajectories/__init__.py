"""Features of a cross-layer transcoder along a denoising trajectory.

    feature_lives(replacement, trajectory).summary()

What needs no features is in `mdlm_interp.analysis`.
"""

from transcoder.trajectories.courses import FeatureCourses, feature_courses
from transcoder.trajectories.onset import FeatureLives, feature_lives
from transcoder.trajectories.overlap import FeatureOverlap, feature_overlap

__all__ = [
    "feature_lives",
    "FeatureLives",
    "feature_overlap",
    "FeatureOverlap",
    "feature_courses",
    "FeatureCourses",
]
