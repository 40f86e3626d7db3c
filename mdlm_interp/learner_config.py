"""The shape of the learner's network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from mdlm_interp.errors import CheckpointError, ConfigError, nearest

MODEL_TYPE = "mdlm-learner"

Rope = Literal["interleaved", "half_split"]
"""Which dimensions of a head are rotated together: 2j with 2j + 1, or j with j + d_head / 2."""


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Shape of the network; the defaults are the published small model, of 39.65 million parameters.

    Source:
        scottstts/Learning-Diffusion-LM at commit 72a8358, train_model.ipynb.
    """

    vocab_size: int = 8192
    """Number of token ids, the mask token included."""
    model_length: int = 512
    """Context the model is trained on, in tokens; the forward pass itself accepts any length."""
    hidden_dim: int = 512
    """Width of the residual stream."""
    n_blocks: int = 6
    """Number of transformer blocks."""
    n_heads: int = 4
    """Attention heads per block."""
    dropout: float = 0.1
    """Dropout probability of both branches, in training mode only."""
    time_conditioning: bool = True
    """Whether t modulates the blocks; if not, the network has no such weights."""
    rope: Rope = "interleaved"
    """Pairs of dimensions that rotary positions turn: interleaved as published, or half_split as in MDLM."""

    def __post_init__(self) -> None:
        for name in ("model_length", "hidden_dim", "n_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_blocks < 0:
            raise ConfigError(f"n_blocks must be at least 0, got {self.n_blocks}")
        if self.vocab_size < 2:
            raise ConfigError(
                f"vocab_size must leave room for the mask token: at least 2, got {self.vocab_size}"
            )
        if self.hidden_dim % self.n_heads or (self.hidden_dim // self.n_heads) % 2:
            raise ConfigError(
                f"hidden_dim must be n_heads times an even head width (rotary pairs), "
                f"got hidden_dim {self.hidden_dim} and n_heads {self.n_heads}"
            )
        if self.time_conditioning and self.hidden_dim < 4:
            raise ConfigError(
                f"hidden_dim must be at least 4 for the features of t, got {self.hidden_dim}; "
                f"raise it or set time_conditioning to false"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def mask_id(self) -> int:
        """Vocabulary id of the mask token: always the last one."""
        return self.vocab_size - 1

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.hidden_dim // self.n_heads

    @property
    def d_mlp(self) -> int:
        """Width of the MLP's hidden layer, after the gate has halved it."""
        return 4 * self.hidden_dim

    @classmethod
    def from_json(cls, path: Path) -> LearnerConfig:
        """Read a config.json that `HookedLearner.save_pretrained` wrote.

        Raises:
            CheckpointError: If it is missing, no JSON, of another model, or lacks or misspells a field.
        """
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path.parent} has no config.json; is it a model directory?") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} is not valid JSON ({error}); save the model again") from None
        if not isinstance(stored, dict):
            raise CheckpointError(f"{path} must hold a JSON object, got {type(stored).__name__}")
        return cls.from_mapping(stored, source=str(path))

    @classmethod
    def from_mapping(cls, stored: Mapping[str, Any], source: str) -> LearnerConfig:
        """Build from a parsed config.json; see `from_json`."""
        if stored.get("model_type") != MODEL_TYPE:
            raise CheckpointError(
                f"{source} describes a {stored.get('model_type')!r} model, expected model_type {MODEL_TYPE!r}; "
                f"load an MDLM with HookedMDLM.from_pretrained"
            )
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name not in stored:
                raise CheckpointError(
                    f"{source} lacks {field.name!r}, which the network depends on{nearest(field.name, stored)}"
                )
            value, expected = stored[field.name], type(field.default)
            if expected is float and type(value) is int:
                value = float(value)
            if type(value) is not expected:
                raise CheckpointError(f"{source}: {field.name} must be {expected.__name__}, got {value!r}")
            values[field.name] = value
        if values["rope"] not in get_args(Rope):
            raise CheckpointError(
                f"{source}: rope must be one of {', '.join(get_args(Rope))}, got {values['rope']!r}"
            )
        try:
            return cls(**values)
        except ConfigError as error:
            raise CheckpointError(f"{source}: {error}") from None

    def to_mapping(self) -> dict[str, Any]:
        """The fields of config.json, in a fixed order."""
        return {
            "architectures": ["HookedLearner"],
            "model_type": MODEL_TYPE,
            "torch_dtype": "float32",
            **asdict(self),
        }
