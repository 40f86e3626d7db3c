"""Golden files: what a forward pass gave on one machine, to be recomputed on another.

A file names the model by the hash of its weights and holds the inputs, the digest of every hook point and a few
elements of each, so that a mismatch can be shown where it first appears.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.atomic_files import replacing
from mdlm_interp.config import MDLMConfig
from mdlm_interp.model import HookedMDLM
from mdlm_interp.randomness import random_bits
from oracle.errors import GoldenError
from oracle.fingerprint import LOGITS, weights_digest
from oracle.golden_file import FORMAT, places, recorded_config, require_valid
from oracle.oracle import Oracle
from oracle.tables import time_frequency

SYNTHETIC = "synthetic"
"""Source of the model that `synthetic_model` makes."""

SYNTHETIC_CONFIG = MDLMConfig(
    vocab_size=61, model_length=24, hidden_dim=96, cond_dim=16, n_blocks=2, n_heads=3, time_conditioning=True
)


def synthetic_model() -> HookedMDLM:
    """A small model whose weights are integers times powers of two, the same on every machine.

    One channel in 16 is eight times as large, as in trained models.
    """
    with torch.device("meta"):
        model = HookedMDLM(SYNTHETIC_CONFIG)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("inv_freq"):
            half = tensor.shape[0]
            state[name] = torch.tensor([time_frequency(k, half) for k in range(half)], dtype=torch.float32)
            continue
        words = random_bits(0, "oracle:synthetic:" + name, 0, tensor.numel())
        draws = (
            torch.from_numpy((words >> 44).astype("int64")).double().reshape(tensor.shape) * 2.0**-19 - 1.0
        )
        if ".norm" in name:
            draws = 1.0 + 0.25 * draws
        elif tensor.dim() == 2:
            draws = draws * 2.0 ** (1 - (tensor.shape[1].bit_length() + 1) // 2)
        if tensor.shape[-1] == SYNTHETIC_CONFIG.hidden_dim:
            draws[..., 5::16] *= 8.0
        state[name] = draws.float()
    model.load_state_dict(state, assign=True)
    return model.eval()


def synthetic_inputs() -> tuple[Tensor, Tensor]:
    """Two sequences for the synthetic model, a third and a half of them masked, and their noise levels."""
    words = random_bits(0, "oracle:synthetic:input_ids", 0, 2 * SYNTHETIC_CONFIG.model_length)
    ids = torch.from_numpy((words >> 40).astype("int64") % SYNTHETIC_CONFIG.vocab_size).reshape(2, -1)
    ids[0, ::3] = ids[1, ::2] = SYNTHETIC_CONFIG.mask_id
    return ids, torch.tensor([0.40625, 2.71875], dtype=torch.float32)


def packaged_goldens() -> list[Path]:
    """The golden files that come with this package."""
    directory = Path(str(resources.files("oracle") / "goldens"))
    return sorted(directory.glob("*.json"))


def load_source(source: str, device: str | torch.device = "cpu") -> HookedMDLM:
    """The model that a golden file names: synthetic, bundled, a directory or a repository."""
    if source == SYNTHETIC:
        return synthetic_model().to(device)
    return HookedMDLM.from_pretrained(source, device=device)


def _samples(tensor: Tensor) -> list[str]:
    flat = tensor.detach().to("cpu").reshape(-1)
    return [float(flat[i]).hex() for i in places(flat.numel())]


def record(oracle: Oracle, source: str, input_ids: Tensor, timesteps: Tensor | None = None) -> dict[str, Any]:
    """A golden file's content for one forward pass."""
    points: dict[str, dict[str, Any]] = {}

    def look(name: str, tensor: Tensor, digest: str) -> None:
        points[name] = {"shape": list(tensor.shape), "sha256": digest, "samples": _samples(tensor)}

    found = oracle.digests(input_ids, timesteps=timesteps, look=look)
    return {
        "format": FORMAT,
        "source": source,
        "config": oracle.model.config.to_mapping(),
        "weights": oracle.weights_digest(),
        "input_ids": input_ids.tolist(),
        "timesteps": None if timesteps is None else [float(value).hex() for value in timesteps],
        "fingerprint": found.sha256,
        "points": points,
    }


def save(golden: Mapping[str, Any], path: Path) -> None:
    """Write a golden file, one line for each hook point; it gets its name when all of it is on disk."""
    lines = []
    for key, value in golden.items():
        if key != "points":
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)},\n")
    points = [f"    {json.dumps(name)}: {json.dumps(point)}" for name, point in golden["points"].items()]
    text = "{\n" + "".join(lines) + '  "points": {\n' + ",\n".join(points) + "\n  }\n}\n"
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """Read a golden file.

    Raises:
        GoldenError: If it is none, one of another version, or contradicts itself.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # Bad UTF-8 and bad JSON are ValueErrors, as is a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise GoldenError(f"{path} is not valid JSON ({error}); record it again") from None
    return require_valid(content, str(path))


def inputs_of(golden: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The token ids and noise levels of a golden file."""
    ids = torch.tensor(golden["input_ids"], device=device)
    if golden["timesteps"] is None:
        return ids, None
    sigmas = [float.fromhex(value) for value in golden["timesteps"]]
    return ids, torch.tensor(sigmas, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Verification:
    """What recomputing a golden file gave."""

    expected: str
    """The file's fingerprint."""
    found: str
    """The fingerprint computed here."""
    n_points: int
    """Hook points compared, the logits included."""
    first: str | None
    """First hook point, in execution order, that differs; None if none does."""
    detail: str
    """How it differs."""

    @property
    def matches(self) -> bool:
        """Whether every bit is the same."""
        return self.first is None and self.expected == self.found


def verify(golden: Mapping[str, Any], oracle: Oracle) -> Verification:
    """Recompute a golden file.

    Raises:
        GoldenError: If the oracle's model is another than the file was recorded with.
    """
    _require_same_model(golden, oracle.model.config, oracle.weights_digest())
    ids, timesteps = inputs_of(golden, oracle.model.device)
    check = _Check(golden["points"])
    found = oracle.digests(ids, timesteps=timesteps, look=check.look)
    return check.result(golden["fingerprint"], found.sha256)


def verify_by_witness(golden: Mapping[str, Any], model: HookedMDLM) -> Verification:
    """Recompute a golden file with the witness: NumPy and Python integers that share no code with the engine.

    Slow: for the small models that come with this package.

    Raises:
        GoldenError: If the model is another than the file was recorded with.
    """
    from oracle import witness_forward

    _require_same_model(golden, model.config, weights_digest(model.state_dict()))
    ids, timesteps = inputs_of(golden, torch.device("cpu"))
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    sigma = None if timesteps is None else timesteps.numpy()
    logits, activations = witness_forward.forward(weights, model.config, ids.numpy(), sigma)
    check = _Check(golden["points"])
    for name, array in (*activations.items(), (LOGITS, logits)):
        check.look(name, torch.from_numpy(array), witness_forward.digest(name, array))
    return check.result(golden["fingerprint"], witness_forward.fingerprint(activations, logits))


NUMBERS = ("vocab_size", "hidden_dim", "cond_dim", "n_blocks", "n_heads", "time_conditioning")
"""The fields of a configuration that change what a forward pass computes."""


def _require_same_model(golden: Mapping[str, Any], config: MDLMConfig, weights: str) -> None:
    recorded = recorded_config(golden, "the golden file")
    for name in NUMBERS:
        here, there = getattr(config, name), getattr(recorded, name)
        if here != there:
            raise GoldenError(
                f"the model's config has {name} {here}, the golden file was recorded with {there}; "
                f"name the right model with --model, or record again"
            )
    if weights != golden["weights"]:
        raise GoldenError(
            f"the model's weights have SHA-256 {weights}, the golden file was recorded with {golden['weights']}; "
            f"name the right model with --model, or record again"
        )


class _Check:
    """Compares hook points as they come; keeps the first that differs."""

    def __init__(self, points: Mapping[str, Mapping[str, Any]]) -> None:
        self.points = points
        self.seen: set[str] = set()
        self.first: tuple[str, str] | None = None

    def look(self, name: str, tensor: Tensor, digest: str) -> None:
        self.seen.add(name)
        point = self.points.get(name)
        if self.first is None and (point is None or point["sha256"] != digest):
            self.first = name, _how(point, tensor)

    def result(self, expected: str, found: str) -> Verification:
        unseen = [name for name in self.points if name not in self.seen]
        if unseen and self.first is None:
            self.first = unseen[0], "this version has no such hook point"
        if self.first is None and expected != found:
            self.first = "the fingerprint", "which contradicts the file's own digests: they all match"
        first, detail = self.first or (None, "")
        return Verification(expected, found, len(self.seen), first, detail)


def _how(point: Mapping[str, Any] | None, tensor: Tensor) -> str:
    """Where a tensor departs from what was recorded, as far as the samples tell."""
    if point is None:
        return "the file has no such hook point"
    if list(tensor.shape) != point["shape"]:
        return f"its shape is {list(tensor.shape)}, recorded {point['shape']}"
    sampled = places(tensor.numel())
    for place, here, there in zip(sampled, _samples(tensor), point["samples"], strict=True):
        if here != there:
            index = [int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape)]
            return f"first sampled element that differs: {index}, {here} here, {there} recorded"
    return f"in elements other than the {len(sampled)} that the file samples"
