"""The architecture of a masked diffusion language model, under upstream's field names."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mdlm_interp.config_files import check_fields
from mdlm_interp.errors import CheckpointError, ConfigError, nearest

LAYER_NORM_EPS = 1e-5
"""torch's LayerNorm default, which upstream uses; DiT's 1e-6 moves the logits by 7e-3."""

ROTARY_BASE = 10_000.0
TIME_FEATURES = 256
"""Width of the sinusoid of sigma: fixed upstream, independent of cond_dim."""

MLP_RATIO = 4


class NetworkShape:
    """What the configs of both networks have; no fields of its own, so that each keeps their order."""

    vocab_size: int
    hidden_dim: int
    n_blocks: int
    n_heads: int
    dropout: float

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
        """Width of the MLP's hidden layer; where a gate halves it, after that."""
        return MLP_RATIO * self.hidden_dim

    def check_shape(self, counts: Sequence[str]) -> None:
        """Raise ConfigError if this is no shape of a network.

        Args:
            counts: Names of the fields that must be at least 1.
        """
        for name in counts:
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
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")


def read_config_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object that a model directory's config.json holds.

    Args:
        remedy: What to do where it is no JSON.
    Raises:
        CheckpointError: If it is missing, no JSON, or no object.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no config.json; is it a model directory?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); {remedy}") from None
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(stored).__name__}")
    return stored


def stored_fields(
    cls: type[Any],
    stored: Mapping[str, Any],
    source: str,
    *,
    why: str,
    optional: Collection[str] = (),
    nullable: Collection[str] = (),
) -> dict[str, Any]:
    """Values of a config's fields out of a parsed config.json; other keys are ignored.

    Args:
        cls: A dataclass whose fields all have defaults, of their own type.
        why: Why a field must be there, for the error.
        optional: Fields that may be left out.
        nullable: Fields that may be null.
    Raises:
        CheckpointError: If a field is missing or of the wrong type.
    """
    values: dict[str, Any] = {}
    for field in fields(cls):
        if field.name not in stored:
            if field.name in optional:
                continue
            hint = nearest(field.name, stored)
            raise CheckpointError(f"{source} lacks {field.name!r}, {why}{hint}")
        value, expected = stored[field.name], type(field.default)
        if expected is float and type(value) is int:
            value = float(value)
        if type(value) is not expected and not (value is None and field.name in nullable):
            raise CheckpointError(f"{source}: {field.name} must be {expected.__name__}, got {value!r}")
        values[field.name] = value
    return values


@dataclass(frozen=True, kw_only=True)
class MDLMConfig(NetworkShape):
    """Shape of the network.

    Source:
        configuration_mdlm.py of kuleshov-group/mdlm-owt. Its class default cond_dim = 129 is a typo
        (every published checkpoint has 128), so 128 is the default here.
    """

    vocab_size: int = 50_258
    """Number of token ids, the mask token included."""
    model_length: int = 1024
    """Context the model was trained on, in tokens; the forward pass itself accepts any length."""
    hidden_dim: int = 768
    """Width of the residual stream."""
    cond_dim: int = 128
    """Width of the conditioning vector read by every adaLN projection."""
    n_blocks: int = 12
    """Number of transformer blocks."""
    n_heads: int = 12
    """Attention heads per block."""
    dropout: float = 0.1
    """Dropout probability of both branches, in training mode only."""
    time_conditioning: bool = False
    """Whether sigma reaches the network; when false it is replaced by zero, as upstream does."""
    return_dict: bool = False
    """What the transformers class returns by default; HookedMDLM always returns the logits."""

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_shape(("vocab_size", "model_length", "hidden_dim", "cond_dim", "n_heads"))

    @classmethod
    def from_json(cls, path: Path) -> MDLMConfig:
        """Read a published `config.json`; keys that transformers adds are ignored, a missing shape is not."""
        return cls.from_mapping(read_config_json(path, "download the checkpoint again"), source=str(path))

    @classmethod
    def from_mapping(cls, stored: Mapping[str, Any], source: str) -> MDLMConfig:
        """Build from a parsed config.json.

        Raises:
            CheckpointError: If the model type is another one, or a shape is missing or of the wrong type.
        """
        model_type = stored.get("model_type", "mdlm")
        if model_type != "mdlm":
            raise CheckpointError(f"{source} describes a {model_type!r} model, expected model_type 'mdlm'")
        values = stored_fields(
            cls,
            stored,
            source,
            why="which fixes a weight's shape",
            optional=("dropout", "return_dict", "time_conditioning", "model_length"),
        )
        try:
            return cls(**values)
        except ConfigError as error:
            raise CheckpointError(f"{source}: {error}") from None

    def to_mapping(self) -> dict[str, Any]:
        """The fields of a published config.json, in a fixed order."""
        return {"architectures": ["MDLM"], "model_type": "mdlm", "torch_dtype": "float32", **asdict(self)}
