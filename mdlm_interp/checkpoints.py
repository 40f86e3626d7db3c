"""Published weights to ours and back: directories, hub repositories and the bundled model.

Every key of the file must be a key of the network and the reverse, with the shape that config.json
implies; weights must be finite; only safetensors is read. A checkpoint published with a known SHA-256
is checked against it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdlm_interp.arithmetic import Arithmetic
from mdlm_interp.atomic_files import replacing
from mdlm_interp.config import MDLMConfig
from mdlm_interp.devices import usable_device
from mdlm_interp.errors import CheckpointError, OutputExistsError, nearest
from mdlm_interp.model import HookedMDLM

BUNDLED = "bundled"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_FILES = (CONFIG, "*.safetensors", INDEX, "tokenizer*.json", "vocab.json", "merges.txt")
"""What is downloaded of a repository: neither pickles nor code."""

SHA256_CHUNK_BYTES = 1 << 22

PUBLISHED_SHA256 = {
    ("kuleshov-group/mdlm-owt", "d0958fa851335ece6c15260ce0025f030673c0fb"): (
        "47149e73f7552f39ea9776dbe74d925d25237bcf2ed2e2ec03cdff9d51c82aa4"
    ),
}
"""SHA-256 of model.safetensors by (repository, commit)."""

DEFAULT_REVISION = dict(PUBLISHED_SHA256.keys())
"""The commit that is loaded when a known repository is asked for without a revision."""


def bundled_directory() -> Path:
    """Where the small model that ships with this package lies."""
    return Path(str(resources.files("mdlm_interp.assets") / "bundled"))


def resolve_source(source: str | Path, revision: str | None = None) -> Path:
    """The local directory that a source means, downloading a hub repository if needed.

    Raises:
        CheckpointError: If it is neither a directory, a reachable repository id, nor "bundled".
    """
    if source == BUNDLED:
        if revision is not None:
            raise CheckpointError(
                f"revision {revision!r} was given, but the bundled model has only one; drop it"
            )
        return bundled_directory()
    directory = Path(source)
    if directory.is_dir() and source != "":  # which Path takes for the working directory
        if revision is not None:
            raise CheckpointError(
                f"revision {revision!r} was given, but {directory} is a local directory; drop it"
            )
        return directory
    name = str(source)
    if name.count("/") != 1 or directory.is_absolute() or name.startswith((".", "~")) or directory.exists():
        raise CheckpointError(
            f"{name!r} is no model directory; a source is a directory with config.json and {WEIGHTS}, "
            f"a repository id such as 'kuleshov-group/mdlm-owt', or 'bundled'"
        )
    return _download(name, revision)


def _download(repository: str, revision: str | None) -> Path:
    from mdlm_interp.hub import fetch

    revision = revision or DEFAULT_REVISION.get(repository)
    directory = fetch(repository, revision, HUB_FILES)
    expected = PUBLISHED_SHA256.get((repository, revision or ""))
    if expected is not None:
        verify_sha256(directory / WEIGHTS, expected)
    return directory


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(SHA256_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def verify_sha256(path: Path, expected: str) -> None:
    """Raise CheckpointError unless the file has the published hash."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download the checkpoint again")
    found = sha256_of(path)
    if found != expected:
        raise CheckpointError(
            f"{path} has SHA-256 {found}, the published file has {expected}; delete it and download it again"
        )


def load_model(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    arithmetic: Arithmetic | None = None,
) -> HookedMDLM:
    """See `HookedMDLM.from_pretrained`."""
    if not dtype.is_floating_point:
        raise CheckpointError(f"dtype must be a floating point type, got {dtype}")
    place = usable_device(device)
    directory = resolve_source(source, revision)
    if _is_learner(directory / CONFIG):
        from mdlm_interp.learner import HookedLearner

        return HookedLearner.from_pretrained(directory, device=device, dtype=dtype, arithmetic=arithmetic)
    config = MDLMConfig.from_json(directory / CONFIG)
    with torch.device("meta"):
        model = HookedMDLM(config, arithmetic)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for file in weight_files(directory):
        for name, tensor in read_tensors(file):
            check_tensor(name, tensor, expected, file, config)
            if name in state:
                raise CheckpointError(
                    f"{name} is in {file} and in another shard; download the checkpoint again"
                )
            low = dtype in (torch.float16, torch.bfloat16)
            # The rotary frequencies stay float32 in a half-precision model; see layers.Rotary.
            kind = torch.float32 if low and name.endswith("inv_freq") else dtype
            state[name] = tensor.to(device=place, dtype=kind)
            if kind == torch.float16 and not bool(torch.isfinite(state[name]).all()):
                raise CheckpointError(
                    f"{name} in {file} reaches {float(tensor.abs().max()):g} and float16 ends at 65504; load the "
                    f"model as bfloat16 or float32"
                )
    missing = [name for name in expected if name not in state]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}; "
            f"is n_blocks in config.json right, and are all shards there?"
        )
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(True)


def _is_learner(config: Path) -> bool:
    """Whether a config.json describes the learner's network; what is wrong with one is told by who reads it."""
    from mdlm_interp.learner_config import MODEL_TYPE

    try:
        stored = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and stored.get("model_type") == MODEL_TYPE


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, single or sharded."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        try:
            stored = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            shards = sorted({str(shard) for shard in stored["weight_map"].values()})
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
            raise CheckpointError(
                f"{directory / INDEX} is no index of shards; download the checkpoint again"
            ) from None
        outside = [shard for shard in shards if shard in ("", "..") or Path(shard).name != shard]
        if outside:
            raise CheckpointError(
                f"{directory / INDEX} names {outside[0]!r}, which is no file of that directory"
            )
        files = [directory / shard for shard in shards]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise CheckpointError(
                f"{directory} lacks the shard {absent[0]}, named in {INDEX}; download it again"
            )
        return files
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds {pickles[0]}, a pickle that can run code when read, and no {WEIGHTS}; "
            f"convert it to safetensors where you trust it"
        )
    raise CheckpointError(f"{directory} has no {WEIGHTS} (nor {INDEX}); is it a model directory?")


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, stored.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({error}); download it again"
        ) from None


def check_tensor(
    name: str, tensor: Tensor, expected: dict[str, tuple[int, ...]], file: Path, config: MDLMConfig
) -> None:
    """Raise CheckpointError unless this tensor belongs to the model, fits it and is finite."""
    if name not in expected:
        raise CheckpointError(
            f"{file} holds {name!r}, which a model with {config.n_blocks} blocks does not have"
            f"{nearest(name, expected)}"
        )
    if tuple(tensor.shape) != expected[name]:
        hint = ""
        if config.cond_dim == 129:
            hint = "; cond_dim 129 is upstream's class default and a typo, published weights need 128"
        raise CheckpointError(
            f"{name} in {file} has shape {tuple(tensor.shape)}, config.json implies {expected[name]}{hint}"
        )
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} in {file} is {tensor.dtype}, expected floating point numbers")
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{name} in {file} has values that are not finite; the file is damaged or training diverged"
        )


def save_model(model: HookedMDLM, directory: Path) -> None:
    """Write config.json and model.safetensors (float32, upstream's names); never over an existing model.

    Each file is whole and on disk before it gets its name, and the weights come last: a save that fails or
    is interrupted leaves no model, and can be repeated.

    Raises:
        OutputExistsError: If the directory holds a model; nothing is written then.
        WriteError: If the disk is full, read-only or failing.
    """
    config = (json.dumps(model.config.to_mapping(), indent=2) + "\n").encode()
    settled = directory / CONFIG
    # An interrupted save leaves its own config.json for the next attempt; another's may not be lost.
    present = [directory / name for name in (WEIGHTS, INDEX) if (directory / name).exists()]
    if settled.exists() and settled.read_bytes() != config:
        present.append(settled)
    if present:
        raise OutputExistsError(f"{present[0]} exists; save to another directory or remove it first")
    state = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
    }
    with replacing(settled) as partial:
        partial.write_bytes(config)
    with replacing(directory / WEIGHTS) as partial:
        save_file(state, partial, metadata={"format": "pt"})


def weights_sha256(model_directory: Path) -> str:
    """One SHA-256 for a model directory's weights: of the file, or over its shards' hashes in name order."""
    hashes = [sha256_of(file) for file in weight_files(model_directory)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
