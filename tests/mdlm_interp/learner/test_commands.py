"""A learner's model directory in the commands that take an MDLM's."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdlm_interp import HookedMDLM
from mdlm_interp.__main__ import main
from mdlm_interp.learner import HookedLearner
from mdlm_interp.learner_config import LearnerConfig
from mdlm_interp.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("learner") / "model"
    config = LearnerConfig(
        vocab_size=4096, model_length=24, hidden_dim=16, n_blocks=1, n_heads=2, dropout=0.0
    )
    HookedLearner(config).save_pretrained(path)
    load_tokenizer("bundled").save(path)
    return path


def test_the_general_loader_knows_a_learner_by_its_config(directory):
    model = HookedMDLM.from_pretrained(directory)
    assert isinstance(model, HookedLearner)
    assert isinstance(HookedMDLM.from_pretrained("bundled"), HookedMDLM)
    assert not isinstance(HookedMDLM.from_pretrained("bundled"), HookedLearner)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["info", "{model}"], "mdlm-learner"),
        (["fill", "The old [MASK] sat.", "--model", "{model}"], "position"),
        (["sample", "--model", "{model}", "--steps", "4"], ""),
        (["ppl", "{text}", "--model", "{model}", "--max-sequences", "3"], "nats per token"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_takes_it(directory, capsys, arguments, expected):
    places = {"model": directory, "text": ROOT / "mdlm_interp" / "assets" / "demo.txt"}
    assert main([argument.format(**places) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.strip()
    assert expected in printed
