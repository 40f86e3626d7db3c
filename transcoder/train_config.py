"""How a transcoder is trained: optimisation, objective, schedules, data order, and what is written when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mdlm_interp.config_files import check_fields
from mdlm_interp.errors import ConfigError
from transcoder.config_checks import (
    require_at_least_one,
    require_finite_from_zero,
    require_in,
    require_share,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 512
    """Rows (tokens) in a step."""
    lr: float = 2e-3
    """Peak learning rate of Adam."""
    warmup_steps: int | None = None
    """Steps of linear warm-up from zero; none takes 50, or all steps of a shorter run."""
    decay: Literal["linear", "cosine", "none"] = "linear"
    """How the learning rate falls to zero at the end."""
    decay_fraction: float = 0.2
    """Last part of the run over which the learning rate falls."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the two moments."""
    grad_clip: float | None = 1.0
    """Largest norm of the whole gradient; none does not clip."""
    sparsity: Literal["none", "tanh", "l1"] = "none"
    """Penalty on active features, each weighed with the norm of its decoders: tanh of it (bounded), or itself (l1)."""
    sparsity_coefficient: float = 1e-3
    """Weight of the penalty: the part of a layer's variance that a fully active feature has to explain to pay."""
    sparsity_scale: float = 4.0
    """c in tanh(c * norm of decoders * activation)."""
    sparsity_warmup: float = 1.0
    """First part of the run over which the weight of the penalty grows from zero."""
    sparsity_ramp: Literal["linear", "cosine"] = "linear"
    """Shape of that growth."""
    pre_act: Literal["none", "threshold", "zero"] = "none"
    """Penalty on features below what activates them: relu(threshold - h) times decoder norm, or relu(-h)."""
    pre_act_coefficient: float = 3e-6
    """Weight of that penalty, a sum over features."""
    pre_act_on: Literal["dead", "all"] = "dead"
    """Features that it acts on."""
    auxk_alpha: float = 0.03125
    """Weight of the auxiliary loss that revives dead features of topk and batchtopk."""
    auxk: int | None = 64
    """Dead features per layer and token that the auxiliary loss uses; none switches it off."""
    dead_after_tokens: int = 100_000
    """Rows without activity after which a feature counts as dead."""
    k_start: int | None = None
    """Features that may be active at the first step, falling geometrically to k; none starts with k."""
    k_anneal: float = 0.3
    """First part of the run over which k falls from k_start."""
    calibration_rows: int = 8192
    """Held-out rows, at most, that a batchtopk's threshold is calibrated on, and the final plots are drawn of."""
    row_weights: Literal["equal", "subs", "nelbo"] = "equal"
    """Weight of a row: subs sets 0 where it cannot move the loss (last layer, unmasked); nelbo also times 1 / t."""
    select: Literal["all", "masked", "unmasked"] = "all"
    """Which rows to train on."""
    t_bins: int | None = None
    """Equal parts of (0, 1) in diffusion time that give each batch the same number of rows; none mixes as captured."""
    window_chunks: int = 32
    """Chunks of 256 rows that are held in memory and shuffled together."""
    seed: int = 0
    """Key of the initial weights and of the order of rows."""
    verify_sequences: int | None = 2
    """Sequences whose rows are recomputed by the oracle before training; none trains without this proof."""
    blocks: tuple[int, int] | None = None
    """Blocks of a batch's rows and of the features, such as 2,4, which processes share and whose sums are added in
    order: the same bits on any number of processes, each with one thread; none adds as the network likes."""
    mesh: tuple[int, int] | None = None
    """Processes along data and features, as torchrun starts them; none divides features first, then data."""
    timeout_s: int = 1800
    """Seconds that a process waits for the others."""
    log_every: int = 10
    """Steps between lines of metrics."""
    checkpoint_every: int = 500
    """Steps between saved states; the state is also saved when the run is interrupted."""
    keep_checkpoints: int = 1
    """Saved states that are kept, the newest."""
    plots: bool = True
    """Whether to draw FVU per layer, feature density and L0 over training when the run ends."""
    tensorboard: bool = False
    """Whether metrics also go to TensorBoard files in the out directory; needs the extra tensorboard."""
    wandb: str | None = None
    """Project of Weights & Biases that metrics also go to; needs the extra wandb."""

    def __post_init__(self) -> None:
        check_fields(self)
        counts = (
            "steps batch_size dead_after_tokens window_chunks log_every checkpoint_every keep_checkpoints"
        )
        require_at_least_one(
            self, [*counts.split(), "k_start", "t_bins", "calibration_rows", "verify_sequences", "timeout_s"]
        )
        for name in ("blocks", "mesh"):
            pair = getattr(self, name)
            require_in(self, name, "two numbers from 1, data and feature", pair is None or min(pair) >= 1)
        if self.warmup_steps is not None:
            require_in(self, "warmup_steps", "at least 0", self.warmup_steps >= 0)
            if self.warmup_steps > self.steps:
                raise ConfigError(
                    f"warmup_steps must be at most steps, got {self.warmup_steps} and {self.steps}; lower it, or leave "
                    f"it out for none, which takes 50, or all steps of a shorter run"
                )
        require_in(self, "seed", "in [0, 2**64)", 0 <= self.seed < 2**64)
        # Written so that nan breaks them too.
        require_in(self, "lr", "above 0 and finite", 0.0 < self.lr < math.inf)
        require_finite_from_zero(self, ("auxk_alpha", "sparsity_coefficient", "pre_act_coefficient"))
        require_in(self, "sparsity_scale", "above 0 and finite", 0.0 < self.sparsity_scale < math.inf)
        require_share(self, ("decay_fraction", "sparsity_warmup", "k_anneal"))
        require_in(self, "betas", "in [0, 1)", all(0.0 <= beta < 1.0 for beta in self.betas))
        revives = self.auxk is None or self.auxk >= 1
        require_in(self, "auxk", "at least 1, or none, which switches it off", revives)
        clips = self.grad_clip is None or 0.0 < self.grad_clip < math.inf
        require_in(self, "grad_clip", "above 0 and finite, or none, which does not clip", clips)
        if self.t_bins is not None and self.batch_size % self.t_bins:
            raise ConfigError(
                f"batch_size must be a multiple of t_bins, got {self.batch_size} and {self.t_bins}; change either"
            )

        if self.select == "unmasked" and self.row_weights != "equal":
            raise ConfigError(
                f"row_weights {self.row_weights} gives the last layer's unmasked rows no weight, and select unmasked "
                f"leaves it no others; set row_weights to equal or select to all"
            )

    def check_objective(self, activation: str, n_features: int, k: int | None) -> None:
        """Raise ConfigError if the objective does not fit the activation."""
        selects = activation in ("topk", "batchtopk")
        if not selects and self.sparsity == "none":
            raise ConfigError(
                f"activation {activation} needs a penalty to be sparse, got sparsity none; set train.sparsity to tanh"
            )
        if self.k_start is not None and (not selects or not (k or 0) <= self.k_start <= n_features):
            raise ConfigError(
                f"k_start must be from k to n_features, and needs activation topk or batchtopk, got {self.k_start} "
                f"with {activation}, k {k}, n_features {n_features}; leave it out for none"
            )
