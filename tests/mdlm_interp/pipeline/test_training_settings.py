"""Settings of train-lm and train-tokenizer that cannot be meant are refused in one line."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from mdlm_interp.errors import ConfigError
from mdlm_interp.training.config import TokenizerConfig, TrainLMConfig

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": ()}, r"files must name at least one text file"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, r"seed must be in \[0, 2\*\*64\), got 18446744073709551616"),
        ({"steps": 0}, r"steps must be at least 1, got 0"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"validate_every": 0}, r"validate_every must be at least 1, got 0"),
        ({"validation_sequences": 0}, r"validation_sequences must be at least 1, got 0"),
        ({"checkpoint_every": -5}, r"checkpoint_every must be at least 1, got -5"),
        ({"log_every": 0}, r"log_every must be at least 1, got 0"),
        ({"warmup_steps": -1}, r"warmup_steps must be at least 0, got -1; 0 has none"),
        ({"lr": 0.0}, r"lr must be positive and finite, got 0.0; 3.0e-4 is usual"),
        ({"lr": -1e-3}, r"lr must be positive and finite, got -0.001"),
        ({"lr": NAN}, r"lr must be positive and finite, got nan"),
        ({"lr": INF}, r"lr must be positive and finite, got inf"),
        ({"betas": (0.9, 1.5)}, r"betas must both be in \[0, 1\), got \(0.9, 1.5\); 0.9 and 0.999 are usual"),
        ({"betas": (0.9, 1.0)}, r"betas must both be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, r"betas must both be in \[0, 1\), got \(-0.1, 0.9\)"),
        ({"betas": (NAN, 0.9)}, r"betas must both be in \[0, 1\), got \(nan, 0.9\)"),
        ({"weight_decay": -0.1}, r"weight_decay must be at least 0 and finite, got -0.1; 0 has none"),
        ({"weight_decay": NAN}, r"weight_decay must be at least 0 and finite, got nan"),
        ({"weight_decay": INF}, r"weight_decay must be at least 0 and finite, got inf"),
        ({"grad_clip": 0.0}, r"grad_clip must be positive and finite, got 0.0; 1.0e9 never clips"),
        ({"grad_clip": -1.0}, r"grad_clip must be positive and finite, got -1.0"),
        ({"grad_clip": NAN}, r"grad_clip must be positive and finite, got nan"),
        ({"grad_clip": INF}, r"grad_clip must be positive and finite, got inf; 1.0e9 never clips"),
        ({"ema_decay": NAN}, r"ema_decay must be in \[0, 1\), got nan; 0 keeps the last weights"),
        ({"ema_decay": -0.5}, r"ema_decay must be in \[0, 1\), got -0.5"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"wrap_share": 1.5}, r"wrap_share must be in \[0, 1\], got 1.5"),
        ({"wrap_share": NAN}, r"wrap_share must be in \[0, 1\], got nan"),
        ({"short_share": -0.5}, r"short_share must be in \[0, 1\], got -0.5"),
        ({"held_out_share": 0.0}, r"held_out_share must be between 0 and 1, got 0.0"),
        ({"held_out_share": 1.0}, r"held_out_share must be between 0 and 1, got 1.0"),
        ({"held_out_share": NAN}, r"held_out_share must be between 0 and 1, got nan"),
        ({"decay": "linear"}, r"linear decay needs decay_steps in \[1, 12\], got 0; the rate falls over"),
        ({"decay": "linear", "decay_steps": 13}, r"linear decay needs decay_steps in \[1, 12\], got 13"),
        ({"decay_steps": 5}, r"constant decay needs decay_steps 0, got 5; set decay to linear or drop it"),
        ({"decay_steps": -5}, r"constant decay needs decay_steps 0, got -5"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(config, change, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        replace(config, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        (
            {"wrap_share": 1.0, "short_share": 0.0},
            {"model_length": 2},
            r"wrapped sequences need model.model_length of at least 3, a token between two end-of-texts, got 2;"
            r" raise it or set wrap_share to 0",
        ),
        (
            {"short_share": 0.1},
            {"model_length": 16},
            r"short_share needs model.model_length over 16, the shortest sequence, got 16; raise it or set",
        ),
        (
            {},
            {"vocab_size": 65_537},
            r"model.vocab_size must be at most 65536 to train here, .*, got 65537; use a smaller tokenizer",
        ),
    ],
)
def test_a_model_that_cannot_be_trained_so_is_refused(config, change, shape, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        replace(config, model=replace(config.model, **shape), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"betas": (0.0, 0.0)},
        {"weight_decay": 0.0},
        {"grad_clip": 1e9},
        {"ema_decay": 0.0},
        {"warmup_steps": 0},
        {"wrap_share": 0.0, "short_share": 0.0},
        {"wrap_share": 1.0, "short_share": 1.0},
        {"decay": "linear", "decay_steps": 12},
        {"seed": 2**64 - 1},
        {"validation_sequences": 1},
    ],
)
def test_what_lies_just_inside_the_rules_is_taken(config, change):
    replace(config, **change)


def test_every_number_among_the_settings_refuses_something(config):
    """A field that is added later is asked for its rule here."""
    for field in fields(TrainLMConfig):
        value = getattr(config, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            with pytest.raises(ConfigError, match=field.name):
                replace(config, **{field.name: type(value)(-7)})


def test_a_tokenizer_without_text_or_of_an_impossible_size_is_refused():
    with pytest.raises(ConfigError, match="files must name at least one text file"):
        TokenizerConfig(files=(), out=Path("out"))
    for size in (258, 65_537):
        with pytest.raises(ConfigError, match=rf"vocab_size must be in \(258, 65536\].*, got {size}"):
            TokenizerConfig(files=(Path("a.txt"),), out=Path("out"), vocab_size=size)
