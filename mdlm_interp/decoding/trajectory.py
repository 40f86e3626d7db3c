"""What happened while decoding: every state, when each token came, how sure the model was, and chosen activations.

A trajectory is a folder with `trajectory.safetensors` (the tensors) and `trajectory.json` (settings, shapes and the
SHA-256 of the tensors); nothing in it is code. Loading checks all of that, and that the states fit together.
"""

# Axes: state (step + 1), step, batch, pos, kept (step whose activations were recorded), rank (of alternatives)

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdlm_interp.atomic_files import replacing, replacing_directory
from mdlm_interp.decoding.draws import Measured
from mdlm_interp.errors import DataError, nearest
from mdlm_interp.saved_settings import read_settings
from mdlm_interp.shapes import Bool, Float64, Int64

FORMAT, VERSION = "mdlm-interp trajectory", 1
TENSORS, SETTINGS = "trajectory.safetensors", "trajectory.json"
ACTIVATIONS = "acts/"
"""What the names of activations begin with inside the file."""

FIELDS = ("states", "revealed_at", "confidence", "entropy", "t", "top_tokens", "top_probabilities")


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One batch from its start to its final tokens; step n leads from state n to state n + 1."""

    states: Int64[Tensor, "state batch pos"]
    """Tokens before each step, and at the end."""
    revealed_at: Int64[Tensor, "batch pos"]
    """Step that wrote the final token; -1 if it stood there from the start (given, or never written)."""
    confidence: Float64[Tensor, "step batch pos"]
    """Probability of the token drawn in each step, kept or not, before temperature; NaN where none could be written."""
    entropy: Float64[Tensor, "step batch pos"]
    """Of the same probabilities, in nats."""
    t: Float64[Tensor, "step batch"]
    """Time at the start of each step; the share of masks where the schedule has no time of its own."""
    top_tokens: Int64[Tensor, "step batch pos rank"]
    """Most probable tokens, if they were recorded (rank may be 0); -1 where none could be written."""
    top_probabilities: Float64[Tensor, "step batch pos rank"]
    """Their probabilities."""
    activations: dict[str, Tensor] = field(default_factory=dict)
    """Recorded hook points [kept batch ...], as interventions left them."""
    activation_steps: tuple[int, ...] = ()
    """The steps that were kept."""
    seed: int
    """Key of the draws."""
    indices: tuple[int, ...]
    """Number of each sequence, the key of its draws."""
    mask_id: int
    """Which token is the mask."""
    n_forwards: int
    """Forward passes that it took."""
    sampler: dict[str, Any]
    """The sampler's settings as plain values."""

    def __post_init__(self) -> None:
        n_states, batch, pos = self.states.shape if self.states.dim() == 3 else (0, 0, 0)
        rank = self.top_tokens.shape[-1] if self.top_tokens.dim() else 0
        for name in FIELDS:
            axes = {"states": (n_states,), "revealed_at": ()}.get(name, (n_states - 1,))
            last = () if name == "t" else (pos, rank) if name.startswith("top") else (pos,)
            expected, found = [*axes, batch, *last], list(getattr(self, name).shape)
            if found != expected or n_states < 1:
                raise DataError(f"a trajectory's {name} has shape {expected} beside its states, got {found}")
        if len(self.indices) != batch:
            raise DataError(f"a trajectory of {batch} sequences has as many indices, got {len(self.indices)}")

    @property
    def final(self) -> Int64[Tensor, "batch pos"]:
        """The tokens at the end."""
        return self.states[-1]

    @property
    def n_steps(self) -> int:
        """Steps taken."""
        return self.states.shape[0] - 1

    @property
    def commit_confidence(self) -> Float64[Tensor, "batch pos"]:
        """Probability that each final token had in the step that wrote it; NaN where none did."""
        found = torch.full(self.revealed_at.shape, torch.nan, dtype=torch.float64)
        if self.n_steps:
            at = self.confidence.gather(0, self.revealed_at.clamp(min=0)[None])[0]
            found = torch.where(self.revealed_at >= 0, at, found)
        return found

    @property
    def reveal_rank(self) -> Int64[Tensor, "batch pos"]:
        """How many of its sequence's final tokens were written in earlier steps; -1 where no step wrote one.

        The first are 0, and those of one step share a rank, so ranks do not depend on how many steps were idle.
        """
        at = self.revealed_at
        earlier = (at[:, None, :] < at[:, :, None]) & (at >= 0)[:, None, :]
        return earlier.sum(-1).masked_fill(at < 0, -1)

    def save(self, directory: str | Path) -> None:
        """Write the folder, whole or not at all.

        Raises:
            OutputExistsError: If something is there.
            WriteError: If the disk refuses.
        """
        tensors = {name: getattr(self, name).contiguous() for name in FIELDS}
        tensors |= {ACTIVATIONS + name: tensor.contiguous() for name, tensor in self.activations.items()}
        settings: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "seed": self.seed,
            "indices": list(self.indices),
            "mask_id": self.mask_id,
            "n_forwards": self.n_forwards,
            "activation_steps": list(self.activation_steps),
            "sampler": self.sampler,
            "shapes": {name: [_kind(tensor), *tensor.shape] for name, tensor in sorted(tensors.items())},
        }
        with replacing_directory(directory) as partial:
            with replacing(
                partial / TENSORS
            ) as file:  # as readable as the other, which safetensors would not make it
                save_file(tensors, file)
            settings["sha256"] = _sha256(partial / TENSORS)
            (partial / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> Trajectory:
        """Read a folder that `save` wrote.

        Raises:
            DataError: If it is no trajectory, incomplete, damaged or contradicts itself.
        """
        directory = Path(directory)
        settings = _read_settings(directory / SETTINGS)
        file = directory / TENSORS
        if not file.is_file():
            raise DataError(f"{directory} has no {TENSORS}; was it copied in part?")
        if _sha256(file) != settings["sha256"]:
            raise DataError(
                f"{file} is not what {SETTINGS} was written for: its SHA-256 differs; save it again"
            )
        tensors = _read_tensors(file)
        shapes = {name: [_kind(tensor), *tensor.shape] for name, tensor in sorted(tensors.items())}
        if shapes != settings["shapes"]:
            raise DataError(
                f"{directory}: {SETTINGS} describes other tensors than {TENSORS} holds; save it again"
            )
        missing = [name for name in FIELDS if name not in tensors]
        if missing:
            raise DataError(f"{file} lacks {missing[0]!r}; save it again")
        activations = {
            name.removeprefix(ACTIVATIONS): tensor
            for name, tensor in tensors.items()
            if name.startswith(ACTIVATIONS)
        }
        values: dict[str, Any] = {name: tensors[name] for name in FIELDS}
        values |= {name: settings[name] for name in ("seed", "mask_id", "n_forwards", "sampler")}
        values |= {name: tuple(settings[name]) for name in ("indices", "activation_steps")}
        loaded = cls(**values, activations=activations)
        loaded.check()
        return loaded

    def check(self) -> None:
        """Raise DataError unless reveal steps, states and activations fit together."""
        if _largest(self.revealed_at) >= self.n_steps:
            raise DataError(
                f"a token is revealed after the last step, {self.n_steps - 1}; save the trajectory again"
            )
        never = self.revealed_at < 0
        changed = (self.states != self.states[:1]).any(0) & never & (self.final != self.mask_id)
        if bool(changed.any()):
            row, position = changed.nonzero()[0].tolist()
            raise DataError(
                f"sequence {row} changes at position {position}, which no step wrote; save the trajectory again"
            )
        for name, tensor in self.activations.items():
            if tensor.shape[0] != len(self.activation_steps):
                raise DataError(
                    f"{name} has {tensor.shape[0]} steps, activation_steps {len(self.activation_steps)}; save it again"
                )


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One step as it happened: what the recorder, a live view or a capture is told."""

    number: int
    """Of the step, from 0."""
    n_steps: int | None
    """Steps of the whole run at most, where that is known beforehand."""
    t: Float64[Tensor, " batch"]
    """Time at its start."""
    before: Int64[Tensor, "batch pos"]
    """Tokens at its start: what the model read."""
    after: Int64[Tensor, "batch pos"]
    """Tokens at its end."""
    is_open: Bool[Tensor, "batch pos"]
    """Positions that could be written."""
    written: Bool[Tensor, "batch pos"]
    """Positions that were."""
    taken_back: Bool[Tensor, "batch pos"]
    """Positions that became masks again."""
    measured: Measured
    """What the model said of the open positions; NaN and -1 elsewhere."""
    top_tokens: Int64[Tensor, "batch pos rank"]
    """Most probable tokens, if asked for."""
    top_probabilities: Float64[Tensor, "batch pos rank"]
    """Their probabilities."""
    activations: dict[str, Tensor]
    """Recorded hook points [batch ...] of this step."""


class Recorder:
    """Collects a trajectory step by step."""

    def __init__(self, x: Int64[Tensor, "batch pos"], keep_activations: bool) -> None:
        self._states = [x.clone()]
        self._keep = keep_activations
        self._revealed_at = torch.full(x.shape, -1)
        self._rows: dict[str, list[Tensor]] = {name: [] for name in FIELDS[2:]}
        self._activations: dict[str, list[Tensor]] = {}
        self._kept: list[int] = []

    def add(self, seen: Seen) -> None:
        """The next step."""
        values = (
            seen.measured.drawn,
            seen.measured.entropy,
            seen.t,
            seen.top_tokens,
            seen.top_probabilities,
        )
        for rows, value in zip(self._rows.values(), values, strict=True):
            rows.append(value)
        if seen.activations and self._keep:
            self._kept.append(seen.number)
            for name, tensor in seen.activations.items():
                self._activations.setdefault(name, []).append(tensor)
        self._states.append(seen.after.clone())
        written = self._revealed_at.masked_fill(seen.written, seen.number)
        self._revealed_at = written.masked_fill(seen.taken_back, -1)

    def finish(self, **settings: Any) -> Trajectory:
        """The whole."""
        batch, pos = self._revealed_at.shape
        shapes: dict[str, tuple[int, ...]] = {"t": (0, batch)}
        shapes |= dict.fromkeys(FIELDS[5:], (0, batch, pos, 0))
        stacked: dict[str, Any] = {
            name: torch.stack(rows)
            if rows
            else torch.empty(shapes.get(name, (0, batch, pos)), dtype=_dtype(name))
            for name, rows in self._rows.items()
        }
        return Trajectory(
            states=torch.stack(self._states),
            revealed_at=self._revealed_at,
            **stacked,
            activations={name: torch.stack(tensors) for name, tensors in self._activations.items()},
            activation_steps=tuple(self._kept),
            **settings,
        )


def _dtype(name: str) -> torch.dtype:
    return torch.int64 if name == "top_tokens" else torch.float64


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _largest(values: Tensor) -> int:
    return int(values.max()) if values.numel() else -1


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise DataError(f"{path} is damaged: {error}; save it again") from None


EXPECTED: dict[str, type] = {
    "format": str,
    "version": int,
    "seed": int,
    "indices": list,
    "mask_id": int,
    "n_forwards": int,
    "activation_steps": list,
    "sampler": dict,
    "shapes": dict,
    "sha256": str,
}


def _read_settings(path: Path) -> dict[str, Any]:
    """The JSON file, checked key by key."""
    found = read_settings(path, form=FORMAT, version=VERSION, what="a trajectory")
    for key, kind in EXPECTED.items():
        if type(found.get(key)) is not kind:
            raise DataError(
                f"{path}: {key} must be {kind.__name__}, got {found.get(key)!r}{nearest(key, found)}"
            )
    for key in ("indices", "activation_steps"):
        if not all(type(item) is int for item in found[key]):
            raise DataError(f"{path}: {key} must hold whole numbers, got {found[key]!r}")
    return found
