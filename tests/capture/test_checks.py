"""The sums of the residual stream hold bit for bit, and a pass in which they do not is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from capture import open_store, run_capture
from capture.checks import additions, check_additions
from capture.writer import stored
from mdlm_interp import HookedMDLM
from mdlm_interp.errors import StoreError
from mdlm_interp.hooks import HookPoint

STREAM = tuple(
    f"blocks.*.hook_{name}" for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
)


def test_the_sums_of_both_blocks_are_checked(config):
    model = HookedMDLM.from_pretrained(config.model)
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.zeros(2, 5, dtype=torch.int64), STREAM)
    found = additions(list(cache))
    assert len(found) == 4
    check_additions(cache)
    for total, left, right in found:
        for name in (total, left, right):
            wrong = dict(cache)
            wrong[name] = cache[name].clone()
            wrong[name][1, 2, 3] += 0.5
            with pytest.raises(StoreError, match=r"differs at \[1, 2, 3\]"):
                check_additions(wrong)


def change(monkeypatch, name, function):
    """Let a hook point give something else, to all that listen and to the model."""
    original = HookPoint.__call__
    monkeypatch.setattr(
        HookPoint,
        "__call__",
        lambda self, tensor: original(self, function(tensor) if self.name == name else tensor),
    )


def test_a_capture_looks_at_the_sums_though_it_records_none_of_them(config, monkeypatch):
    change(monkeypatch, "blocks.1.hook_resid_mid", lambda acts: acts + 1)
    with pytest.raises(StoreError, match=r"blocks\.1\.hook_resid_mid must be blocks\.1\.hook_resid_pre \+"):
        run_capture(replace(config, hooks=("blocks.1.mlp.hook_in",)))


def test_activations_too_large_for_float16_are_refused_and_nothing_is_committed(config, monkeypatch):
    change(monkeypatch, "hook_embed", lambda acts: acts * 1e7)
    with pytest.raises(
        StoreError,
        match=r"and float16 ends at 65504; capture with --dtype bfloat16 or float32 to another --out$",
    ):
        run_capture(replace(config, hooks=("hook_embed",), dtype="float16"))
    assert run_capture(
        replace(config, hooks=("hook_embed",), dtype="bfloat16", out=config.out + "2")
    ).complete


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_finite_value_beyond_the_type_is_refused_and_an_infinite_one_is_kept(dtype):
    """Exact: up to the value from which on rounding to nearest leaves the type."""
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    end = torch.finfo(kind).max
    step = end - float(torch.nextafter(torch.tensor(end, dtype=kind), torch.tensor(0.0, dtype=kind)))
    beyond = torch.tensor([1.0, -(end + step / 2)])
    below = torch.nextafter(beyond, torch.zeros(2))
    kept = torch.tensor([torch.inf, -torch.inf, torch.nan])
    raw = stored(torch.cat([below[1:], kept]), dtype, "hook_embed")
    found = torch.from_numpy(raw.view(np.int16)).view(kind)
    assert torch.equal(found.nan_to_num(7, posinf=8, neginf=9), torch.tensor([-end, 8, 9, 7], dtype=kind))
    wider = "bfloat16 or float32" if dtype == "float16" else "float32"
    with pytest.raises(StoreError) as caught:
        stored(beyond, dtype, "hook_embed")
    assert str(caught.value) == (
        f"hook_embed reaches {-float(beyond[1]):g} and {dtype} ends at {end:g}; capture with --dtype {wider} "
        f"to another --out"
    )


def test_activations_too_large_for_bfloat16_are_refused_and_nothing_is_committed(config, monkeypatch):
    change(monkeypatch, "hook_embed", lambda acts: torch.full_like(acts, 3.4e38))
    for dtype in ("bfloat16", "float16"):
        changed = replace(config, hooks=("hook_embed",), dtype=dtype, out=f"{config.out}-{dtype}")
        with pytest.raises(
            StoreError,
            match=r"reaches 3\.4e\+38 and .* ends at .*; capture with --dtype float32 to another --out$",
        ):
            run_capture(changed)
        assert len(open_store(changed.out)) == 0
    assert run_capture(replace(config, hooks=("hook_embed",))).complete


def test_infinite_and_undefined_activations_are_counted(config, monkeypatch):
    def broken(acts):
        values = acts.clone()
        values[0, 3, 4], values[0, 3, 5] = torch.inf, torch.nan
        return values

    change(monkeypatch, "hook_embed", broken)
    store = run_capture(replace(config, hooks=("hook_embed",)))
    # Two batches of 16 and 5 sequences.
    assert [shard.not_finite for shard in store.manifest.shards] == [4]
    assert store.read([3])["hook_embed"][0, 4] == torch.inf
