"""The learner's hook points, and its way to disk, into commands and back."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdlm_interp import HookedMDLM
from mdlm_interp.decoding.sampler import sample, start_tokens
from mdlm_interp.decoding.settings import Sampler
from mdlm_interp.errors import CheckpointError, HookError, OutputExistsError
from mdlm_interp.evaluation import nelbo
from mdlm_interp.filling import fill_masks
from mdlm_interp.learner import HookedLearner, all_hook_names
from mdlm_interp.learner_config import LearnerConfig
from mdlm_interp.tokenizers import load_tokenizer

CONFIG = LearnerConfig(vocab_size=23, model_length=16, hidden_dim=16, n_blocks=2, n_heads=2, dropout=0.0)
SIGMA = torch.tensor([0.2, 1.7])


@pytest.fixture
def learner() -> HookedLearner:
    model = HookedLearner(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draws = 0.4 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + draws if "norm" in name else draws)
    return model.eval()


@pytest.fixture
def tokens() -> Tensor:
    drawn = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(1))
    drawn[:, 4] = CONFIG.mask_id
    return drawn


# Hook points


def test_every_hook_point_runs_in_the_order_of_the_names(learner, tokens):
    _, cache = learner.run_with_cache(tokens, timesteps=SIGMA)
    seen: list[str] = []

    def note(tensor: Tensor, hook: object) -> None:
        seen.append(hook.name)  # type: ignore[attr-defined]

    with learner.hooks({"*": note}, read_only=True):
        learner(tokens, SIGMA)
    assert seen == list(learner.hook_names) == list(cache)
    assert len(set(seen)) == len(seen) == 2 + 2 * 26 + 4


def test_a_network_without_time_has_no_hook_points_for_it(tokens):
    timeless = HookedLearner(replace(CONFIG, time_conditioning=False))
    _, cache = timeless.run_with_cache(tokens)
    assert list(cache) == list(timeless.hook_names) == all_hook_names(timeless.config)
    assert not any("film" in name or "cond" in name for name in cache)


@pytest.mark.parametrize("name", all_hook_names(CONFIG))
def test_an_edit_at_any_hook_point_reaches_the_logits_and_leaves_with_its_context(learner, tokens, name):
    before = learner(tokens, SIGMA)
    with learner.hooks({name: lambda tensor, hook: 1.5 * tensor + 0.1}):
        edited = learner(tokens, SIGMA)
    assert not torch.equal(edited, before)
    assert torch.equal(learner(tokens, SIGMA), before)


def test_looking_changes_nothing_but_the_attention_kernel(learner, tokens):
    """Exact without scores and pattern; with them the explicit kernel runs, bounded by float32 rounding."""
    plain = learner(tokens, SIGMA)
    quiet = [name for name in learner.hook_names if "scores" not in name and "pattern" not in name]
    assert torch.equal(learner.run_with_cache(tokens, quiet, timesteps=SIGMA)[0], plain)
    explicit, cache = learner.run_with_cache(tokens, timesteps=SIGMA)
    torch.testing.assert_close(explicit[..., :-1], plain[..., :-1], rtol=0, atol=2e-5)
    pattern = cache["attn.hook_pattern", 1]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))


def test_the_residual_stream_adds_up_and_names_mean_what_they_mean_in_an_mdlm(learner, tokens):
    logits, cache = learner.run_with_cache(tokens, timesteps=SIGMA)
    for i in range(2):
        pre, mid, post = (cache[f"hook_resid_{name}", i] for name in ("pre", "mid", "post"))
        assert torch.equal(mid, pre + cache["hook_attn_out", i])
        assert torch.equal(post, mid + cache["hook_mlp_out", i])
        read = cache["ln2.hook_normalized", i] * (1 + cache["film.hook_scale_mlp", i])
        assert torch.equal(cache["mlp.hook_in", i], read + cache["film.hook_shift_mlp", i])
        gate, value = cache["mlp.hook_pre", i], cache["mlp.hook_pre_linear", i]
        assert torch.equal(cache["mlp.hook_post", i], value * torch.nn.functional.silu(gate))
        normalized = pre * cache["ln1.hook_scale", i] * learner.blocks[i].norm1.weight
        assert torch.equal(cache["ln1.hook_normalized", i], normalized)
    assert torch.equal(cache["blocks.1.hook_resid_pre"], cache["blocks.0.hook_resid_post"])
    assert torch.equal(cache["hook_logits"], logits)
    assert cache["blocks.0.film.hook_shift_attn"].shape == (2, 1, 16)
    assert cache["hook_cond"].shape == (2, 16)
    assert cache["blocks.0.mlp.hook_post"].shape == (2, 9, 64)
    assert cache["blocks.0.attn.hook_q"].shape == (2, 9, 2, 8)


@pytest.mark.parametrize("time_conditioning", [True, False])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_pass_that_stops_at_a_block_caches_what_is_before_it(tokens, time_conditioning, stop):
    model = HookedLearner(replace(CONFIG, time_conditioning=time_conditioning)).eval()
    _, whole = model.run_with_cache(tokens, timesteps=SIGMA)
    stream, cache = model.run_with_cache(tokens, timesteps=SIGMA, stop_at_block=stop)
    assert torch.equal(
        stream, whole["hook_embed"] if stop == 0 else whole[f"blocks.{stop - 1}.hook_resid_post"]
    )
    expected = [name for name in whole if name in ("hook_embed", "hook_cond") or _block(name) < stop]
    assert list(cache) == expected
    with pytest.raises(HookError, match=rf"stop_at_block={stop} ends the pass before hook_logits; raise it"):
        model.run_with_cache(tokens, "hook_logits", timesteps=SIGMA, stop_at_block=stop)


def _block(name: str) -> float:
    return int(name.split(".")[1]) if name.startswith("blocks.") else math.inf


def test_a_copy_is_a_model_of_its_own(learner, tokens):
    twin = copy.deepcopy(learner)
    before = learner(tokens, SIGMA)
    with twin.hooks({"hook_embed": lambda tensor, hook: 0 * tensor}):
        assert torch.equal(learner(tokens, SIGMA), before)
        assert not torch.equal(twin(tokens, SIGMA), before)


# On disk


def test_a_saved_model_loads_with_the_same_bits(learner, tokens, tmp_path):
    learner.save_pretrained(tmp_path / "m")
    loaded = HookedLearner.from_pretrained(tmp_path / "m")
    assert loaded.config == CONFIG
    assert not loaded.training
    assert torch.equal(loaded(tokens, SIGMA), learner(tokens, SIGMA))
    stored = json.loads((tmp_path / "m" / "config.json").read_text())
    assert stored["model_type"] == "mdlm-learner"
    assert set(load_file(tmp_path / "m" / "model.safetensors")) == {
        name for name, _ in learner.named_parameters()
    }
    with pytest.raises(OutputExistsError, match="exists; save to another directory"):
        learner.save_pretrained(tmp_path / "m")
    half = HookedLearner.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert bool(half(tokens, SIGMA)[..., :-1].isfinite().all())


def test_how_weights_were_drawn_is_kept_and_models_saved_without_it_load(learner, tokens, tmp_path):
    """Exact: the field says nothing about the weights that are there."""
    HookedLearner(replace(CONFIG, init_std=None)).save_pretrained(tmp_path / "any")
    assert HookedLearner.from_pretrained(tmp_path / "any").config.init_std is None
    learner.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    stored = json.loads(path.read_text())
    assert stored.pop("init_std") == 0.02
    path.write_text(json.dumps(stored))
    assert torch.equal(HookedLearner.from_pretrained(tmp_path / "m")(tokens, SIGMA), learner(tokens, SIGMA))
    path.write_text(json.dumps({**stored, "init_std": "small"}))
    with pytest.raises(CheckpointError, match="init_std must be float, got 'small'"):
        HookedLearner.from_pretrained(tmp_path / "m")


def test_the_branches_factor_is_kept_and_models_saved_without_it_have_none(learner, tokens, tmp_path):
    """Exact: 1 is what networks did before there was a factor."""
    small = HookedLearner(replace(CONFIG, residual_multiplier=0.03))
    small.save_pretrained(tmp_path / "small")
    loaded = HookedLearner.from_pretrained(tmp_path / "small")
    assert torch.equal(loaded(tokens, SIGMA), small.eval()(tokens, SIGMA))
    learner.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    stored = json.loads(path.read_text())
    assert stored.pop("residual_multiplier") == 1.0
    path.write_text(json.dumps(stored))
    assert torch.equal(HookedLearner.from_pretrained(tmp_path / "m")(tokens, SIGMA), learner(tokens, SIGMA))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope": None}, r"lacks 'rope', which the network depends on"),
        ({"rope": "spiral"}, r"rope must be one of interleaved, half_split, got 'spiral'"),
        ({"n_heads": "2"}, r"n_heads must be int, got '2'"),
        ({"n_heads": 3}, r"hidden_dim must be n_heads times an even head width"),
        (
            {"model_type": "mdlm"},
            r"describes a 'mdlm' model, expected model_type 'mdlm-learner'; load an MDLM",
        ),
        ({"n_blocks": 3}, r"lacks \d+ of \d+ tensors, first 'blocks.2"),
        ({"n_blocks": 1}, r"holds 'blocks.1\.\S+', which this network does not have"),
        ({"vocab_size": 24}, r"embed.weight in \S+ has shape \(23, 16\), config.json implies \(24, 16\)"),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused(learner, tmp_path, change, message):
    learner.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stored = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in stored.items() if value is not None}))
    with pytest.raises(CheckpointError, match=message):
        HookedLearner.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_or_no_config_at_all_are_refused(learner, tmp_path):
    learner.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["norm_final.weight"] = torch.full((16,), math.nan)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm_final.weight in \S+ must be finite"):
        HookedLearner.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        HookedLearner.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json; is it a model directory"):
        HookedLearner.from_pretrained(tmp_path)


# In use


def test_filling_sampling_and_the_bound_take_a_learner_as_they_take_an_mdlm():
    tokenizer = load_tokenizer("bundled")
    model = HookedLearner(
        LearnerConfig(vocab_size=4096, model_length=24, hidden_dim=16, n_blocks=1, n_heads=2, dropout=0.0)
    ).eval()
    assert isinstance(model, HookedMDLM)
    result = fill_masks(model, tokenizer, "The old [MASK] sat by the [MASK].")
    assert len(result.masks) == 2
    assert "[MASK]" not in result.text
    ids = sample(model, start_tokens(model, 12, []), Sampler(), seed=0).final
    assert not bool((ids == tokenizer.mask_id).any())
    text = torch.tensor([tokenizer.encode("The old man sat by the river and looked at the hill. " * 3)[:24]])
    bound = nelbo(model, text, times_per_sequence=8)
    # Behavioural: fresh weights of deviation 0.02 predict next to nothing.
    assert bound.nats_per_token == pytest.approx(math.log(4095), rel=0.5)
