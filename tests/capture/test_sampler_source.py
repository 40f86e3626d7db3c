"""A sampler as the source of a capture: what the rows say, and that nothing but seed and number decides them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from capture import ActivationStore, CaptureConfig, open_store, run_capture, schema, verify_store
from capture.convert import export_store
from capture.decodings import Decodings
from capture.sampler_source import SamplerSource
from mdlm_interp import HookedMDLM, load_tokenizer
from mdlm_interp.decoding import Ancestral, Even, ReMDM, Sampler, sample, start_tokens
from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.documents import PACKING
from mdlm_interp.errors import ConfigError, DataError, OutputExistsError, StoreError
from oracle import Oracle, exact_trajectory
from tests.capture.convert.checks import assert_same_bits
from tests.capture.test_resume import contents, stop_at_call

LENGTH = 12
SOURCE = SamplerSource(n=5, together=2, steps=6)
HOOK = "blocks.1.hook_mlp_out"


@pytest.fixture
def decoding(model_directory: Path, tmp_path: Path) -> CaptureConfig:
    """Five decodings of 12 tokens in 6 steps, sampled by twos, run by threes."""
    return CaptureConfig(
        model=str(model_directory),
        sampler=SOURCE,
        out=str(tmp_path / "run.zarr"),
        hooks=("blocks.*.hook_mlp_out", "blocks.*.mlp.hook_in"),
        length=LENGTH,
        batch_size=3,
        seed=5,
    )


@pytest.fixture
def take(decoding: CaptureConfig, tmp_path: Path) -> Callable[..., ActivationStore]:
    """Run a variation, each into a directory of its own."""
    runs = iter(range(100))

    def run(**changes: Any) -> ActivationStore:
        return run_capture(replace(decoding, out=str(tmp_path / f"run{next(runs)}.zarr"), **changes))

    return run


def rows_of(store: ActivationStore, decoding: int, step: int) -> dict[str, torch.Tensor]:
    """Coordinates of one step's rows."""
    found = store.coords(slice(0, len(store)))
    chosen = (found["doc"] == decoding) & (found["step"] == step)
    return {name: column[chosen] for name, column in found.items()}


def test_the_rules_of_packing_text_are_no_part_of_a_store_of_decodings(take, config):
    assert take().provenance["packing"] is None
    assert run_capture(config).provenance["packing"] == PACKING


def test_rows_are_the_sampler_s_steps(take, model_directory):
    """Exact: state, final text, reveal step, token and confidence against a trajectory taken by itself."""
    store = take()
    model = HookedMDLM.from_pretrained(model_directory)
    drawn: list[torch.Tensor] = []
    trajectory = sample(
        model,
        start_tokens(model, LENGTH, n=2),
        Sampler(schedule=Ancestral(steps=6)),
        seed=5,
        indices=[2, 3],
        watch=lambda seen: drawn.append(seen.measured.tokens),
    )
    steps = 0
    for which in range(2):
        own = 1 + int(trajectory.revealed_at[which].max())
        for step in range(own):
            found = rows_of(store, 2 + which, step)
            assert found["pos"].tolist() == list(range(LENGTH))
            assert torch.equal(found["xt"], trajectory.states[step, which])
            assert torch.equal(found["x0"], trajectory.final[which])
            assert torch.equal(found["reveal_step"], trajectory.revealed_at[which])
            assert torch.equal(found["token"], drawn[step][which])
            assert torch.equal(found["token"] >= 0, found["is_masked"])
            assert_same_bits(found["confidence"].numpy(), trajectory.confidence[step, which].numpy())
            assert found["t"].tolist() == [float(trajectory.t[step, which])] * LENGTH
            kept = found["is_masked"] & (found["reveal_step"] == step)
            assert torch.equal(found["token"][kept], found["x0"][kept])
            steps += 1
        assert rows_of(store, 2 + which, own)["pos"].tolist() == []
    assert steps > 8


def test_activations_are_those_of_the_states(take, model_directory, tmp_path):
    """Exact: the same batch shape, so the same bits; a time-conditioned model is told the share of masks."""
    plain = HookedMDLM.from_pretrained(model_directory)
    model = HookedMDLM(replace(plain.config, time_conditioning=True)).eval()
    model.load_state_dict(plain.state_dict())
    model.save_pretrained(tmp_path / "timed")
    load_tokenizer(model_directory).save(tmp_path / "timed")
    store = take(model=str(tmp_path / "timed"))
    _, xt = store.tokens()
    share = (xt == model.config.mask_id).double().mean(1)
    sigma = LogLinearSchedule().sigma(share).float()
    assert torch.equal(store.sequence_column("sigma"), sigma.double())
    assert len(set(sigma.tolist())) > 3
    with torch.inference_mode():
        _, cache = model.run_with_cache(xt[:3], HOOK, timesteps=sigma[:3])
    assert torch.equal(store.read(slice(0, 3 * LENGTH))[HOOK], cache[HOOK].flatten(0, 1))


def test_zarr_opens_it_and_names_the_columns(take):
    store = take()
    group = zarr.open_group(store.path, mode="r")
    for name, column in schema.SAMPLER_COLUMNS.items():
        array = group[f"rows/{name}"]
        assert isinstance(array, zarr.Array)
        assert (array.shape, array.dtype.name) == ((len(store),), column.dtype)
        assert array.attrs["description"] == column.description
        assert_same_bits(np.asarray(array[:]), store.coords(slice(0, len(store)), [name])[name].numpy())


@pytest.mark.parametrize("to", ["hdf5", "safetensors"])
def test_an_export_has_the_columns_too(take, tmp_path, to):
    store = take()
    export_store(store, tmp_path / "out", to=to)
    found = open_store(tmp_path / "out")
    assert found.fingerprint() == store.fingerprint()
    for name in schema.SAMPLER_COLUMNS:
        pair = [each.coords(slice(0, len(each)), [name])[name].numpy() for each in (found, store)]
        assert_same_bits(*pair)


def test_how_many_are_decoded_changes_no_row(take):
    """Exact: the first decodings of more are those of fewer, also if a batch of them is cut."""
    few, many = take(sampler=replace(SOURCE, n=3)), take(sampler=replace(SOURCE, n=5))
    n = len(few)
    assert 0 < n < len(many)
    for name, column in few.coords(slice(0, n)).items():
        assert_same_bits(column.numpy(), many.coords(slice(0, n))[name].numpy())


def test_companions_that_take_longer_add_no_step(take):
    """Exact in exact arithmetic, where the batch of decodings enters nothing: alone and by threes, the same rows."""
    options = {"arithmetic": "exact", "hooks": (HOOK,), "length": 6}
    source = SamplerSource(n=3, steps=8)
    alone, three = (take(sampler=replace(source, together=together), **options) for together in (1, 3))
    steps = [int(rows_of(three, n, 0)["reveal_step"].max()) for n in range(3)]
    assert len(set(steps)) > 1, "the decodings must differ in length for this to show anything"
    assert alone.fingerprint() == three.fingerprint()


def test_an_exact_capture_is_the_oracle_s_trajectory(take, model_directory):
    store = take(
        arithmetic="exact", hooks=(HOOK,), sampler=SamplerSource(n=2, steps=3, by="margin"), length=6
    )
    oracle = Oracle(HookedMDLM.from_pretrained(model_directory))
    start = start_tokens(oracle.model, 6, n=2)
    expected = exact_trajectory(oracle, start, Sampler(schedule=Even(steps=3), order="margin"), seed=5)
    assert torch.equal(store.tokens()[0][::3], expected.final)
    assert torch.equal(store.tokens()[1], expected.states[:3].transpose(0, 1).flatten(0, 1))


def test_what_is_taken_back_and_a_prompt_stay_visible(take, model_directory):
    source = SamplerSource(n=2, together=2, steps=8, remask="cap", eta=0.5, prompt="the old")
    store = take(sampler=source)
    model = HookedMDLM.from_pretrained(model_directory)
    first = rows_of(store, 0, 0)
    given = ~first["is_masked"]
    assert int(given.sum()) == int((first["reveal_step"] == -1).sum()) > 0
    trajectory = sample(
        model,
        first["xt"][None].repeat(2, 1),
        Sampler(schedule=ReMDM(grid=Ancestral(steps=8), strategy="cap", eta=0.5)),
        seed=5,
    )
    masks = (trajectory.states[:, 0] == model.config.mask_id).sum(1)
    assert bool((masks[1:] > masks[:-1]).any()), "nothing was taken back, so nothing is shown"
    for step in range(8):
        found = rows_of(store, 0, step)
        if len(found["xt"]):
            assert torch.equal(found["xt"], trajectory.states[step, 0])


def test_steps_positions_and_budgets_are_chosen(take):
    every = take(sampler=replace(SOURCE, every_step=2), positions="masked")
    found = every.coords(slice(0, len(every)))
    assert set((found["step"] % 2).tolist()) == {0}
    assert bool(found["is_masked"].all())
    assert take(max_rows=50).n_sequences == 4
    assert take(max_sequences=3).n_sequences == 3


@pytest.mark.parametrize("arithmetic", ["native", "exact"])
def test_a_stopped_capture_goes_on_to_the_same_bytes(decoding, monkeypatch, small_shards, arithmetic):
    changed = replace(decoding, arithmetic=arithmetic)
    if arithmetic == "exact":
        changed = replace(changed, hooks=(HOOK,), sampler=SamplerSource(n=7, together=2, steps=4))
    whole = run_capture(replace(changed, out=changed.out + ".whole"))
    assert len(whole.manifest.shards) > 3
    stops = 0
    while not (Path(changed.out).exists() and open_store(changed.out).complete) and stops < 50:
        stops += 1
        undo = stop_at_call(
            monkeypatch, HookedMDLM, "forward", 27 if arithmetic == "native" else 17, KeyboardInterrupt()
        )
        try:
            run_capture(changed)
        except KeyboardInterrupt:
            undo()
    assert 1 < stops < 50
    assert contents(changed.out) == contents(whole.path)


def test_ranks_write_the_store_of_one_process(decoding, small_shards):
    whole = run_capture(replace(decoding, out=decoding.out + ".whole"))
    for rank in range(2):
        run_capture(replace(decoding, rank=rank, world_size=2))
    assert contents(decoding.out) == contents(whole.path)


@pytest.mark.slow
def test_a_killed_capture_goes_on_to_the_same_bytes(tmp_path):
    """kill -9 as soon as something is committed, twice; then to the end."""
    command = [
        *(
            sys.executable,
            "-m",
            "mdlm_interp",
            "capture",
            "run",
            "--sampler.n",
            "8",
            "--sampler.together",
            "2",
        ),
        *(
            "--sampler.steps",
            "16",
            "--length",
            "64",
            "--shard-rows",
            "256",
            "--hooks",
            "blocks.*.hook_mlp_out",
        ),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole.zarr", tmp_path / "killed.zarr"
    subprocess.run([*command, "--out", str(whole)], env=environment, check=True)
    kills = 0
    for wanted in (3, 9):
        process = subprocess.Popen([*command, "--out", str(killed)], env=environment)
        while process.poll() is None and len(shards(killed)) < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() != 0
    assert kills == 2, "it ended before it was killed"
    assert 3 <= len(shards(killed)) < len(shards(whole))
    subprocess.run([*command, "--out", str(killed)], env=environment, check=True)
    assert contents(killed) == contents(whole)


def shards(path: Path) -> tuple[object, ...]:
    """Committed shards at this moment."""
    return open_store(path).manifest.shards if (path / "manifest.json").exists() else ()


@pytest.mark.parametrize("arithmetic", ["native", "exact"])
def test_verify_decodes_again_and_finds_another_decoding(take, monkeypatch, arithmetic):
    store = take(arithmetic=arithmetic, length=6, sampler=SamplerSource(n=3, together=2, steps=3))
    found = verify_store(store.path, batches=100)
    assert found.rows == len(store)
    assert found.bitwise
    original = Decodings.state

    def another(self, decoding, step):
        state = original(self, decoding, step)
        state.columns["confidence"] = state.columns["confidence"] + 1e-9
        return state

    monkeypatch.setattr(Decodings, "state", another)
    with pytest.raises(
        StoreError, match=r"confidence of sequence \d+ is not what seed and sampler give for decoding"
    ):
        verify_store(store.path, batches=100)


def test_another_sampler_is_another_store(decoding):
    run_capture(decoding)
    with pytest.raises(OutputExistsError, match="was begun with sampler"):
        run_capture(replace(decoding, sampler=replace(SOURCE, steps=7)))


def test_a_store_of_text_says_nothing_of_samplers(config):
    """Exact: the attributes that stores of text have had; one begun before goes on."""
    store = run_capture(config)
    assert "sampler" not in store.config
    assert not store.sampled
    assert sorted(path.name for path in (store.path / "rows").iterdir()) == sorted(
        [*schema.ROW_COLUMNS, "zarr.json"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"files": (Path("a.txt"),)},
            "a sampler writes its own text, got files a.txt too; leave one of them out",
        ),
        ({"times": "uniform"}, "times is for text, got 'uniform' with a sampler; leave it out"),
        ({"pack": "documents"}, "pack is for text, got 'documents' with a sampler; leave it out"),
        ({"wrap": False}, "wrap is for text, got False with a sampler; leave it out"),
        ({"sampler": None}, "files must name at least one text file"),
    ],
)
def test_options_that_would_change_nothing_are_refused(decoding, changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(decoding, **changes)


def test_numbers_out_of_range_and_a_full_prompt_are_refused(take):
    with pytest.raises(ConfigError, match="every_step must be at least 1, got 0"):
        SamplerSource(every_step=0)
    with pytest.raises(ConfigError, match="per_step needs an order, got by 'ancestral'"):
        SamplerSource(per_step=2)
    with pytest.raises(
        DataError, match="the prompt fills all 2 tokens and leaves nothing to decode; raise --length"
    ):
        take(length=2, sampler=SamplerSource(prompt="th"))
    with pytest.raises(
        DataError, match=r"no step of 5 decodings of length 12 .* fits max_rows 3; raise --max-rows"
    ):
        take(max_rows=3)
