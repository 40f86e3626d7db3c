"""One FVU everywhere: squared error over the variance of the rows it is measured on, in training as in evaluation."""

import json

import numpy as np
import pytest
import torch

from transcoder.batches import Batch
from transcoder.config import METRICS, TrainConfig
from transcoder.metrics import ReconstructionMetrics, fvu_of
from transcoder.run import train
from transcoder.trainer import Trainer
from transcoder.training_log import append_entry, fvu_text, read_log
from transcoder.training_loop import line_of
from transcoder.training_plots import plot_training


class Given:
    """The same rows in each step."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def batch(self, step, own=None):
        n_rows = self.x.shape[1]
        is_masked, t = torch.zeros(n_rows, dtype=torch.bool), torch.ones(n_rows, dtype=torch.float64)
        return Batch(np.arange(n_rows), self.x, self.y, is_masked=is_masked, t=t, where={})

    def cursor(self, step):
        return {}


@pytest.mark.parametrize("blocks", [None, (4, 1)])
@pytest.mark.parametrize("row_weights", ["equal", "subs"])
def test_a_step_s_figures_are_those_that_evaluation_has_for_its_rows(clt, rows, row_weights, blocks):
    """Bounded: float32 against float64. The rows vary less than the store, and about another mean."""
    from transcoder.scale_out import Layout, Processes

    x, y = rows
    y = y[:, :8] + 0.5 * y[:, 8:9]
    x = x[:, :8]
    metrics = ReconstructionMetrics(clt)
    metrics.update(x, y, torch.zeros(8, dtype=torch.bool))
    processes = None if blocks is None else Processes(Layout(blocks=blocks))
    config = TrainConfig(batch_size=8, row_weights=row_weights)
    step = Trainer(clt, Given(x, y), config, processes).step()
    for layer, expected in enumerate(metrics.layers()):
        assert step.fvu[layer] == pytest.approx(expected.fvu, rel=1e-5)
        assert step.nmse[layer] == pytest.approx(expected.nmse, rel=1e-5)
        assert abs(expected.fvu / expected.nmse - 1) > 0.1  # so that one is not the other


def test_rows_that_do_not_vary_have_no_fvu_and_the_run_goes_on(clt, rows, tmp_path):
    x, y = (tensor[:, :1].repeat(1, 4, 1) for tensor in rows)
    trainer = Trainer(clt, Given(x, y), TrainConfig(batch_size=4))
    step = trainer.step()
    assert step.fvu == [None, None, None]
    assert all(value > 0 for value in step.nmse)
    line = line_of(1, [step], trainer.config, 1.0)
    append_entry(tmp_path / METRICS, line)
    (read,) = read_log(tmp_path / METRICS)
    assert (read["fvu"], read["fvu_by_layer"]) == (None, [None] * 3)
    assert fvu_text(read) == "undefined"
    axes = plot_training([read, read]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["undefined"]


def test_a_line_has_the_mean_of_the_batches_that_have_an_fvu(clt, rows):
    x, y = (tensor[:, :8] for tensor in rows)
    step = Trainer(clt, Given(x, y), TrainConfig(batch_size=8)).step()
    even, odd = step._replace(fvu=[0.5, 1.0, 0.25]), step._replace(fvu=[None, 3.0, None])
    line = line_of(2, [even, odd], TrainConfig(), 1.0)
    assert line["fvu_by_layer"] == [0.5, 2.0, 0.25]
    assert line["fvu"] == 2.75 / 3


def test_the_mean_row_as_prediction_has_fvu_one():
    y = torch.randn(3, 50, 7, dtype=torch.float64) + 2.0
    mean = y.mean(1)
    square = (y - mean[:, None]).square().mean((1, 2))
    torch.testing.assert_close(
        fvu_of(square, y.square().mean((1, 2)), mean), torch.ones(3, dtype=torch.float64)
    )


def test_metrics_of_a_run_have_both_quantities_by_name(run_config):
    train(run_config)
    for line in map(json.loads, (run_config.out / METRICS).read_text().splitlines()):
        assert np.mean(line["fvu_by_layer"]) == pytest.approx(line["fvu"])
        assert np.mean(line["nmse_by_layer"]) == pytest.approx(line["nmse"])
