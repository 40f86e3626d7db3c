"""Training: resuming gives the same bits, errors name their step and rows, and the loss falls."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from mdlm_interp.errors import CheckpointError, DataError, OutputExistsError
from transcoder import CrossLayerTranscoder, block_terms
from transcoder.batches import Batch, StoreBatches
from transcoder.checkpoint import load_clt
from transcoder.config import METRICS, TrainConfig
from transcoder.data import split_sequences
from transcoder.kernels import pre_activations
from transcoder.run import train
from transcoder.trainer import Trainer
from transcoder.training_log import read_log
from transcoder.training_state import load_training_state, training_states


def with_train(config, **changes):
    return replace(config, train=replace(config.train, **changes))


def same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def log_without_speed(path):
    return [{key: value for key, value in line.items() if key != "rows_per_s"} for line in read_log(path)]


@pytest.fixture
def stop_at(monkeypatch):
    """Make one step do something first; undone when called with None."""
    original = Trainer.step

    def install(step, action):
        def stepping(self):
            if self.step_number == step:
                action()
            return original(self)

        monkeypatch.setattr(Trainer, "step", original if step is None else stepping)

    return install


class KilledError(Exception):
    """Stands for a process that ends without warning."""


def kill():
    raise KilledError


@pytest.mark.parametrize("step", [3, 5, 7, 11])
def test_a_killed_run_that_is_resumed_has_the_bits_of_one_that_never_stopped(
    run_config, stop_at, tmp_path, step
):
    whole = train(run_config)
    stopped = replace(run_config, out=tmp_path / "stopped")
    stop_at(step, kill)
    with pytest.raises(KilledError):
        train(stopped)
    stop_at(None, None)
    resumed = train(stopped)
    assert same_weights(whole, resumed)
    assert log_without_speed(run_config.out / METRICS) == log_without_speed(stopped.out / METRICS)
    log = read_log(stopped.out / METRICS)
    assert [line["step"] for line in log] == [3, 6, 9, 12]
    assert all(line["dead"] > 0 for line in log)  # so that the auxiliary loss takes part
    assert all(line["auxk"] > 0 for line in log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_the_state_after_the_step_it_falls_in(run_config, stop_at, tmp_path, number):
    whole = train(run_config)
    stopped = replace(run_config, out=tmp_path / "stopped")
    before = signal.getsignal(number)
    stop_at(6, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    assert signal.getsignal(number) is before
    assert sorted(path.name for path in (stopped.out / "checkpoints").iterdir()) == [
        "run.json",
        "step-00000007",
    ]
    stop_at(None, None)
    assert same_weights(whole, train(stopped))


def test_the_check_of_equal_bits_can_fail(run_config, tmp_path):
    other = with_train(replace(run_config, out=tmp_path / "other"), seed=7)
    assert not same_weights(train(run_config), train(other))


def test_training_is_a_function_of_its_config(run_config, tmp_path):
    assert same_weights(train(run_config), train(replace(run_config, out=tmp_path / "again")))


def test_the_state_holds_all_that_the_next_step_depends_on(run_config, store, stop_at):
    stop_at(7, kill)
    with pytest.raises(KilledError):
        train(run_config)
    state = run_config.out / "checkpoints" / "step-00000005"
    assert sorted(path.name for path in state.iterdir()) == ["state.json", "tensors"]
    tensors, loop = load_training_state(state)
    names = ["W_enc", "b_enc", "b_dec", *(f"W_dec.{source}" for source in range(3))]
    buffers = ["in_mean", "in_scale", "out_mean", "out_scale"]
    moments = {f"adam.{kind}.{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in names}
    weights = {f"clt.{name}" for name in [*names, *buffers]}
    assert tensors.keys() == {"rows_since_active", "training_sequences"} | moments | weights
    assert float(tensors["adam.step.W_enc"]) == 5.0
    assert int(tensors["rows_since_active"].max()) <= 250
    assert loop["step"] == 5
    assert loop["schedules"] == {"lr": 5e-3, "sparsity": 0.0, "k": 2}
    assert loop["cursor"] == {"seed": 6, "epoch": 0, "step_of_epoch": 5, "steps_per_epoch": 15}
    assert loop["provenance"]["store"]["fingerprint"] == store.fingerprint()
    assert len(loop["provenance"]["normalisation_sha256"]) == 64
    assert loop["provenance"]["verification"]["rows"] == 48


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_the_newest_states_are_kept(run_config, stop_at, keep):
    config = with_train(run_config, checkpoint_every=2, keep_checkpoints=keep)
    stop_at(9, kill)
    with pytest.raises(KilledError):
        train(config)
    kept = [int(state.name.removeprefix("step-")) for state in training_states(config.out)]
    assert kept == [2, 4, 6, 8][-keep:]


def test_a_finished_run_is_a_transcoder_and_leaves_no_states(run_config):
    clt = train(run_config)
    assert same_weights(clt, load_clt(run_config.out))
    assert sorted(path.name for path in run_config.out.iterdir()) == [
        "clt.safetensors", "config.json", "metrics.jsonl", "training_sequences.safetensors"
    ]  # fmt: skip
    with pytest.raises(OutputExistsError, match="holds a finished transcoder; choose another out directory"):
        train(run_config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-3}, r"was trained with train.lr = 0.005, the run asks for 0.001; restore the setting"),
        ({"steps": 13}, r"was trained with train.steps = 12, the run asks for 13"),
    ],
)
def test_a_stopped_run_does_not_continue_with_other_settings(run_config, stop_at, changes, message):
    stop_at(7, kill)
    with pytest.raises(KilledError):
        train(run_config)
    with pytest.raises(CheckpointError, match=message):
        train(with_train(run_config, **changes))


def test_a_stopped_run_does_not_continue_on_another_store(run_config, stop_at, reopened, monkeypatch):
    stop_at(7, kill)
    with pytest.raises(KilledError):
        train(run_config)
    fingerprint = reopened.fingerprint()[:12]
    monkeypatch.setattr(reopened, "fingerprint", lambda: "0" * 64)
    message = rf"trained on another store than this one \(fingerprint {fingerprint}, this one has 000000000000\); give"
    with pytest.raises(CheckpointError, match=message):
        train(run_config, store=reopened)


def test_a_damaged_state_is_one_line(run_config, stop_at):
    stop_at(7, kill)
    with pytest.raises(KilledError):
        train(run_config)
    state = run_config.out / "checkpoints" / "step-00000005"
    whole = (state / "state.json").read_text()
    for key in ("provenance", "tensors_sha256"):
        kept = {name: value for name, value in json.loads(whole).items() if name != key}
        (state / "state.json").write_text(json.dumps(kept))
        with pytest.raises(
            CheckpointError, match=rf"step-00000005 is damaged \(KeyError: '{key}'\); restore"
        ):
            train(run_config)
    (state / "state.json").write_text(whole)
    files = sorted((state / "tensors").iterdir())
    assert {file.suffix for file in files} == {".safetensors"}  # nothing that could run on reading
    content = files[-1].read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    for damaged in (content[: len(content) // 2], b"", flipped):
        files[-1].write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=r"step-00000005 is damaged \(ValueError: tensors/shard-.* is not the file"
        ):
            train(run_config)
    files[-1].unlink()
    with pytest.raises(CheckpointError, match=r"step-00000005 is damaged \(ValueError: tensors/shard-"):
        train(run_config)


def test_rows_that_are_not_finite_are_an_error_that_names_step_and_rows(run_config, reopened, monkeypatch):
    read, poisoned = reopened.read, []

    def poison(rows, hooks=None):
        found = read(rows, hooks)
        numbers = range(*rows.indices(len(reopened))) if isinstance(rows, slice) else rows
        for index, row in enumerate(numbers):
            if row in poisoned:
                found["blocks.1.mlp.hook_in"][index, 3] = torch.nan
        return found

    monkeypatch.setattr(reopened, "read", poison)
    train(run_config)  # nothing is poisoned yet
    batches = [json.loads(line)["step"] for line in (run_config.out / METRICS).read_text().splitlines()]
    assert batches[-1] == 12
    steps = rows_of_steps(run_config, reopened)
    poisoned += [int(steps[4][0]), int(steps[4][9])]
    again = with_train(replace(run_config, out=run_config.out / "again"), verify_sequences=None)
    with pytest.raises(DataError) as caught:
        train(again, store=reopened)
    listed = ", ".join(map(str, sorted(poisoned)))
    assert str(caught.value).startswith("the loss of step 4 is nan")
    assert f"the store's rows {listed} are not finite; capture them again" in str(caught.value)
    file = run_config.out / "again" / "checkpoints" / "failed-step-00000004.json"
    assert str(caught.value).endswith(f"; {file} has the batch")
    record = json.loads(file.read_text())
    assert record["rows"] == steps[4].tolist()
    assert sorted(record["rows_not_finite"]) == sorted(poisoned)
    assert [store_row // 24 for store_row in record["rows"]] == record["seq"]
    assert (record["step"], record["cursor"]["step_of_epoch"], record["loss"]) == (4, 4, "nan")
    assert record["parameters_not_finite"] == []


def rows_of_steps(config, store):
    """The rows of each step, from the order of batches alone."""
    split = split_sequences(store.tokens()[0], config.held_out_fraction, config.train.seed)
    batches = StoreBatches(store, split.train, config.train, store.hooks[:1], store.hooks[1:2])
    return [batches.rows(step) for step in range(config.train.steps)]


def test_a_diverged_run_is_an_error_that_says_so(run_config):
    with pytest.raises(
        DataError, match=r"its rows .* are finite, so training diverged; lower lr or set grad_clip"
    ):
        train(with_train(run_config, lr=1e30))


def test_training_reconstructs_far_better_than_the_mean(trained_directory):
    log = read_log(trained_directory / METRICS)
    assert log[0]["fvu"] > 0.6
    assert log[-1]["fvu"] < 0.35
    assert log[-1]["l0"] == pytest.approx(8, abs=0.2)
    assert log[-1]["rows"] == 150 * 128


class Same:
    """The same rows at every step."""

    def __init__(self, rows):
        is_masked, t = torch.zeros(64, dtype=torch.bool), torch.ones(64, dtype=torch.float64)
        self.given = Batch(np.arange(64), rows[0], rows[1], is_masked=is_masked, t=t, where={})

    def batch(self, step, own=None):
        return self.given

    def cursor(self, step):
        return {}


def test_dead_counters_count_rows_since_a_feature_was_active(clt, rows):
    with torch.no_grad():
        clt.b_enc[1, 5] = -1e3
    trainer = Trainer(clt, Same(rows), TrainConfig(lr=1e-9, dead_after_tokens=128))
    metrics = [trainer.step() for _ in range(3)]
    active = (clt.encode(rows[0]) > 0).any(1)
    assert trainer.rows_since_active[1, 5] == 192
    assert torch.equal(trainer.rows_since_active == 0, active)
    assert [step.dead for step in metrics] == [0, 0, int((~active).sum())]


def test_a_step_encodes_its_rows_once_and_updates_all_parameters_in_one_fused_call(clt, rows, monkeypatch):
    encoded = []

    def counted(x, W_enc, b_enc):
        encoded.append(tuple(x.shape))
        return pre_activations(x, W_enc, b_enc)

    def refused(self, *_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(block_terms, "pre_activations", counted)
    for name in ("pre_acts", "all_pre_acts"):
        monkeypatch.setattr(CrossLayerTranscoder, name, refused)
    with torch.no_grad():
        clt.b_enc[1, 5] = -1e3
    config = TrainConfig(
        dead_after_tokens=64, auxk=5, sparsity="tanh", pre_act="zero", pre_act_on="dead", log_every=1
    )
    trainer = Trainer(clt, Same(rows), config)
    # From the second step on a feature is dead, and every term of the loss is there.
    assert [trainer.step().auxk > 0 for _ in range(3)] == [False, True, True]
    assert encoded == [tuple(rows[0].shape)] * 3
    assert trainer.optimiser.defaults["fused"] is True
