"""What a store was begun with: each part of it is compared before a capture goes on."""

from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from capture import forecast_capture, open_store, run_capture
from capture.checked_files import check_begun
from capture.forward import Forward
from capture.native import native_bits
from capture.provenance import provenance
from capture.recomputed import verify_rows
from capture.run import dry_run
from mdlm_interp import HookedMDLM
from mdlm_interp.errors import ConfigError, OutputExistsError, StoreError
from mdlm_interp.tokenizers import load_tokenizer
from tests.capture.interrupts import interrupted_capture

CHANGES: dict[str, Any] = {
    "weights_sha256": "f" * 64,
    "tokenizer_sha256": "f" * 64,
    "sources": [],
    "packing": None,
    "schedule": {"name": "cosine"},
    "device": "NVIDIA H200",
    "threads": 97,
    "cpu": {"machine": "aarch64", "capability": "DEFAULT"},
    "versions.torch": "2.0.0",
    "versions.numpy": "1.0.0",
    "native_bits": "0" * 64,
}
ROUNDING = ("device", "threads", "cpu", "versions.torch", "versions.numpy", "native_bits")


def with_change(monkeypatch, key):
    """The provenance of the next capture differs in one entry."""

    def changed(**given):
        record = deepcopy(provenance(**given))
        top, _, rest = key.partition(".")
        if rest:
            record[top][rest] = CHANGES[key]
        else:
            record[top] = CHANGES[key]
        return record

    monkeypatch.setattr("capture.run.provenance", changed)


@pytest.mark.parametrize("key", CHANGES)
def test_a_capture_does_not_go_on_with_anything_else(begun, monkeypatch, key):
    rows = len(open_store(begun.out))
    with monkeypatch.context() as patch:
        with_change(patch, key)
        with pytest.raises(OutputExistsError, match=f"was begun with {key} "):
            run_capture(begun)
    assert len(open_store(begun.out)) == rows
    assert run_capture(begun).complete


@pytest.mark.parametrize("key", [key for key in CHANGES if key not in ROUNDING])
def test_a_complete_store_is_not_taken_for_that_of_another_request(config, monkeypatch, key):
    run_capture(config)
    with_change(monkeypatch, key)
    with pytest.raises(OutputExistsError, match=f"was begun with {key} "):
        run_capture(config)


@pytest.mark.parametrize("key", ROUNDING)
def test_what_only_rounds_otherwise_may_find_a_complete_store(config, monkeypatch, key):
    run_capture(config)
    with_change(monkeypatch, key)
    assert run_capture(config).complete


@pytest.mark.parametrize("key", ROUNDING)
def test_exact_rows_go_on_anywhere(config, small_shards, monkeypatch, key):
    exact = replace(config, arithmetic="exact", batch_size=4, max_sequences=12)
    interrupted_capture(exact, monkeypatch, 3)
    with_change(monkeypatch, key)
    assert run_capture(exact).complete


def test_other_weights_are_refused(begun):
    words = load_tokenizer(begun.model)
    model = HookedMDLM.from_pretrained(begun.model)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    model.save_pretrained(begun.model + ".other")
    words.save(begun.model + ".other")
    with pytest.raises(OutputExistsError, match="was begun with "):
        run_capture(replace(begun, model=begun.model + ".other"))


def test_verification_asks_for_bits_only_where_native_arithmetic_gives_the_same(config, monkeypatch):
    store = run_capture(config)
    assert verify_rows(store, None, batches=2).bitwise
    monkeypatch.setattr("capture.provenance.native_bits", lambda *_: "another machine's")
    assert not verify_rows(store, None, batches=2).bitwise


def test_the_probe_sees_last_bits_and_gives_the_threads_back(model_directory):
    model = HookedMDLM.from_pretrained(model_directory)
    before = torch.get_num_threads()
    whole = native_bits(model, 32, before + 1)
    assert whole == native_bits(model, 32, before + 1)
    assert torch.get_num_threads() == before
    weight = dict(model.named_parameters())["backbone.blocks.1.mlp.2.weight"]
    with torch.no_grad():
        weight.copy_(torch.nextafter(weight, weight.new_tensor(9.0)))
    assert native_bits(model, 32, before + 1) != whole


def test_factors_that_torch_was_told_to_round_are_refused(config, monkeypatch):
    store = run_capture(replace(config, out=config.out + ".before"))

    def rounding(left, right):
        return torch.mm(left.bfloat16(), right.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    for call in (run_capture, partial(forecast_capture, timed=True)):
        with pytest.raises(
            ConfigError, match=r"on cpu; call torch\.set_float32_matmul_precision\('highest'\)"
        ):
            call(config)
    with pytest.raises(ConfigError, match="told to round their factors"):
        verify_rows(store, None, batches=1)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_products_with_another_setting_are_no_damage(config, setting):
    store = run_capture(config)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        # On a processor that rounds factors then, the setting is refused.
        with suppress(ConfigError):
            verify_rows(store, None, batches=2)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["zarr.json", "rows/pos/zarr.json", "pending/0.safetensors"])
def test_what_is_damaged_of_a_begun_store_is_told_before_any_row_is_made(begun, monkeypatch, name):
    path = Path(begun.out) / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b":", b";", 1))

    def run(self, *args, **kwargs):
        raise AssertionError("ran the model for a damaged store")

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "__call__", run)
        with pytest.raises(StoreError, match=f"{name} is damaged"):
            run_capture(begun)
    path.write_bytes(content)
    assert run_capture(begun).complete


@pytest.mark.parametrize("what", ["file", "directory", "other seed", "other ranks"])
def test_a_dry_run_tells_what_is_in_the_way(begun, tmp_path, what):
    asked = {
        "file": replace(begun, out=str(begun.files[0])),
        "directory": replace(begun, out=str(tmp_path)),
        "other seed": replace(begun, seed=6),
        "other ranks": replace(begun, rank=0, world_size=2),
    }[what]
    messages = []
    for call in (dry_run, run_capture):
        with pytest.raises((OutputExistsError, StoreError)) as caught:
            call(asked)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    dry_run(begun)
    assert not open_store(begun.out).complete


def test_a_store_that_another_rank_completes_meanwhile_is_no_damage(config, monkeypatch):
    """A rank that is run again reads what is pending while the last one removes it."""
    run_capture(replace(config, rank=0, world_size=2))

    def late(*args):
        monkeypatch.setattr("capture.run.check_begun", check_begun)
        assert run_capture(replace(config, rank=1, world_size=2)).complete
        return check_begun(*args)

    monkeypatch.setattr("capture.run.check_begun", late)
    assert run_capture(replace(config, rank=0, world_size=2)).complete


def test_stores_that_do_not_say_how_they_round_are_compared_by_what_they_say(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("capture.provenance.native_bits", lambda *_: None)
        store = run_capture(config)
    assert verify_rows(store, None, batches=2).bitwise
