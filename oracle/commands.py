"""The commands `oracle fingerprint`, `oracle record`, `oracle verify` and `oracle sample`."""

from __future__ import annotations

import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mdlm_interp.config_args import parse_args
from mdlm_interp.decoding.commands import SampleConfig
from mdlm_interp.decoding.commands import main as sample_command
from mdlm_interp.devices import usable_device
from mdlm_interp.errors import ConfigError, DataError, OutputExistsError
from mdlm_interp.filling import check_fits, encode_prompt
from mdlm_interp.model import HookedMDLM
from mdlm_interp.tokenizers import Tokenizer, load_tokenizer
from oracle import golden
from oracle.decoding import exact_parts
from oracle.oracle import Oracle
from oracle.paths import fused_for

MISMATCH = 1
"""Exit code of a verification that found other bits."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """A model in exact arithmetic."""

    model: str = "bundled"
    """Model directory, Hugging Face repository id, "bundled", or "synthetic" for the small test model."""
    tokenizer: str | None = None
    """Directory with the tokenizer, if it is not the model's own."""
    device: str = "cpu"
    """Where the model runs, such as cpu or cuda."""

    def load_model(self) -> HookedMDLM:
        """The model, where it is to run."""
        return golden.load_source(self.model, usable_device(self.device))

    def load_tokenizer(self) -> Tokenizer:
        """The model's tokenizer, or the one that was named."""
        source = self.tokenizer or self.model
        if source == golden.SYNTHETIC:
            raise ConfigError("the synthetic model has no tokenizer; give --ids")
        return load_tokenizer(source)


@dataclass(frozen=True, kw_only=True)
class InputChoice(ModelChoice):
    """A model and one sequence for it."""

    text: str | None = None
    """Text with [MASK] where the model should fill in."""
    ids: tuple[int, ...] | None = None
    """Token ids instead of a text, separated by commas."""
    sigma: float | None = None
    """Noise level, for a time-conditioned model."""

    def load(self) -> tuple[Oracle, Tensor, Tensor | None]:
        """The oracle, token ids [batch, pos] and noise levels [batch]; the synthetic model has its own."""
        if self.text is not None and self.ids is not None:
            raise ConfigError("give either --text or --ids, not both")
        if self.text is None and self.tokenizer is not None:
            raise ConfigError("--tokenizer is for a --text, and none is given; leave it out")
        model = self.load_model()
        if self.text is None and self.ids is None and self.model == golden.SYNTHETIC:
            if self.sigma is not None:
                raise ConfigError(
                    "--sigma is for a sequence of your own, and the synthetic model's two have theirs; give --ids too"
                )
            ids, sigmas = golden.synthetic_inputs()
            return Oracle(model), ids.to(model.device), sigmas.to(model.device)
        ids, timesteps = self._ids(model).to(model.device), self._timesteps(model)
        return Oracle(model), ids, timesteps

    def _ids(self, model: HookedMDLM) -> Tensor:
        if self.text is not None:
            return encode_prompt(model, self.load_tokenizer(), self.text)
        if self.ids is None:
            raise ConfigError("give the input: --text or --ids")
        context, n_ids = model.config.model_length, model.config.vocab_size
        if not 1 <= len(self.ids) <= context:
            raise DataError(f"--ids must be 1 to {context} tokens, the model's context, got {len(self.ids)}")
        outside = [token for token in self.ids if not 0 <= token < n_ids]
        if outside:
            raise DataError(
                f"token ids must be in [0, {n_ids}), got {outside[0]}; was the text encoded with another tokenizer?"
            )
        return torch.tensor([self.ids])

    def _timesteps(self, model: HookedMDLM) -> Tensor | None:
        if self.sigma is None:
            if model.config.time_conditioning:
                raise DataError("this model is time-conditioned: give --sigma, the noise level")
            return None
        if not model.config.time_conditioning:
            raise ConfigError("this model is not time-conditioned and would not read --sigma; leave it out")
        sigma = torch.tensor([self.sigma], dtype=torch.float32)
        if not math.isfinite(sigma.item()) or self.sigma < 0.0:
            raise ConfigError(
                f"--sigma must be at least 0 and finite as float32, got {self.sigma}; it is -ln(share unmasked)"
            )
        return sigma.to(model.device)


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
        devices = [usable_device(config.device)]
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


@dataclass(frozen=True, kw_only=True)
class ExactSampleConfig(SampleConfig):
    """Write text from masks by exact sampling: the same text on every machine."""

    def load(self) -> tuple[HookedMDLM, Tokenizer]:
        """The model and its tokenizer, which must fit each other."""
        choice = ModelChoice(model=self.model, tokenizer=self.tokenizer, device=self.device)
        model, tokenizer = choice.load_model(), choice.load_tokenizer()
        check_fits(tokenizer, model)
        return model, tokenizer


def sample(argv: list[str]) -> int:
    """`mdlm-interp oracle sample [CONFIG.yaml] [PROMPT]`: `mdlm-interp sample` with the oracle's parts."""
    return sample_command(
        argv, prog="mdlm-interp oracle sample", config_class=ExactSampleConfig, parts=exact_parts
    )
