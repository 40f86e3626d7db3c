"""The shape of the learner's network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

from mdlm_interp.config import NetworkShape, read_config_json, stored_fields
from mdlm_interp.config_files import check_fields
from mdlm_interp.errors import CheckpointError, ConfigError

MODEL_TYPE = "mdlm-learner"

PUBLISHED_INIT_STD = 0.02

Rope = Literal["interleaved", "half_split"]
"""Which dimensions of a head are rotated together: 2j with 2j + 1, or j with j + d_head / 2."""


@dataclass(frozen=True, kw_only=True)
class LearnerConfig(NetworkShape):
    """Shape of the network; the defaults are the published small model, of 39.65 million parameters.

    Source:
        scottstts/Learning-Diffusion-LM at commit 72a8358, train_model.ipynb. residual_multiplier: MiniCPM,
        arXiv:2404.06395, and transformers' GraniteConfig.
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
    init_std: float | None = PUBLISHED_INIT_STD
    """Standard deviation of the initial matrices, at any width as published; if none, each has that of torch's own
    linear maps, 1 / sqrt(3 fan_in)."""
    residual_multiplier: float = 1.0
    """Factor of what attention and MLP add to the residual stream, 1 as published; a small one, 0.03 say, lets a narrow
    network leave the unigram plateau sooner, as MDLM's gates do, which begin at 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_shape(("model_length", "hidden_dim", "n_heads"))
        if self.time_conditioning and self.hidden_dim < 4:
            raise ConfigError(
                f"hidden_dim must be at least 4 for the features of t, got {self.hidden_dim}; "
                f"raise it or set time_conditioning to false"
            )
        if self.init_std is not None and not (isfinite(self.init_std) and self.init_std > 0.0):
            raise ConfigError(
                f"init_std must be positive and finite, got {self.init_std}; "
                f"none takes 1 / sqrt(3 fan_in) of each matrix"
            )

        if not (isfinite(self.residual_multiplier) and self.residual_multiplier > 0.0):
            raise ConfigError(
                f"residual_multiplier must be positive and finite, got {self.residual_multiplier}; 1 adds the branches "
                f"as they are"
            )

    @classmethod
    def from_json(cls, path: Path) -> LearnerConfig:
        """Read a config.json that `HookedLearner.save_pretrained` wrote.

        Raises:
            CheckpointError: If it is missing, no JSON, of another model, or lacks or misspells a field.
        """
        return cls.from_mapping(read_config_json(path, "save the model again"), source=str(path))

    @classmethod
    def from_mapping(cls, stored: Mapping[str, Any], source: str) -> LearnerConfig:
        """Build from a parsed config.json; see `from_json`."""
        if stored.get("model_type") != MODEL_TYPE:
            raise CheckpointError(
                f"{source} describes a {stored.get('model_type')!r} model, expected model_type {MODEL_TYPE!r}; "
                f"load an MDLM with HookedMDLM.from_pretrained"
            )
        values = stored_fields(
            cls,
            stored,
            source,
            why="which the network depends on",
            # One is of initial weights only, the other's default is what networks did before it was there.
            optional=("init_std", "residual_multiplier"),
            nullable=("init_std",),
        )
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
