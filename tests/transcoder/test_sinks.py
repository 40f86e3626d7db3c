"""Metrics reach every sink that was asked for, and plots are drawn; a package that is missing is one line."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mdlm_interp.errors import ConfigError
from transcoder.config import METRICS
from transcoder.run import train
from transcoder.sinks import MetricSinks
from transcoder.trainer import Trainer
from transcoder.training_log import read_log
from transcoder.training_plots import draw_l0


def with_train(config, **changes):
    return replace(config, train=replace(config.train, **changes))


class Recorder:
    """Stands for a dashboard: keeps what it is told."""

    def __init__(self, *args, **settings):
        self.settings, self.scalars, self.closed = settings, [], []

    def add_scalar(self, name, value, step):
        self.scalars.append((step, name, value))

    def log(self, scalars, step):
        self.scalars += [(step, name, value) for name, value in scalars.items()]

    def close(self):
        self.closed.append("closed")

    def finish(self, exit_code):
        self.closed.append(exit_code)


@pytest.fixture
def dashboards(monkeypatch):
    """Both dashboards' packages, and the recorders that they made."""
    made: dict[str, list[Recorder]] = {"board": [], "wandb": []}

    def maker(kind):
        def make(*args, **settings):
            made[kind].append(Recorder(*args, **settings))
            return made[kind][-1]

        return make

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=maker("board")))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=maker("wandb")))
    return made


def test_every_number_of_every_line_reaches_both_dashboards(run_config, dashboards):
    train(with_train(run_config, tensorboard=True, wandb="clts"))
    (board,), (wandb,) = dashboards["board"], dashboards["wandb"]
    log = read_log(run_config.out / METRICS)
    expected = set()
    for entry in log:
        for name, value in entry.items():
            if isinstance(value, list):
                expected |= {(entry["step"], f"{name}/{layer}", item) for layer, item in enumerate(value)}
            elif name != "step":
                expected.add((entry["step"], name, value))
    assert set(board.scalars) == set(wandb.scalars) == expected
    assert len(log) == 4
    assert wandb.settings["project"] == "clts"
    assert (board.closed, wandb.closed) == (["closed"], [0])


def test_a_run_that_goes_on_purges_what_it_writes_again(run_config, dashboards, monkeypatch):
    config = with_train(run_config, tensorboard=True, wandb="clts")
    original = Trainer.step

    def step(self):
        if self.step_number == 7:
            raise KeyError("killed")
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyError, match="killed"):
            train(config)
    assert (dashboards["board"][0].closed, dashboards["wandb"][0].closed) == (["closed"], [1])
    train(config)
    assert [board.settings["purge_step"] for board in dashboards["board"]] == [None, 6]
    ids = [wandb.settings["id"] for wandb in dashboards["wandb"]]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("changes", "module", "extra"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard"),
        ({"wandb": "project"}, "wandb", "wandb"),
    ],
)
def test_a_dashboard_that_is_not_installed_is_one_line(
    run_config, tmp_path, monkeypatch, changes, module, extra
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError, match=rf"train.{extra} needs .*; pip install 'mdlm-interp\[{extra}\]', or leave"
    ):
        MetricSinks(tmp_path, with_train(run_config, **changes).train, 0)


def test_a_finished_run_has_its_plots(run_config):
    train(with_train(run_config, plots=True))
    for name in ("fvu.png", "density.png", "l0.png"):
        assert (run_config.out / name).read_bytes().startswith(b"\x89PNG")
    assert (run_config.out / "config.json").exists()


def test_the_l0_plot_has_a_line_for_each_layer_and_their_mean():
    log = [{"rows": 10 * step, "l0_by_layer": [step, step + 2.0]} for step in range(1, 4)]
    axes = draw_l0(log).axes[0]
    assert [line.get_label() for line in axes.lines] == ["layer 0", "layer 1", "mean"]
    assert np.asarray(axes.lines[1].get_ydata()).tolist() == [3.0, 4.0, 5.0]
    assert np.asarray(axes.lines[2].get_ydata()).tolist() == [2.0, 3.0, 4.0]
    assert np.asarray(axes.lines[2].get_xdata()).tolist() == [10, 20, 30]
