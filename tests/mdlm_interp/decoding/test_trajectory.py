"""What a trajectory records, and how it comes back from disk."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdlm_interp.decoding import (
    Ancestral,
    Even,
    Fixed,
    Record,
    ReMDM,
    Sampler,
    Seen,
    Trajectory,
    sample,
    start_tokens,
)
from mdlm_interp.errors import DataError, OutputExistsError


@pytest.fixture
def trajectory(model) -> Trajectory:
    start = start_tokens(model, 8, [3], n=2)
    record = Record(hooks=("blocks.*.hook_resid_post", "hook_embed"), steps=(0, 2), alternatives=3)
    return sample(model, start, Sampler(schedule=Even(steps=4)), seed=1, indices=[4, 9], record=record)


def test_confidence_and_entropy_are_the_models_at_each_state(model, trajectory):
    """Bounded by rounding: against a pass on each state, where a token could be written; NaN elsewhere."""
    from mdlm_interp.decoding import predict

    for step in range(4):
        law = predict(model, trajectory.states[step])
        masks = trajectory.states[step] == model.config.mask_id
        entropy = -torch.xlogy(law, law).sum(-1)
        torch.testing.assert_close(trajectory.entropy[step][masks], entropy[masks])
        assert bool(trajectory.entropy[step][~masks].isnan().all())
        assert bool(trajectory.confidence[step][~masks].isnan().all())
        top = law.topk(3, -1)
        assert torch.equal(trajectory.top_tokens[step][masks], top.indices[masks])
        torch.testing.assert_close(trajectory.top_probabilities[step][masks], top.values[masks])
        assert bool((trajectory.top_tokens[step][~masks] == -1).all())
        new = masks & (trajectory.states[step + 1] != model.config.mask_id)
        assert torch.equal(new, trajectory.revealed_at == step)
        chance = law.gather(-1, trajectory.final[..., None])[..., 0]
        torch.testing.assert_close(trajectory.commit_confidence[new], chance[new])
    assert trajectory.t.tolist() == [[(8 - revealed) / 8] * 2 for revealed in (1, 3, 5, 7)]
    assert bool(trajectory.commit_confidence[:, 0].isnan().all())


@pytest.mark.parametrize("per_step", [1, 3])
def test_reveal_ranks_count_what_was_written_before(model, per_step):
    """Exact: against counting one by one; the given token has none, and tokens of one step share theirs."""
    found = sample(
        model, start_tokens(model, 8, [3], n=2), Sampler(schedule=Fixed(per_step=per_step)), seed=1
    )
    at = found.revealed_at.tolist()
    expected = [[sum(0 <= b < a for b in row) if a >= 0 else -1 for a in row] for row in at]
    assert found.reveal_rank.tolist() == expected
    assert found.reveal_rank[:, 0].tolist() == [-1, -1]
    assert sorted(expected[0])[1:] == [n // per_step * per_step for n in range(7)]


def test_activations_are_those_of_a_pass_on_the_state(model, trajectory):
    from mdlm_interp.diffusion import LogLinearSchedule

    assert trajectory.activation_steps == (0, 2)
    assert set(trajectory.activations) == {
        "hook_embed",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
    }
    for kept, step in enumerate((0, 2)):
        share = (trajectory.states[step] == model.config.mask_id).double().mean(1)
        sigma = LogLinearSchedule().sigma(share).float()
        with torch.no_grad():
            _, cache = model.run_with_cache(
                trajectory.states[step], list(trajectory.activations), timesteps=sigma
            )
        for name, found in trajectory.activations.items():
            assert torch.equal(found[kept], cache[name])


def test_a_watcher_is_told_each_step_and_may_be_the_only_one_with_activations(model, trajectory):
    """Exact: the same states and activations one step at a time, and none of them kept."""
    seen: list[Seen] = []
    start = start_tokens(model, 8, [3], n=2)
    record = Record(hooks=("hook_embed",), steps=(0, 2), keep=False, alternatives=3)
    sampler = Sampler(schedule=Even(steps=4))
    found = sample(model, start, sampler, seed=1, indices=[4, 9], record=record, watch=seen.append)
    assert (found.activations, found.activation_steps) == ({}, ())
    assert [one.number for one in seen] == [0, 1, 2, 3]
    for step, one in enumerate(seen):
        assert torch.equal(one.before, trajectory.states[step])
        assert torch.equal(one.after, trajectory.states[step + 1])
        assert torch.equal(one.written, trajectory.revealed_at == step)
        assert torch.equal(one.top_tokens, trajectory.top_tokens[step])
    assert [list(one.activations) for one in seen] == [["hook_embed"], [], ["hook_embed"], []]
    assert torch.equal(seen[2].activations["hook_embed"], trajectory.activations["hook_embed"][1])


def test_a_remasked_token_is_revealed_when_it_came_last(chain):
    sampler = Sampler(schedule=ReMDM(grid=Ancestral(steps=20), strategy="cap", eta=0.3))
    found = sample(chain, chain.masks(30), sampler, seed=1)
    masks = found.states == chain.mask_id
    for row in range(30):
        for position in range(chain.length):
            steps = [
                step
                for step in range(found.n_steps)
                if masks[step, row, position] and not masks[step + 1, row, position]
            ]
            assert int(found.revealed_at[row, position]) == steps[-1]
    assert int((masks.diff(dim=0) & masks[1:]).sum()) > 10


def test_it_comes_back_from_disk_as_it_was(trajectory, tmp_path):
    """Exact, settings included; both files are as readable as any."""
    trajectory.save(tmp_path / "run")
    loaded = Trajectory.load(tmp_path / "run")
    for name, value in vars(trajectory).items():
        found = getattr(loaded, name)
        if name == "activations":
            assert found.keys() == value.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in value.items())
        elif isinstance(value, torch.Tensor):
            assert found.dtype == value.dtype
            assert torch.equal(found.nan_to_num(nan=-7.0), value.nan_to_num(nan=-7.0))
        else:
            assert found == value
    modes = {file.stat().st_mode for file in (tmp_path / "run").iterdir()}
    assert len(modes) == 1
    assert loaded.sampler["schedule"] == {"kind": "Even", "steps": 4, "rounding": "up"}


def test_an_empty_one_comes_back_too(chain, tmp_path):
    sample(chain, torch.tensor([[0, 1, 2, 0]]), Sampler(schedule=Fixed(), order=(0, 1))).save(
        tmp_path / "run"
    )
    loaded = Trajectory.load(tmp_path / "run")
    assert loaded.n_steps == 0
    assert loaded.sampler["order"] == [0, 1]


def test_nothing_is_overwritten(trajectory, tmp_path):
    trajectory.save(tmp_path / "run")
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        trajectory.save(tmp_path / "run")


def changed(directory, **values):
    """Rewrite the settings with other values; None removes a key."""
    path = directory / "trajectory.json"
    settings = {**json.loads(path.read_text("utf-8")), **values}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}), "utf-8")


def flip(directory):
    path = directory / "trajectory.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "another byte": (flip, "its SHA-256 differs"),
    "no tensors": (lambda d: (d / "trajectory.safetensors").unlink(), "has no trajectory.safetensors"),
    "no settings": (
        lambda d: (d / "trajectory.json").unlink(),
        "has no trajectory.json; is it a trajectory?",
    ),
    "no json": (lambda d: (d / "trajectory.json").write_text("{"), "is not valid JSON"),
    "another format": (lambda d: changed(d, format="x"), "its format is not 'mdlm-interp trajectory'"),
    "another version": (lambda d: changed(d, version=2), "has version 2, this program reads 1"),
    "a key too few": (lambda d: changed(d, seed=None), "seed must be int, got None"),
    "another type": (lambda d: changed(d, indices=["a"]), "indices must hold whole numbers, got"),
    "other shapes": (lambda d: changed(d, shapes={}), "describes other tensors"),
    "other sequences": (lambda d: changed(d, indices=[1]), "has as many indices, got 1"),
    "other steps": (lambda d: changed(d, activation_steps=[1]), "has 2 steps, activation_steps 1"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told_in_one_line(trajectory, tmp_path, what):
    trajectory.save(tmp_path / "run")
    damage, message = DAMAGE[what]
    damage(tmp_path / "run")
    with pytest.raises(DataError, match=message) as caught:
        Trajectory.load(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_tensors_that_contradict_each_other_are_refused(trajectory, tmp_path):
    from mdlm_interp.decoding.trajectory import _sha256

    trajectory.save(tmp_path / "run")
    file = tmp_path / "run" / "trajectory.safetensors"
    tensors = load_file(file)

    def refused(name, value) -> str:
        save_file({**tensors, name: value}, file)
        changed(tmp_path / "run", sha256=_sha256(file))
        with pytest.raises(DataError) as caught:
            Trajectory.load(tmp_path / "run")
        return str(caught.value)

    late = tensors["revealed_at"].clone()
    late[0, 3] = 4
    assert "revealed after the last step, 3" in refused("revealed_at", late)
    states = tensors["states"].clone()
    states[-1, 1, 0] = 5
    assert "sequence 1 changes at position 0, which no step wrote" in refused("states", states)
    save_file({key: value for key, value in tensors.items() if key != "t"}, file)
    shapes = json.loads((tmp_path / "run" / "trajectory.json").read_text("utf-8"))["shapes"]
    changed(tmp_path / "run", sha256=_sha256(file), shapes={k: v for k, v in shapes.items() if k != "t"})
    with pytest.raises(DataError, match="lacks 't'"):
        Trajectory.load(tmp_path / "run")


def test_shapes_that_do_not_fit_are_refused(trajectory, unchecked):
    with pytest.raises(
        DataError, match=r"a trajectory's t has shape \[4, 2\] beside its states, got \[3, 2\]"
    ):
        dataclasses.replace(trajectory, t=trajectory.t[1:])
