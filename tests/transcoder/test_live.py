"""Rows from the running model: batches are a function of (seed, step), the rows are the model's, resume is exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.errors import ConfigError, DataError
from transcoder import evaluate
from transcoder.checkpoint import load_clt
from transcoder.config import CLTRunConfig, LiveConfig
from transcoder.live_source import LiveSource
from transcoder.run import train
from transcoder.trainer import Trainer


@pytest.fixture
def live(run_config, text, model_directory):
    """The run of the fixture with live rows: windows of six sequences of 24 tokens, passes of four."""
    rows = LiveConfig(
        files=(text,),
        length=24,
        max_sequences=40,
        window_sequences=6,
        batch_sequences=4,
        statistics_sequences=20,
    )
    return replace(run_config, store=None, live=rows, model=str(model_directory))


def made(config):
    source = LiveSource(config)
    return source, source.batches(config.shape(*source.dimensions))


def test_a_batch_is_a_pure_function_of_config_and_step(live):
    _, walked = made(live)
    visited = [walked.batch(step) for step in range(25)]
    for step in (24, 3, 11, 0):
        batch = made(live)[1].batch(step)
        assert torch.equal(batch.x, visited[step].x)
        assert torch.equal(batch.y, visited[step].y)
        assert np.array_equal(batch.rows, visited[step].rows)
    other = made(replace(live, train=replace(live.train, seed=7)))[1].batch(0)
    assert not np.array_equal(other.rows, visited[0].rows)


def test_rows_are_what_the_model_computes_on_the_sequence_they_are_of(live, model):
    source, batches = made(live)
    x_0 = source.x_0
    for step in (0, 13):
        batch = batches.batch(step)
        assert torch.equal(
            x_0[batch.where["seq"].long(), batch.where["pos"].long()], batch.where["x0"].long()
        )
        assert torch.equal(batch.is_masked, batch.where["xt"].long() == model.config.mask_id)
        # All rows of the first row's sequence in this window: its noised tokens are told by the window's rows.
        window, _ = batches._window(*batches._place(step)[:2])
        chosen = (window.where["seq"] == batch.where["seq"][0]).nonzero()[:, 0]
        sigma = LogLinearSchedule().sigma(window.t[chosen[:1]])
        names = [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
        _, cache = model.run_with_cache(window.where["xt"][chosen].long()[None], names, timesteps=sigma)
        for layer, name in enumerate(names):
            # Native rounding between passes of four sequences and of one.
            torch.testing.assert_close(cache[name][0], window.y[layer, chosen], rtol=0, atol=1e-4)


def test_an_epoch_has_each_training_row_at_most_once_and_noise_is_new_in_the_next(live):
    source, batches = made(live)
    steps = sum(batches._steps(0))
    assert steps == 5 * (6 * 24 // 50) + 2 * 24 // 50
    first = [batches.batch(step) for step in range(steps)]
    rows = np.concatenate([batch.rows for batch in first])
    assert len(np.unique(rows)) == len(rows)
    assert set(rows // 24) <= set(source.split.train.tolist())
    later = batches.batch(steps)
    assert batches.cursor(steps) == {"epoch": 1, "window": 0, "batch_of_window": 0}
    times = {
        int(seq): float(t) for batch in first for seq, t in zip(batch.where["seq"], batch.t, strict=True)
    }
    again = [
        float(t)
        for seq, t in zip(later.where["seq"], later.t, strict=True)
        if times.get(int(seq)) == float(t)
    ]
    assert again == []


@pytest.mark.parametrize(("select", "value"), [("masked", True), ("unmasked", False)])
def test_only_the_selected_rows_are_used(live, select, value):
    config = replace(live, train=replace(live.train, select=select, batch_size=20))
    source, batches = made(config)
    assert {bool(flag) for step in range(8) for flag in batches.batch(step).is_masked} == {value}
    held_out = source.held_out(config.shape(*source.dimensions))
    assert {bool(flag) for batch in held_out for flag in batch.is_masked} == {value}
    numbers = {int(seq) for batch in held_out for seq in batch.where["seq"]}
    assert numbers <= set(source.split.held_out.tolist())


def test_a_run_that_is_killed_goes_on_to_the_same_bits_and_is_proved(live, tmp_path, monkeypatch):
    whole = train(live)
    original = Trainer.step

    def step(self):
        if self.step_number == 8:
            raise KeyError("killed")
        return original(self)

    stopped = replace(live, out=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyError, match="killed"):
            train(stopped)
    resumed = train(stopped)
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_clt(live.out).provenance["verification"]["rows"] == 48


def test_a_transcoder_of_live_rows_is_evaluated_like_any_other(live, model, store):
    clt = train(replace(live, activation="batchtopk", k=4))
    evaluation = evaluate(model, clt, store, max_sequences=2)
    # The same text, cut alike: what it was trained on is told apart from the rest.
    assert evaluation.n_excluded == 35
    assert evaluation.n_sequences == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"t_bins": 5},
            "t_bins must be none for rows from the running model, whose times are evenly spread, got 5",
        ),
        (
            {"batch_size": 1000},
            "no window of 6 sequences has 1000 rows, one batch; raise live.window_sequences",
        ),
    ],
)
def test_what_live_rows_cannot_do_is_one_line(live, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        train(replace(live, train=replace(live.train, **changes)))


def test_a_run_needs_exactly_one_source(live, store, tmp_path):
    with pytest.raises(
        ConfigError, match=r"needs a store or live\.files to train on, got neither; give one of them"
    ):
        CLTRunConfig(out=tmp_path)
    with pytest.raises(
        ConfigError, match=r"needs a store or live\.files to train on, got both; give one of them"
    ):
        replace(live, store=store.path)
