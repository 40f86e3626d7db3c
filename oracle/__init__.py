"""The answer that others are judged by: a forward pass whose every bit is defined, and what compares to it.

Names are loaded when first used, so that importing the package costs no more than torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdlm_interp.lazy_exports import lazily

# Not lazy: the function has its module's name, which a later import of the module would otherwise take.
from oracle.compare import Difference, compare, ulp_distance

if TYPE_CHECKING:
    from oracle import fingerprint, golden, ops
    from oracle.arithmetic import ExactArithmetic
    from oracle.decoding import ExactDraws, exact_trajectory
    from oracle.errors import ExactError, GoldenError, UntrustedMachineError
    from oracle.fingerprint import Fingerprint, tensor_digest
    from oracle.oracle import Oracle
    from oracle.paths import plain_path
    from oracle.sampling import exact_sample
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "ops": "oracle",
            "fingerprint": "oracle",
            "golden": "oracle",
            "Oracle": "oracle.oracle",
            "ExactArithmetic": "oracle.arithmetic",
            "Fingerprint": "oracle.fingerprint",
            "tensor_digest": "oracle.fingerprint",
            "exact_sample": "oracle.sampling",
            "ExactDraws": "oracle.decoding",
            "exact_trajectory": "oracle.decoding",
            "plain_path": "oracle.paths",
            "ExactError": "oracle.errors",
            "GoldenError": "oracle.errors",
            "UntrustedMachineError": "oracle.errors",
        },
    )


__all__ = [
    "Oracle",
    "ops",
    "fingerprint",
    "golden",
    "ExactArithmetic",
    "Fingerprint",
    "tensor_digest",
    "exact_sample",
    "ExactDraws",
    "exact_trajectory",
    "plain_path",
    "ExactError",
    "GoldenError",
    "UntrustedMachineError",
    "Difference",
    "compare",
    "ulp_distance",
]
