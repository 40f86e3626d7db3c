"""The proof before training: rows of the model pass with their figures, anything else is refused in one line."""

import hashlib
from dataclasses import replace

import pytest
import torch

from mdlm_interp import HookedMDLM
from mdlm_interp.errors import StoreError
from oracle import Oracle
from transcoder.checkpoint import load_clt
from transcoder.run import train
from transcoder.trainer import Trainer
from transcoder.training_state import latest_training_state, load_training_state
from transcoder.verified_targets import verified_targets

HOOKS = ["blocks.1.mlp.hook_in", "blocks.2.hook_mlp_out"]


def test_a_store_of_the_model_is_proved(store):
    proof = verified_targets(store, HOOKS, None, n_sequences=3, seed=1)
    assert (proof["rows"], proof["hooks"], len(proof["sequences"])) == (72, 2, 3)
    assert proof["weights_sha256"] == store.provenance["weights_sha256"]
    worst = proof["worst"]
    assert 0 <= worst["share_of_allowed"] < 0.5
    assert worst["difference"] == abs(worst["stored"] - worst["oracle"]) < 1e-4
    assert proof["largest_difference"] >= worst["difference"]
    assert proof["largest_ulp"] > 0
    read = store.read([worst["row"]], [worst["hook"]])[worst["hook"]][0]
    assert float(read[tuple(worst["at"])]) == worst["stored"]
    stored = hashlib.sha256()
    for number in proof["sequences"]:
        for hook in HOOKS:
            stored.update(store.read(range(number * 24, number * 24 + 24), [hook])[hook].numpy().tobytes())
    assert proof["stored_sha256"] == stored.hexdigest()


def test_the_oracles_hash_is_that_of_its_own_activations(store, model):
    proof = verified_targets(store, HOOKS, None, n_sequences=1, seed=1)
    (number,) = proof["sequences"]
    sigma = -torch.log1p(-(1 - 1e-3) * store.times()[number][None])
    _, cache = Oracle(model).run_with_cache(store.tokens()[1][number][None], HOOKS, timesteps=sigma)
    expected = hashlib.sha256(b"".join(cache[hook].numpy().tobytes() for hook in HOOKS)).hexdigest()
    assert proof["oracle_sha256"] == expected


def test_an_exact_store_is_the_oracle_to_the_bit_and_one_bit_off_is_refused(capture, monkeypatch):
    store = capture(arithmetic="exact")
    proof = verified_targets(store, HOOKS, None, n_sequences=2, seed=0)
    assert (proof["values_that_differ"], proof["largest_difference"], proof["largest_ulp"]) == (0, 0.0, 0)
    assert proof["stored_sha256"] == proof["oracle_sha256"]
    spoil(store, monkeypatch, lambda value: torch.nextafter(value, torch.tensor(torch.inf)))
    with pytest.raises(StoreError, match=r"and rounding explains a difference of 0\.0e"):
        verified_targets(store, HOOKS, None, n_sequences=2, seed=0)


def spoil(store, monkeypatch, change):
    """Change one value of every reading."""
    read = store.read

    def spoiled(rows, hooks=None):
        found = read(rows, hooks)
        found[HOOKS[1]][5, 7] = change(found[HOOKS[1]][5, 7])
        return found

    monkeypatch.setattr(store, "read", spoiled)


@pytest.mark.parametrize(
    "change", [lambda value: value + 1e-3, lambda value: -value, lambda value: value * torch.nan]
)
def test_a_row_that_is_not_the_models_is_refused(reopened, monkeypatch, change):
    spoil(reopened, monkeypatch, change)
    with pytest.raises(StoreError) as caught:
        verified_targets(reopened, HOOKS, None, n_sequences=1, seed=0)
    assert "blocks.2.hook_mlp_out of row" in str(caught.value)
    assert "at [7] is" in str(caught.value)
    assert "the oracle computes" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_other_weights_is_refused(store, model_directory, tmp_path):
    other = HookedMDLM.from_pretrained(model_directory)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        StoreError, match=r"captured from weights with sha256 \w{12}, those of .* have \w{12}; name"
    ):
        verified_targets(store, HOOKS, str(tmp_path / "other"), n_sequences=1, seed=0)


def test_a_model_that_is_gone_is_one_line_with_what_to_do(store, tmp_path):
    with pytest.raises(
        StoreError, match=r"cannot be recomputed: .* or train without this proof with --train.verify"
    ):
        verified_targets(store, HOOKS, str(tmp_path / "gone"), n_sequences=1, seed=0)


def test_the_proof_goes_with_the_states_and_the_transcoder(run_config, monkeypatch):
    original = Trainer.step

    def step(self):
        if self.step_number == 7:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(run_config)
    saved = latest_training_state(run_config.out)
    assert saved is not None
    proof = load_training_state(saved)[1]["provenance"]["verification"]
    assert proof["rows"] == 48
    monkeypatch.setattr("transcoder.sources.verified_targets", None)  # what is proved is not proved again
    train(run_config)
    assert load_clt(run_config.out).provenance["verification"] == proof


def test_without_it_the_transcoder_says_so(run_config):
    train(replace(run_config, train=replace(run_config.train, verify_sequences=None)))
    assert load_clt(run_config.out).provenance["verification"] is None
