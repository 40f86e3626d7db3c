"""One hash for a tensor, a forward pass or a set of weights: over name, type, shape and bytes.

Definition: SPEC.md, section 5. A pass's fingerprint is a hash of its tensors' digests in execution order, so two
passes can be compared hook point by hook point without keeping an activation.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PASS_HEADER = "mdlm-interp exact 1"
WEIGHTS_HEADER = "mdlm-interp weights 1"
LOGITS = "logits"
"""Name under which the returned logits are hashed, beside the hook point that they go through."""


@dataclass(frozen=True)
class Fingerprint:
    """What identifies every number of one forward pass."""

    sha256: str
    """Hash over all digests, in order."""
    digests: Mapping[str, str]
    """SHA-256 of each hook point's tensor and of the logits, in execution order."""


def tensor_digest(name: str, tensor: Tensor) -> str:
    """SHA-256 of a tensor under a name, the same on every machine whatever its layout in memory."""
    array = tensor.detach().to("cpu").contiguous().numpy()
    if sys.byteorder == "big":
        array = array.byteswap()
    kind = str(tensor.dtype).removeprefix("torch.")
    sizes = ",".join(map(str, tensor.shape))
    digest = hashlib.sha256(f"{name}\n{kind}\n{sizes}\n".encode())
    digest.update(array.reshape(-1).view("uint8").data)
    return digest.hexdigest()


def combine(digests: Mapping[str, str], header: str = PASS_HEADER) -> str:
    """The hash over named digests in their order."""
    lines = [header, *(f"{name} {digest}" for name, digest in digests.items())]
    return hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """One hash for a state dict, whatever file it came from: its tensors in the order of their names."""
    digests = {name: tensor_digest(name, state[name].to(torch.float32)) for name in sorted(state)}
    return combine(digests, WEIGHTS_HEADER)
