"""What a cross-layer transcoder is, and what a training run makes of which data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from mdlm_interp.config_files import check_fields
from mdlm_interp.errors import ConfigError
from transcoder.config_checks import (
    LAYER_FIELD,
    require_apart,
    require_at_least_one,
    require_hooks,
    require_in,
    require_k_features,
)
from transcoder.live_config import LiveConfig
from transcoder.train_config import TrainConfig

METRICS = "metrics.jsonl"
"""File of a training run's metrics, one line of JSON every `log_every` steps."""

Connectivity: TypeAlias = Literal["clt", "plt", "band"]
Activation: TypeAlias = Literal["relu", "jumprelu", "topk", "batchtopk"]
Ste: TypeAlias = Literal["gdm", "anthropic", "crosslayer-coding"]

__all__ = [
    "METRICS",
    "CLTRunConfig",
    "FeatureConfig",
    "InitConfig",
    "LiveConfig",
    "TrainConfig",
    "TranscoderConfig",
    "hook_names",
]


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """What features are, and which layers they write to."""

    n_features: int
    """Features of each layer."""
    connectivity: Connectivity = "clt"
    """Layers that a feature writes to: its own and all later (clt), only its own (plt), or the next few (band)."""
    band: int | None = None
    """With connectivity band: how many layers a feature writes to, its own being the first."""
    activation: Activation = "topk"
    """What makes features sparse; a trained batchtopk is saved as the jumprelu that it is calibrated to."""
    k: int | None = None
    """Features that may be active at once, per layer and token; of batchtopk, on average."""
    ste: Ste = "gdm"
    """Pseudo-gradient of jumprelu at its threshold; see `transcoder.activations`."""
    ste_width: float = 1.0
    """Width around the threshold in which jumprelu's pseudo-gradient is not zero, in units of pre-activations."""
    skip: bool = False
    """Whether each layer also has a linear map from its input to its output."""
    input_hook: str = "blocks.{layer}.mlp.hook_in"
    """Hook point that a layer's encoder reads; {layer} stands for the block's number."""
    output_hook: str = "blocks.{layer}.hook_mlp_out"
    """Hook point whose activation the decoders reconstruct."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_k_features(self)
        require_hooks(self)
        require_at_least_one(self, ("band",))
        require_in(self, "ste_width", "above 0 and finite", 0.0 < self.ste_width < float("inf"))
        if (self.band is None) == (self.connectivity == "band"):
            given = (
                "needs band, a number of layers" if self.band is None else f"takes no band, got {self.band}"
            )
            raise ConfigError(f"connectivity {self.connectivity} {given}; set both or neither")

    @property
    def selects(self) -> bool:
        """Whether the activation keeps the k largest, instead of what passes a threshold."""
        return self.activation in ("topk", "batchtopk")


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(FeatureConfig):
    """Shape of a transcoder and the hook points it reads and writes."""

    n_layers: int
    """Number of blocks; each has its own features."""
    d_model: int
    """Width of the residual stream."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_at_least_one(self, ("n_layers", "d_model"))
        super().__post_init__()
        if self.band is not None and self.band >= self.n_layers:
            raise ConfigError(
                f"band must be below the number of layers, got band {self.band} for {self.n_layers}; lower it, or set "
                f"connectivity clt, which writes to all later layers"
            )
        if self.selects != (self.k is not None):
            need = "needs k, a number of features" if self.selects else f"has no k, got {self.k}"
            raise ConfigError(f"activation {self.activation} {need}; set both alike")

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """The hook point that each layer reads."""
        return hook_names(self.input_hook, self.n_layers)

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """The hook point that each layer's reconstruction stands for."""
        return hook_names(self.output_hook, self.n_layers)

    @property
    def reach(self) -> int:
        """Layers that a feature writes to at most, its own included; also those that write to a layer at most."""
        return {"clt": self.n_layers, "plt": 1, "band": self.band or 1}[self.connectivity]

    def targets(self, source: int) -> range:
        """The layers that a layer's features write to.

        >>> shape = TranscoderConfig(n_layers=4, d_model=8, n_features=16, k=2, connectivity="band", band=2)
        >>> [list(shape.targets(source)) for source in range(4)]
        [[0, 1], [1, 2], [2, 3], [3]]
        """
        return range(source, min(source + self.reach, self.n_layers))

    def sources(self, target: int) -> range:
        """The layers whose features write to a layer."""
        return range(max(0, target + 1 - self.reach), target + 1)


def hook_names(template: str, n_layers: int) -> tuple[str, ...]:
    """A template's hook point in each layer.

    >>> hook_names("blocks.{layer}.hook_mlp_out", 2)
    ('blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out')
    """
    return tuple(template.replace(LAYER_FIELD, str(layer)) for layer in range(n_layers))


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The initial weights; b_dec and W_skip are zero, since activations are centred."""

    encoder: Literal["n_features", "d_model"] = "d_model"
    """W_enc is uniform within one over the root of this: d_model as nn.Linear, or n_features as in Anthropic's CLT."""
    decoder: Literal["uniform", "own_layer", "zeros"] = "uniform"
    """W_dec: uniform within 1 / sqrt(writing layers * d_model); the same, but zero to later layers; or all zero."""
    active_features: float | None = None
    """Features of a layer that b_enc makes active per token at the start, by exact quantile; none starts b_enc at 0."""
    rows: int = 4096
    """Training rows that these quantiles are taken of."""
    threshold: float = 0.03
    """Threshold of jumprelu at the start, in units of pre-activations."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_in(self, "rows", "at least 2", self.rows >= 2)
        require_in(self, "threshold", "above 0 and finite", 0.0 < self.threshold < float("inf"))
        fires = self.active_features is None or 0.0 < self.active_features < float("inf")
        require_in(self, "active_features", "above 0 and finite, or none, which keeps b_enc at 0", fires)


@dataclass(frozen=True, kw_only=True)
class CLTRunConfig(FeatureConfig):
    """Train a cross-layer transcoder on an activation store, or on rows from the running model."""

    store: Path | None = None
    """Activation store made by `mdlm-interp capture run` with the hooks of every block; none needs live.files."""
    out: Path
    """Directory for the transcoder, its metrics and its checkpoints; a stopped run found there continues."""
    n_features: int = 512
    """Features of each layer."""
    k: int | None = 16
    """Features that may be active at once, per layer and token; of batchtopk, on average; no effect without these."""
    model: str | None = None
    """Model of the proof, and of live rows; none takes the one that the store names, or for live rows "bundled"."""
    held_out_fraction: float = 0.1
    """Share of the sequences that training never sees; sequences of equal text stay together."""
    device: str = "cpu"
    """Where to train, as torch names it."""
    live: LiveConfig = field(default_factory=LiveConfig)
    """Rows from the running model."""
    init: InitConfig = field(default_factory=InitConfig)
    """The initial weights."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in(self, "held_out_fraction", "in (0, 1)", 0.0 < self.held_out_fraction < 1.0)
        require_apart(self.out, self.store)
        if (self.store is None) != bool(self.live.files):
            given = "neither" if self.store is None else "both"
            raise ConfigError(f"a run needs a store or live.files to train on, got {given}; give one of them")
        if self.selects and self.k is None:
            raise ConfigError(
                f"activation {self.activation} needs k, a number of features; leave it out for 16"
            )
        self.train.check_objective(self.activation, self.n_features, self.k)

    def shape(self, n_layers: int, d_model: int) -> TranscoderConfig:
        """The transcoder for a model of this many layers and this width."""
        return TranscoderConfig(
            n_layers=n_layers,
            d_model=d_model,
            n_features=self.n_features,
            connectivity=self.connectivity,
            band=self.band,
            activation=self.activation,
            k=self.k if self.selects else None,
            ste=self.ste,
            ste_width=self.ste_width,
            skip=self.skip,
            input_hook=self.input_hook,
            output_hook=self.output_hook,
        )
