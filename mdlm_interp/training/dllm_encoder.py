"""A masked encoder of transformers and its tokenizer, from a local directory and back to one.

Only safetensors are read, and no code that comes with a checkpoint is run. A directory without the weights of the
masked-LM head is refused: transformers would draw them at random.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from mdlm_interp.checkpoints import sha256_of
from mdlm_interp.errors import CheckpointError
from mdlm_interp.training.chat import CHAT_TEMPLATE

HASHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""Files of the directory that say what the model and the tokenizer are."""

SAVED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""Files of a directory that `save_encoder` wrote."""


@dataclass(frozen=True)
class Encoder:
    """An `AutoModelForMaskedLM` in float32 with its fast tokenizer."""

    model: nn.Module
    tokenizer: Any
    sha256: str
    """Of the directory's files."""

    @property
    def vocab_size(self) -> int:
        """Entries of the model's logits; often more than the tokenizer has ids."""
        return int(_config(self.model).vocab_size)

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""
        return int(self.tokenizer.mask_token_id)

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return int(self.tokenizer.pad_token_id)

    @property
    def longest(self) -> int:
        """Tokens that the model takes at most."""
        positions = getattr(_config(self.model), "max_position_embeddings", None)
        return int(min(positions or self.tokenizer.model_max_length, self.tokenizer.model_max_length))

    def text_ids(self) -> NDArray[np.int64]:
        """Ids of the tokens that can stand in a text: all but the control tokens, ascending."""
        return np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)

    def control_ids(self) -> tuple[int, ...]:
        """Ids that an answer never holds: control tokens, and those of the model that the tokenizer lacks."""
        return tuple(np.setdiff1d(np.arange(self.vocab_size), self.text_ids()).tolist())


def load_encoder(directory: Path) -> Encoder:
    """The model and the tokenizer of a directory.

    Raises:
        CheckpointError: If transformers is not installed, or the directory does not hold a masked LM with all its
            weights in safetensors and a fast tokenizer that fits it.
    """
    _check_files(directory)
    try:
        import jinja2  # noqa: F401  (transformers imports it when a chat template is used)
        from transformers import AutoModelForMaskedLM, AutoTokenizer
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"an encoder needs {error.name}, which is not installed; pip install transformers jinja2"
        ) from None
    from_here = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _no_progress_bars():
            model, info = AutoModelForMaskedLM.from_pretrained(
                str(directory), use_safetensors=True, output_loading_info=True, **from_here
            )
            tokenizer = AutoTokenizer.from_pretrained(str(directory), **from_here)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} does not load as a masked LM with its tokenizer ({' '.join(str(error).split())}); "
            f"is it one of AutoModelForMaskedLM, saved whole?"
        ) from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of the masked LM's weights, {missing[0]} first; an encoder without "
            f"its masked-LM head? Take one that was trained with it"
        )
    encoder = Encoder(model.float(), tokenizer, _directory_sha256(directory))
    _check_tokenizer(encoder, directory)
    return encoder


def save_encoder(encoder: Encoder, model: nn.Module, template: str, directory: Path) -> None:
    """Write weights, tokenizer and chat template so that transformers and `load_encoder` read them.

    Args:
        model: The trained model.
        template: Kept as the tokenizer's own, where a decoder looks for it.
    """
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.chat_template = template
    saved: Any = model
    with _no_progress_bars():
        saved.save_pretrained(directory, max_shard_size="1000GB")
        tokenizer.save_pretrained(directory)


def template_of(encoder: Encoder) -> str:
    """The chat template that the tokenizer was saved with, or the built-in one."""
    found = encoder.tokenizer.chat_template
    return found if isinstance(found, str) else CHAT_TEMPLATE


def _check_files(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} has no config.json; name a local directory that save_pretrained of transformers wrote"
        )
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{directory} has no .safetensors file; save the model again with save_pretrained of transformers"
        )


def _check_tokenizer(encoder: Encoder, directory: Path) -> None:
    tokenizer = encoder.tokenizer
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"the tokenizer in {directory} is a slow one; save its fast form, tokenizer.json"
        )
    for name in ("mask", "pad"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise CheckpointError(
                f"the tokenizer in {directory} has no {name} token; set {name}_token and save it"
            )
    if len(encoder.text_ids()) == 0 or not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise CheckpointError(
            f"the tokenizer in {directory} makes no tokens of text; is its tokenizer.json there?"
        )
    if len(tokenizer) > encoder.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {directory} has {len(tokenizer)} ids, the model {encoder.vocab_size}; "
            f"another model's tokenizer?"
        )


def _config(model: nn.Module) -> Any:
    return model.config


def _directory_sha256(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in HASHED for path in directory.glob(pattern)}):
        digest.update(f"{path.name}\0{sha256_of(path)}\0".encode())
    return digest.hexdigest()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws bars also where there is no terminal; its setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
