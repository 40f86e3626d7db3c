"""The answer that others are judged by: a forward pass whose every bit is defined, and what compares to it.

Names are loaded when first used, so that importing the package costs no more than torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Not lazy: the function has its module's name, which a later import of the module would otherwise take.
from oracle.compare import Difference, compare, ulp_distance

if TYPE_CHECKING:
    from oracle import fingerprint, golden, ops
    from oracle.arithmetic import ExactArithmetic
    from oracle.errors import ExactError, GoldenError, UntrustedMachineError
    from oracle.fingerprint import Fingerprint, tensor_digest
    from oracle.oracle import Oracle
    from oracle.paths import plain_path
    from oracle.sampling import exact_sample

__all__ = [
    "Oracle",
    "ops",
    "fingerprint",
    "golden",
    "ExactArithmetic",
    "Fingerprint",
    "tensor_digest",
    "exact_sample",
    "plain_path",
    "ExactError",
    "GoldenError",
    "UntrustedMachineError",
    "Difference",
    "compare",
    "ulp_distance",
]

_MODULES = {"ops", "fingerprint", "golden"}
_HOMES = {
    "Oracle": "oracle.oracle",
    "ExactArithmetic": "oracle.arithmetic",
    "Fingerprint": "oracle.fingerprint",
    "tensor_digest": "oracle.fingerprint",
    "exact_sample": "oracle.sampling",
    "plain_path": "oracle.paths",
    "ExactError": "oracle.errors",
    "GoldenError": "oracle.errors",
    "UntrustedMachineError": "oracle.errors",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"oracle.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
