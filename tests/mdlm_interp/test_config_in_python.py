"""Configs that are made in Python are checked as those of a file are."""

from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capture import CaptureConfig
from capture.sampler_source import SamplerSource
from mdlm_interp import MDLMConfig
from mdlm_interp.config_fields import field_types, without_none
from mdlm_interp.decoding.choice import SamplerChoice
from mdlm_interp.errors import ConfigError
from mdlm_interp.learner_config import LearnerConfig
from mdlm_interp.training.config import TokenizerConfig, TrainLMConfig
from mdlm_interp.training.dllm import TrainDLLMConfig
from mdlm_interp.training.dllm_masks import MaskingConfig
from mdlm_interp.training.flowlm import TrainFlowLMConfig
from mdlm_interp.training.learner import TrainLearnerConfig
from transcoder.config import CLTRunConfig, InitConfig, TranscoderConfig
from transcoder.live_config import LiveConfig
from transcoder.train_config import TrainConfig

TEXT: dict[str, Any] = {"files": (Path("a.txt"),), "out": "run"}
RUN: dict[str, Any] = {"files": (Path("a.txt"),), "out": Path("run")}
CONFIGS: list[tuple[type[Any], dict[str, Any]]] = [
    (CaptureConfig, TEXT),
    (SamplerSource, {}),
    (SamplerChoice, {}),
    (MDLMConfig, {}),
    (LearnerConfig, {}),
    (TokenizerConfig, RUN),
    (TrainLMConfig, {**RUN, "tokenizer": Path("tokenizer"), "model": MDLMConfig()}),
    (TrainLearnerConfig, {**RUN, "tokenizer": Path("tokenizer"), "model": LearnerConfig()}),
    (TrainDLLMConfig, {**RUN, "encoder": "encoder"}),
    (TrainFlowLMConfig, {**RUN, "encoder": "encoder"}),
    (MaskingConfig, {}),
    (TranscoderConfig, {"n_layers": 2, "d_model": 8, "n_features": 16, "k": 2}),
    (CLTRunConfig, {"store": Path("run.zarr"), "out": Path("clt")}),
    (InitConfig, {}),
    (LiveConfig, {}),
    (TrainConfig, {}),
]


def made_with(config: Any, **changes: Any) -> Any:
    """A copy with other values, as a program without the tests' own checks of types would make it."""
    changed = copy(config)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    changed.__post_init__()
    return changed


@pytest.mark.parametrize(("cls", "needed"), CONFIGS, ids=lambda value: getattr(value, "__name__", ""))
def test_no_field_of_a_config_takes_a_value_of_another_type(cls: type[Any], needed: dict[str, Any]) -> None:
    made = cls(**needed)
    for field in fields(cls):
        with pytest.raises(ConfigError) as caught:
            made_with(made, **{field.name: object()})
        assert str(caught.value).startswith(f"{cls.__name__}: {field.name}: ")


@pytest.mark.parametrize(("cls", "needed"), CONFIGS, ids=lambda value: getattr(value, "__name__", ""))
def test_numbers_of_numpy_become_pythons(cls: type[Any], needed: dict[str, Any]) -> None:
    made = cls(**needed)
    kinds = {int: np.int64, float: np.float64}
    for name, annotation in field_types(cls).items():
        kind, value = without_none(annotation)[0], getattr(made, name)
        if kind in kinds and value is not None:
            again = getattr(made_with(made, **{name: kinds[kind](value)}), name)
            assert again == value
            assert type(again) is kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "maskd"}, "positions: 'maskd' is not a choice; did you mean 'masked'?"),
        (
            {"arithmetic": "Exact"},
            "arithmetic: 'Exact' is not a choice; did you mean 'exact'?",
        ),
        ({"times": "unifrom"}, "times: 'unifrom' is not a choice; did you mean 'uniform'?"),
        ({"dtype": "float64"}, "dtype: 'float64' is not a choice; did you mean 'float16'?"),
        ({"wrap": "no"}, "wrap: expected true or false, got 'no'"),
        ({"seed": 1.5}, "seed: expected int, got 1.5"),
        ({"max_sequences": 2.5}, "max_sequences: expected int or none, got 2.5"),
        ({"max_sequences": True}, "max_sequences: expected int or none, got True"),
        (
            {"files": "text.txt"},
            "files: expected list of path, got 'text.txt'; write ['text.txt']",
        ),
    ],
)
def test_what_would_record_something_else_is_refused(changes, message):
    """A misspelt choice fell through to the last of them, and the store could never be verified."""
    with pytest.raises(ConfigError) as caught:
        made_with(CaptureConfig(**TEXT), **changes)
    assert str(caught.value) == f"CaptureConfig: {message}"


def test_values_of_other_libraries_become_the_fields_own():
    given = made_with(
        CaptureConfig(**TEXT),
        seed=np.int64(3),
        hooks=["a", "b"],
        time=[np.float32(0.5), 1],
        times="fixed",
        out=Path("run.zarr"),
        sampler=None,
    )
    assert (given.seed, given.hooks, given.time, given.out) == (3, ("a", "b"), (0.5, 1.0), "run.zarr")
    assert [type(value) for value in (given.seed, given.out, *given.time)] == [int, str, float, float]


def test_a_section_may_be_given_as_keys_and_values():
    without_text = made_with(CaptureConfig(**TEXT), files=(), sampler={"n": 3})
    assert without_text.sampler == SamplerSource(n=3)
    with pytest.raises(ConfigError, match=r"unknown key 'sampler\.m'; did you mean 'sampler\.n'"):
        made_with(CaptureConfig(**TEXT), files=(), sampler={"m": 3})
