"""Mapped token files: the same stream as in memory, made once, refused when they are of something else."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mdlm_interp.errors import DataError
from mdlm_interp.training import token_cache
from mdlm_interp.training.data import read_streams
from mdlm_interp.training.learner import LearnerRecipe
from mdlm_interp.training.text import TextRecipe
from mdlm_interp.training.token_cache import RECORD, mapped_streams
from mdlm_interp.training.tokenizer import train_tokenizer
from mdlm_interp.training.trainer import train


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def test_mapped_tokens_are_those_in_memory_and_are_not_read_into_it(cache, text_file, tokenizer, streams):
    for _ in range(2):  # made, and found
        mapped = mapped_streams(cache, [text_file], tokenizer, 0.2)
        for side in ("train", "held_out"):
            assert isinstance(getattr(mapped, side), np.memmap)
            assert getattr(mapped, side).tolist() == getattr(streams, side).tolist()
        assert (mapped.train_bytes, mapped.held_out_bytes) == (streams.train_bytes, streams.held_out_bytes)
        assert mapped.sources == streams.sources
    assert np.fromfile(cache / "train.bin", "<u2").tolist() == streams.train.tolist()


def test_text_is_tokenised_once(cache, text_file, tokenizer, monkeypatch):
    mapped_streams(cache, [text_file], tokenizer, 0.2)
    monkeypatch.setattr("mdlm_interp.training.token_cache.encoded_documents", None)
    mapped_streams(cache, [text_file], tokenizer, 0.2)
    with pytest.raises(TypeError):
        mapped_streams(cache.with_name("another"), [text_file], tokenizer, 0.2)


def test_training_on_mapped_tokens_has_the_bits_of_training_in_memory(learner_config, cache, streams):
    """Exact; and a run may move from one to the other when it continues."""
    mapped = replace(learner_config, token_cache=cache, out=learner_config.out.with_name("mapped"))
    expected = train(learner_config, *LearnerRecipe.read(learner_config)).tensors()
    train(replace(mapped, token_cache=None, steps=4), *LearnerRecipe.read(learner_config))
    trainer = train(mapped, *LearnerRecipe.read(mapped))
    assert isinstance(trainer.recipe, TextRecipe)
    assert isinstance(trainer.recipe.streams.train, np.memmap)
    found = trainer.tensors()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_file_of_token_ids_trains_like_the_text_it_stands_for(
    tmp_path, text_file, tokenizer, texts, streams
):
    ids = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    path = tmp_path / "tokens.bin"
    np.array(ids, "<u2").tofile(path)
    for found in (
        read_streams([path], tokenizer, 0.2),
        mapped_streams(tmp_path / "c", [path], tokenizer, 0.2),
    ):
        assert found.train.tolist() == streams.train.tolist()
        assert found.held_out.tolist() == streams.held_out.tolist()
        assert found.held_out_bytes == streams.held_out_bytes


def test_text_and_token_files_together_keep_their_order(tmp_path, text_file, tokenizer, texts):
    path = tmp_path / "more.bin"
    np.array([*tokenizer.encode("a red bird"), tokenizer.eos_id], "<u2").tofile(path)
    found = read_streams([path, text_file], tokenizer, 0.2)
    first = tokenizer.encode("a red bird")
    sides = (found.train.tolist(), found.held_out.tolist())
    assert any(side[: len(first) + 1] == [*first, tokenizer.eos_id] for side in sides)
    alone = read_streams([text_file], tokenizer, 0.2)
    assert sum(map(len, sides)) == len(alone.train) + len(alone.held_out) + len(first) + 1


def test_tokens_of_other_text_share_or_tokenizer_are_refused(cache, tmp_path, text_file, tokenizer, texts):
    mapped_streams(cache, [text_file], tokenizer, 0.2)
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text().replace("fox", "cat"))
    with pytest.raises(
        DataError, match=r"was made with another sources: text.txt \w{12}\.\.\., the run asks for o"
    ):
        mapped_streams(cache, [other], tokenizer, 0.2)
    with pytest.raises(
        DataError, match=r"another held_out_share: 0.2, the run asks for 0.3; choose another tok"
    ):
        mapped_streams(cache, [text_file], tokenizer, 0.3)
    another = train_tokenizer([text.replace("the", "thou") for text in texts], 300)
    with pytest.raises(DataError, match=r"was made with another tokenizer_sha256: "):
        mapped_streams(cache, [text_file], another, 0.2)
    moved = tmp_path / "moved.txt"
    moved.write_bytes(text_file.read_bytes())
    mapped_streams(cache, [moved], tokenizer, 0.2)


def test_damaged_tokens_and_a_directory_of_something_else_are_refused(cache, tmp_path, text_file, tokenizer):
    mapped_streams(cache, [text_file], tokenizer, 0.2)
    path = cache / "train.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"is damaged \(train.bin is missing or does not have its SHA-256\); re"
    ):
        mapped_streams(cache, [text_file], tokenizer, 0.2)
    (cache / RECORD).write_text("{")
    with pytest.raises(DataError, match=r"is damaged \(tokens.json: .*\); remove it, and it is made again"):
        mapped_streams(cache, [text_file], tokenizer, 0.2)
    (cache / RECORD).write_text(json.dumps({"sources": []}))
    with pytest.raises(DataError, match=r"is damaged \(tokens.json lacks keys\)"):
        mapped_streams(cache, [text_file], tokenizer, 0.2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"exists and has no tokens.json, so it is no token cache; choose another"
    ):
        mapped_streams(tmp_path / "empty", [text_file], tokenizer, 0.2)


def test_a_cache_that_could_not_be_finished_is_not_there(cache, text_file, tokenizer):
    with pytest.raises(DataError, match="no document fell on the held-out side"):
        mapped_streams(cache, [text_file], tokenizer, 1e-9)
    assert not cache.exists()
    assert list(cache.parent.iterdir()) == []


def test_runs_that_start_together_share_one_cache(cache, text_file, tokenizer, monkeypatch):
    written, original = [], token_cache._write

    def slow(*arguments):
        written.append(arguments[0])
        time.sleep(0.3)
        original(*arguments)

    monkeypatch.setattr(token_cache, "_write", slow)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: mapped_streams(cache, [text_file], tokenizer, 0.2), range(3)))
    assert len(written) == 1
    assert all(np.array_equal(streams.train, found[0].train) for streams in found)
    assert [path.name for path in cache.parent.iterdir() if path.name.startswith(".")] == []
