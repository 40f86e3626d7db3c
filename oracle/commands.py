"""The commands `oracle fingerprint`, `oracle record` and `oracle verify`."""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mdlm_interp.config_args import parse_args
from mdlm_interp.errors import ConfigError, DataError, OutputExistsError
from mdlm_interp.model import HookedMDLM
from oracle import golden
from oracle.oracle import Oracle
from oracle.paths import fused_for

MISMATCH = 1
"""Exit code of a verification that found other bits."""


@dataclass(frozen=True, kw_only=True)
class InputChoice:
    """A model and one sequence for it."""

    model: str = "bundled"
    """Model directory, Hugging Face repository id, "bundled", or "synthetic" for the small test model."""
    text: str | None = None
    """Text with [MASK] where the model should fill in."""
    ids: tuple[int, ...] | None = None
    """Token ids instead of a text, separated by commas."""
    sigma: float | None = None
    """Noise level, for a time-conditioned model."""
    tokenizer: str | None = None
    """Directory with the tokenizer, if it is not the model's own."""
    device: str = "cpu"
    """Where the model runs, such as cpu or cuda."""

    def load(self) -> tuple[Oracle, Tensor, Tensor | None]:
        """The oracle, token ids [batch, pos] and noise levels [batch]; the synthetic model has its own."""
        if self.text is not None and self.ids is not None:
            raise ConfigError("give either --text or --ids, not both")
        model = golden.load_source(self.model, _device(self.device))
        if self.text is not None:
            ids = _encode(model, self.text, self.tokenizer or self.model)
        elif self.ids is not None:
            ids = torch.tensor([self.ids])
        elif self.model == golden.SYNTHETIC:
            ids, sigmas = golden.synthetic_inputs()
            return Oracle(model), ids.to(model.device), sigmas.to(model.device)
        else:
            raise ConfigError("give the input: --text or --ids")
        if self.sigma is None and model.config.time_conditioning:
            raise DataError("this model is time-conditioned: give --sigma, the noise level")
        timesteps = None
        if self.sigma is not None:
            timesteps = torch.tensor([self.sigma], dtype=torch.float32, device=model.device)
        return Oracle(model), ids.to(model.device), timesteps


def _encode(model: HookedMDLM, text: str, tokenizer: str) -> Tensor:
    from mdlm_interp.filling import encode_prompt
    from mdlm_interp.tokenizers import load_tokenizer

    if tokenizer == golden.SYNTHETIC:
        raise ConfigError("the synthetic model has no tokenizer; give --ids")
    return encode_prompt(model, load_tokenizer(tokenizer), text)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be cpu, cuda or the like, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but torch finds no CUDA device; use cpu")
    return device


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def _machine(device: torch.device) -> str:
    """What a report says about where it was made."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    path = "compiled loops" if fused_for(device) is not None else "plain path"
    return f"{kind}, torch {torch.__version__}, {torch.get_num_threads()} threads, {path}"


@dataclass(frozen=True, kw_only=True)
class FingerprintConfig(InputChoice):
    """Hash every intermediate of one exact forward pass."""

    points: bool = False
    """List the hash of every hook point."""


def fingerprint(argv: list[str]) -> int:
    """`mdlm-interp oracle fingerprint [MODEL]`."""
    prog = "mdlm-interp oracle fingerprint"
    config = parse_args(FingerprintConfig, argv, prog=prog, positional=("model",))
    oracle, ids, timesteps = config.load()
    found = oracle.digests(ids, timesteps=timesteps)
    if config.points:
        for name, digest in found.digests.items():
            _say(f"{digest}  {name}")
    _say(f"weights      {oracle.weights_digest()}")
    _say(f"fingerprint  {found.sha256}")
    return 0


@dataclass(frozen=True, kw_only=True)
class RecordConfig(InputChoice):
    """Write a golden file: what the exact forward pass gives here, for others to verify."""

    out: Path
    """File to write."""


def record(argv: list[str]) -> int:
    """`mdlm-interp oracle record OUT`."""
    config = parse_args(RecordConfig, argv, prog="mdlm-interp oracle record", positional=("out",))
    if config.out.exists():
        raise OutputExistsError(f"{config.out} exists; record to another file or remove it first")
    oracle, ids, timesteps = config.load()
    content = golden.record(oracle, config.model, ids, timesteps)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    golden.save(content, config.out)
    _say(f"{config.out}: {len(content['points'])} hook points, fingerprint {content['fingerprint']}")
    return 0


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Recompute golden files on this machine, and say match or where the first difference is; exits with 1 then."""

    files: tuple[Path, ...] = ()
    """Golden files; those that come with this package if none."""
    model: str | None = None
    """Where the model is, if not where the file says."""
    device: str | None = None
    """Where it runs; the CPU, and a CUDA device if there is one, if none."""
    witness: bool = False
    """Recompute with the independent witness too (NumPy and Python integers; slow, for small models)."""


def verify(argv: list[str]) -> int:
    """`mdlm-interp oracle verify [FILES...]`."""
    config = parse_args(VerifyConfig, argv, prog="mdlm-interp oracle verify", positional=("files",))
    if config.device is not None:
        devices = [_device(config.device)]
    else:
        devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    worst = 0
    for file in config.files or golden.packaged_goldens():
        content = golden.load(file)
        for device in devices:
            model = golden.load_source(config.model or content["source"], device)
            started = time.perf_counter()
            result = golden.verify(content, Oracle(model))
            worst |= _report(file, _machine(device), result, time.perf_counter() - started)
        if config.witness:
            model = golden.load_source(config.model or content["source"])
            started = time.perf_counter()
            result = golden.verify_by_witness(content, model)
            worst |= _report(file, "witness", result, time.perf_counter() - started)
    return worst


def _report(file: Path, where: str, result: golden.Verification, seconds: float) -> int:
    if result.matches:
        _say(f"{file.name}: match, {result.n_points} hook points, {result.found} ({where}, {seconds:.1f} s)")
        return 0
    _say(f"{file.name}: DIFFERENT ({where}): recorded {result.expected}, here {result.found}")
    _say(f"  first at {result.first}: {result.detail}")
    return MISMATCH
