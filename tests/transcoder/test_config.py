"""A setting that cannot be meant is refused in one line: the rule, the value, and what to do."""

import math
import re
from pathlib import Path

import pytest

from mdlm_interp.errors import ConfigError
from transcoder.commands import EvalConfig
from transcoder.config import CLTRunConfig, TrainConfig
from transcoder.demo import DemoConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0; leave it out for 1000"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1; leave it out for 512"),
        ({"dead_after_tokens": 0}, "dead_after_tokens must be at least 1, got 0; leave it out for 100000"),
        ({"window_chunks": 0}, "window_chunks must be at least 1, got 0; leave it out for 32"),
        ({"log_every": 0}, "log_every must be at least 1, got 0; leave it out for 10"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0; leave it out for 500"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1; leave it out for none"),
        (
            {"warmup_steps": 21, "steps": 20},
            "warmup_steps must be at most steps, got 21 and 20; lower it, or leave it out for none, which takes 50, or "
            "all steps of a shorter run",
        ),
        ({"seed": -1}, "seed must be in [0, 2**64), got -1; leave it out for 0"),
        ({"seed": 2**64}, f"seed must be in [0, 2**64), got {2**64}; leave it out for 0"),
        ({"lr": 0.0}, "lr must be above 0 and finite, got 0.0; leave it out for 0.002"),
        ({"lr": math.inf}, "lr must be above 0 and finite, got inf; leave it out for 0.002"),
        ({"lr": math.nan}, "lr must be above 0 and finite, got nan; leave it out for 0.002"),
        ({"decay_fraction": 1.5}, "decay_fraction must be in [0, 1], got 1.5; leave it out for 0.2"),
        ({"decay_fraction": math.nan}, "decay_fraction must be in [0, 1], got nan"),
        (
            {"select": "unmasked", "row_weights": "subs"},
            "row_weights subs gives the last layer's unmasked rows no weight, and select unmasked leaves it no others; "
            "set row_weights to equal or select to all",
        ),
        ({"betas": (0.9, 1.0)}, "betas must be in [0, 1), got (0.9, 1.0); leave it out for 0.9,0.95"),
        ({"betas": (math.nan, 0.9)}, "betas must be in [0, 1), got (nan, 0.9)"),
        ({"betas": (-0.1, 0.9)}, "betas must be in [0, 1), got (-0.1, 0.9)"),
        ({"grad_clip": 0.0}, "grad_clip must be above 0 and finite, or none, which does not clip, got 0.0"),
        ({"grad_clip": math.inf}, "grad_clip must be above 0 and finite, or none"),
        ({"grad_clip": math.nan}, "grad_clip must be above 0 and finite, or none"),
        (
            {"auxk_alpha": -0.1},
            "auxk_alpha must be at least 0 and finite, got -0.1; leave it out for 0.03125",
        ),
        ({"auxk_alpha": math.nan}, "auxk_alpha must be at least 0 and finite, got nan"),
        ({"auxk_alpha": math.inf}, "auxk_alpha must be at least 0 and finite, got inf"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0; leave it out for 1"),
        ({"verify_sequences": 0}, "verify_sequences must be at least 1, got 0; leave it out for 2"),
        ({"sparsity_coefficient": -1.0}, "sparsity_coefficient must be at least 0 and finite, got -1.0"),
        ({"pre_act_coefficient": math.nan}, "pre_act_coefficient must be at least 0 and finite, got nan"),
        ({"sparsity_scale": 0.0}, "sparsity_scale must be above 0 and finite, got 0.0; leave it out for 4.0"),
        ({"sparsity_warmup": 1.1}, "sparsity_warmup must be in [0, 1], got 1.1; leave it out for 1.0"),
        ({"k_anneal": -0.1}, "k_anneal must be in [0, 1], got -0.1; leave it out for 0.3"),
        ({"t_bins": 3}, "batch_size must be a multiple of t_bins, got 512 and 3; change either"),
        ({"auxk": 0}, "auxk must be at least 1, or none, which switches it off, got 0; leave it out for 64"),
    ],
)
def test_impossible_training_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (CLTRunConfig, {"n_features": 0}, "n_features must be at least 1, got 0; leave it out for 512"),
        (CLTRunConfig, {"k": 0}, "k must be at least 1, got 0; leave it out for 16"),
        (CLTRunConfig, {"k": 513}, "k must be at most n_features, got k 513 and n_features 512; lower k"),
        (
            CLTRunConfig,
            {"activation": "jumprelu"},
            "activation jumprelu needs a penalty to be sparse, got sparsity none; set train.sparsity to tanh",
        ),
        (CLTRunConfig, {"k": None}, "activation topk needs k, a number of features; leave it out for 16"),
        (
            CLTRunConfig,
            {"train": TrainConfig(k_start=8)},
            "k_start must be from k to n_features, and needs activation topk or batchtopk, got 8 with topk, k 16",
        ),
        (CLTRunConfig, {"held_out_fraction": 1.0}, "held_out_fraction must be in (0, 1), got 1.0; leave"),
        (CLTRunConfig, {"held_out_fraction": math.nan}, "held_out_fraction must be in (0, 1), got nan"),
        (CLTRunConfig, {"output_hook": "mlp_out"}, "output_hook must be a hook point with {layer} for"),
        (CLTRunConfig, {"out": Path("a.zarr/clt")}, "out must lie outside the store a.zarr, got a.zarr/clt"),
        (CLTRunConfig, {"out": Path("a.zarr")}, "out must lie outside the store a.zarr, got a.zarr; choose"),
        (EvalConfig, {"batch_size": 0}, "batch_size must be at least 1, got 0; leave it out for 8"),
        (EvalConfig, {"max_sequences": 0}, "max_sequences must be at least 1, got 0; leave it out for 64"),
        (EvalConfig, {"out": Path("b/../a.zarr/eval")}, "out must lie outside the store a.zarr"),
        (DemoConfig, {"train_steps": 0}, "train_steps must be at least 1, got 0; leave it out for 400"),
        (DemoConfig, {"max_sequences": 0}, "max_sequences must be at least 1, got 0; leave it out for none"),
        (DemoConfig, {"k": 600}, "k must be at most n_features, got k 600 and n_features 512"),
    ],
)
def test_an_impossible_run_is_refused_before_anything_is_read(config, changes, message):
    places = {"store": Path("a.zarr"), "clt": Path("clt"), "out": Path("out")}
    given = {name: value for name, value in places.items() if name in config.__dataclass_fields__}
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(**{**given, **changes})


def test_the_settings_at_the_edge_are_accepted():
    TrainConfig(
        betas=(0.0, 0.0), decay_fraction=1.0, auxk=None, grad_clip=None, warmup_steps=0, auxk_alpha=0.0
    )
    TrainConfig(warmup_steps=20, steps=20)
    CLTRunConfig(store=Path("runs/a.zarr"), out=Path("runs"), n_features=3, k=3)
    EvalConfig(clt=Path("clt"), store=Path("a.zarr"), max_sequences=None)
