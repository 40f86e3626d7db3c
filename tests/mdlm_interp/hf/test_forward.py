"""What the transformers class computes and returns."""

# Axes: batch, pos, d_vocab, d_model

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers.modeling_outputs import MaskedLMOutput

from mdlm_interp.hf.configuration_mdlm import MDLMConfig as HFConfig
from mdlm_interp.hf.modeling_mdlm import MDLM
from tests.mdlm_interp.hf.samples import GOLDEN_NAMES, golden, golden_model, hooked


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_float64_logits_and_hidden_states_are_upstreams_within_1e_10(name):
    model, tensors = golden_model(name, torch.float64)
    with torch.no_grad():
        logits, hidden = model(tensors["in.input_ids"], tensors["in.timesteps"], output_hidden_states=True)
        # The same instance on a shorter input: a cached rotary table would be stale now.
        short = model(tensors["in.short_input_ids"], tensors["in.timesteps"])
    expected = [tensors["act64.embed"]]
    expected += [tensors[f"act64.resid_post.{i}"] for i in range(model.config.n_blocks)]
    assert len(hidden) == len(expected)
    pairs = [
        (logits, tensors["out.logits_fp64"]),
        (short, tensors["out.short_logits_fp64"]),
        *zip(hidden, expected, strict=True),
    ]
    worst = [(ours - theirs).abs().max().item() for ours, theirs in pairs]
    assert max(worst) <= 1e-10, worst


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_float32_logits_are_the_hooked_models_bit_for_bit(name):
    model, tensors = golden_model(name, torch.float32)
    reference = hooked(name)
    with torch.no_grad():
        logits, hidden = model(tensors["in.input_ids"], tensors["in.timesteps"], output_hidden_states=True)
        expected, cache = reference.run_with_cache(
            tensors["in.input_ids"], "blocks.*.hook_resid_post", timesteps=tensors["in.timesteps"]
        )
    assert torch.equal(logits, expected)
    for i, state in enumerate(hidden[1:]):
        assert torch.equal(state, cache[f"blocks.{i}.hook_resid_post"])
    # Five times upstream's own float32 error on these inputs.
    assert (logits - tensors["out.logits_fp64"]).abs().max() <= 5e-5


def test_return_types_for_every_choice_of_hidden_states_and_dict():
    model, tensors = golden_model("mdlm_tiny_a", torch.float32)
    ids = tensors["in.short_input_ids"]
    with torch.no_grad():
        bare = model(ids, output_hidden_states=False, return_dict=False)
        pair = model(ids, output_hidden_states=True, return_dict=False)
        plain = model(ids, output_hidden_states=False, return_dict=True)
        full = model(ids, output_hidden_states=True, return_dict=True)
    assert type(bare) is Tensor
    assert type(pair) is tuple
    assert len(pair) == 2
    assert type(pair[1]) is list
    assert [tuple(state.shape) for state in pair[1]] == [(*ids.shape, model.config.hidden_dim)] * 4
    assert isinstance(plain, MaskedLMOutput)
    assert isinstance(full, MaskedLMOutput)
    assert plain.hidden_states is None
    assert plain.loss is None
    assert full.loss is None
    assert full.hidden_states is not None
    assert len(full.hidden_states) == 4
    for logits in (pair[0], plain["logits"], full["logits"]):
        assert torch.equal(logits, bare)


def test_return_types_default_to_the_config():
    _, config = golden("mdlm_tiny_a")
    assert config.return_dict is False
    ids = torch.zeros(1, 3, dtype=torch.int64)
    assert type(MDLM(config)(ids)) is Tensor
    fields = config.to_dict()
    config = HFConfig(**{**fields, "return_dict": True, "output_hidden_states": True})
    output = MDLM(config)(ids)
    assert isinstance(output, MaskedLMOutput)
    assert output.hidden_states is not None


def test_timesteps_are_sigma_one_a_sequence_and_needed_only_by_a_conditioned_model():
    model, tensors = golden_model("mdlm_tiny_b", torch.float32)
    ids, sigma = tensors["in.input_ids"], tensors["in.timesteps"]
    with torch.no_grad():
        assert torch.equal(model(ids, sigma[:, None]), model(ids, sigma))
        with pytest.raises(ValueError, match=r"pass timesteps, that is sigma \(total noise\), not t"):
            model(ids)
        with pytest.raises(
            ValueError, match=r"timesteps must have shape \[3\], one sigma a sequence, got \[1\]"
        ):
            model(ids, sigma[:1])
        free, tensors = golden_model("mdlm_tiny_a", torch.float32)
        ids = tensors["in.input_ids"]
        assert torch.equal(free(ids, tensors["in.timesteps"]), free(ids))
