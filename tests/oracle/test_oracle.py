"""The Oracle: shared weights, hooks, and the bits of the witness at every hook point."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdlm_interp.errors import HookError
from oracle import ExactError, Oracle, golden
from tests.oracle.exact_reference import same_bits
from tests.test_imports import LIGHT, top_level_names_outside

ROOT = Path(__file__).parents[2]


def test_it_has_the_bits_of_the_witness_at_every_hook_point(synthetic, oracle, inputs, path):
    from oracle import witness_forward

    ids, sigma = inputs
    weights = {name: tensor.numpy() for name, tensor in synthetic.state_dict().items()}
    expected_logits, expected = witness_forward.forward(weights, synthetic.config, ids.numpy(), sigma.numpy())
    logits, cache = oracle.run_with_cache(ids, timesteps=sigma)
    assert list(cache) == list(expected)
    for name, tensor in cache.items():
        assert same_bits(tensor, torch.from_numpy(expected[name])), name
    assert same_bits(logits, torch.from_numpy(expected_logits))
    assert oracle.fingerprint(ids, timesteps=sigma) == witness_forward.fingerprint(expected, expected_logits)


def test_it_shares_the_weights_and_follows_them(inputs):
    ids, sigma = inputs
    model = golden.synthetic_model()
    oracle = Oracle(model)
    mine, theirs = dict(oracle.model.named_parameters()), dict(model.named_parameters())
    assert all(mine[name] is theirs[name] for name in theirs)
    before = oracle.logits(ids, sigma)
    with torch.no_grad():
        model.backbone.output_layer.linear.weight[3] *= 2.0
    after = oracle.logits(ids, sigma)
    assert not same_bits(after, before)
    assert same_bits(after, Oracle(copy.deepcopy(model)).logits(ids, sigma))
    # torch does not count writes through .data, yet the kept float64 copy must not be used.
    model.get_parameter("backbone.blocks.0.attn_qkv.weight").data[0, 0] += 1.0
    assert same_bits(oracle.logits(ids, sigma), Oracle(copy.deepcopy(model)).logits(ids, sigma))
    model.get_submodule("backbone.blocks.0.attn_out").weight = torch.nn.Parameter(torch.zeros(96, 96))
    assert same_bits(oracle.logits(ids, sigma), Oracle(copy.deepcopy(model)).logits(ids, sigma))


def test_hooks_edit_the_exact_pass_and_are_removed(oracle, synthetic, inputs):
    ids, sigma = inputs
    before = oracle.logits(ids, sigma)
    with oracle.hooks({"blocks.0.hook_mlp_out": lambda out, hook: torch.zeros_like(out)}):
        ablated = oracle.logits(ids, sigma)
    assert not same_bits(ablated, before)
    assert same_bits(oracle.logits(ids, sigma), before)
    assert all(not point.listeners for point in synthetic._registry.points.values())
    with pytest.raises(HookError, match="no hook point matches"):
        oracle.run_with_cache(ids, "blocks.9.*", timesteps=sigma)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_a_hook_leaves_at_the_logits_must_be_finite(bad, oracle, inputs):
    """No operation reads the last hook point, so the pass itself looks."""
    ids, sigma = inputs

    def spoil(logits, hook):
        logits[1, 2, 3] = bad

    message = r"is not finite at \[1, 2, 3\]"
    with oracle.hooks({"hook_logits": spoil}):
        for call in (oracle.fingerprint, oracle.digests, oracle.logits, oracle.run_with_cache):
            with pytest.raises(ExactError, match=message):
                call(ids, timesteps=sigma)
    with (
        oracle.hooks({"blocks.0.hook_resid_post": spoil}),
        pytest.raises(ExactError, match="what the hooks left of the output " + message),
    ):
        oracle.run_with_cache(ids, "hook_embed", timesteps=sigma, stop_at_block=1)


def test_the_names_of_the_issue_are_there_after_a_plain_import():
    code = (
        "import oracle\n"
        "assert callable(oracle.compare) and oracle.golden.load and oracle.fingerprint.tensor_digest\n"
        "assert oracle.ops.linear and {'golden', 'fingerprint', 'ops', 'compare'} <= set(dir(oracle))\n"
        "assert 'numba' not in __import__('sys').modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr


def test_it_computes_with_torch_numpy_and_safetensors_only():
    """Exact: the golden fingerprint where nothing else can be imported, numba included."""
    code = (
        "import json, sys\n"
        # None, not a finder that raises: torch asks whether some modules are there.
        "sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))\n"
        "import oracle\n"
        "model, (ids, sigma) = oracle.golden.synthetic_model(), oracle.golden.synthetic_inputs()\n"
        "print(oracle.Oracle(model).fingerprint(ids, timesteps=sigma))\n"
        "print(oracle.exact_sample(oracle.Oracle(model), ids[:1], steps=2).shape[1])\n"
        "import numba\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(top_level_names_outside(LIGHT))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert "import of numba halted" in result.stderr
    file = next(file for file in golden.packaged_goldens() if file.stem == "synthetic")
    assert result.stdout.split() == [golden.load(file)["fingerprint"], "24"]


def test_dropout_never_happens(inputs):
    ids, sigma = inputs
    model = golden.synthetic_model().train()
    assert same_bits(Oracle(model).logits(ids, sigma), Oracle(golden.synthetic_model()).logits(ids, sigma))
    assert model.training


def test_sigma_is_checked_as_in_the_native_pass(oracle, inputs):
    with pytest.raises(ValueError, match="this model is time-conditioned"):
        oracle.logits(inputs[0])


def test_autocast_does_not_reach_it(oracle, inputs):
    ids, sigma = inputs
    before = oracle.logits(ids, sigma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(oracle.logits(ids, sigma), before)


def test_lower_matmul_precision_does_not_reach_it(oracle, inputs):
    ids, sigma = inputs
    before, setting = oracle.logits(ids, sigma), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert same_bits(oracle.logits(ids, sigma), before)
    finally:
        torch.set_float32_matmul_precision(setting)


@pytest.mark.slow
def test_a_compiler_is_kept_out():
    """Exact: torch.compile around the model, and around a function that calls the operations, changes no bit."""
    code = (
        "import torch\n"
        "from oracle import Oracle, golden, ops\n"
        "torch.set_num_threads(1)\n"
        "oracle, (ids, sigma) = Oracle(golden.synthetic_model()), golden.synthetic_inputs()\n"
        "before = oracle.logits(ids, sigma)\n"
        "x = torch.linspace(-3, 3, 1001)\n"
        "gelu = ops.gelu_tanh(x)\n"
        "compiled = torch.compile(lambda x: ops.gelu_tanh(x * 1.0) + 0.0)\n"
        "assert torch.equal(compiled(x), gelu)\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(torch.compile(oracle.model)(ids, sigma), before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr


def test_it_works_in_inference_mode_and_under_other_defaults(oracle, inputs, path):
    ids, sigma = inputs
    before = oracle.logits(ids, sigma)
    with torch.inference_mode():
        assert same_bits(oracle.logits(ids, sigma), before)
        _, cache = oracle.run_with_cache(ids, timesteps=sigma)
    assert same_bits(oracle.logits(ids, sigma), before)
    torch.set_default_dtype(torch.float64)
    try:
        assert same_bits(oracle.logits(ids, sigma), before)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in cache.values())


def test_a_copy_of_a_model_on_exact_arithmetic_starts_with_nothing_kept(oracle, inputs):
    ids, sigma = inputs
    before = oracle.logits(ids, sigma)
    assert oracle.model.arithmetic.cache.used_bytes > 0
    copied = copy.deepcopy(oracle.model)
    assert copied.arithmetic.cache.used_bytes == 0
    with torch.no_grad():
        assert same_bits(copied(ids, sigma), before)
