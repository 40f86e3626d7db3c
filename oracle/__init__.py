"""The judge of every other number: how far two sets of activations are apart, worst element first."""

from oracle.compare import Difference, compare, ulp_distance

__all__ = ["Difference", "compare", "ulp_distance"]
