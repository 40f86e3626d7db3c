"""What the exact arithmetic refuses, as errors that a user can act on."""

from __future__ import annotations

from mdlm_interp.errors import MdlmError


class ExactError(MdlmError):
    """An operation that exact arithmetic does not define: gradients, other types, values that are not finite."""


class UntrustedMachineError(ExactError):
    """A machine or setting on which the exact results could not be certified."""


class GoldenError(MdlmError):
    """A golden file that cannot be read, or that describes another model."""


class NotFiniteError(ExactError):
    """A result that is not finite, before it is said where."""
