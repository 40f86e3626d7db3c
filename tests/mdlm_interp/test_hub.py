"""Model sources on the Hugging Face hub: pinned, checked, offline. No test here connects to anything."""

from __future__ import annotations

import os
import socket

import huggingface_hub
import pytest
from huggingface_hub import constants

from mdlm_interp import checkpoints
from mdlm_interp.checkpoints import WEIGHTS, resolve_source
from mdlm_interp.errors import CheckpointError
from mdlm_interp.model import HookedMDLM


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def message(source: str) -> str:
    """What loading says when it refuses."""
    with pytest.raises(CheckpointError) as caught:
        HookedMDLM.from_pretrained(source)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty hub cache, and an error at any attempt to connect or to look up a name."""

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"a connection was attempted: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_offline_mode_makes_no_connection_and_one_clear_line(no_network, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert message("kuleshov-group/mdlm-owt") == (
        "'kuleshov-group/mdlm-owt' is not in the local cache and could not be downloaded (offline, or "
        "HF_HUB_OFFLINE is set); fetch it once on a connected machine, or pass a directory or 'bundled'"
    )


def test_a_hub_that_cannot_be_reached_is_the_same_line(monkeypatch, tmp_path):
    def unreachable(*arguments: object, **keywords: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert message("someone/something").startswith(
        "'someone/something' is not in the local cache and could not"
    )


@pytest.mark.parametrize("source", ["a b/c", "kuleshov-group/mdlm--owt", "-x/y"])
def test_a_repository_id_that_cannot_be_one_is_refused_before_any_connection(no_network, source):
    assert message(source).startswith(f"{source!r} could not be downloaded: ")


@pytest.fixture
def hub(saved, monkeypatch):
    """A hub that has `saved` as kuleshov-group/mdlm-owt; records what it is asked for."""
    asked: list[dict[str, object]] = []

    def snapshot_download(repository, **keywords):
        asked.append({"repository": repository, **keywords})
        return os.fspath(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def publish(monkeypatch, sha256: str) -> None:
    monkeypatch.setattr(checkpoints, "PUBLISHED_SHA256", {("kuleshov-group/mdlm-owt", "abc"): sha256})
    monkeypatch.setattr(checkpoints, "DEFAULT_REVISION", {"kuleshov-group/mdlm-owt": "abc"})


def test_a_known_checkpoint_is_asked_for_at_its_commit_and_checked(hub, saved, monkeypatch):
    publish(monkeypatch, checkpoints.sha256_of(saved / WEIGHTS))
    assert resolve_source("kuleshov-group/mdlm-owt") == saved
    assert hub[0]["revision"] == "abc"
    patterns = hub[0]["allow_patterns"]
    assert isinstance(patterns, list)
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in patterns)


def test_a_known_checkpoint_with_another_hash_is_refused(hub, saved, monkeypatch):
    publish(monkeypatch, "0" * 64)
    found = checkpoints.sha256_of(saved / WEIGHTS)
    assert message("kuleshov-group/mdlm-owt") == (
        f"{saved / WEIGHTS} has SHA-256 {found}, the published file has {'0' * 64}; "
        "delete it and download it again"
    )


def test_another_revision_is_not_held_to_the_known_hash(hub, saved, monkeypatch):
    publish(monkeypatch, "0" * 64)
    assert resolve_source("kuleshov-group/mdlm-owt", "other") == saved
    assert hub[0]["revision"] == "other"


def test_a_known_checkpoint_without_its_file_is_refused(hub, saved, monkeypatch):
    publish(monkeypatch, "0" * 64)
    (saved / WEIGHTS).unlink()
    assert (
        message("kuleshov-group/mdlm-owt") == f"{saved / WEIGHTS} is missing; download the checkpoint again"
    )


def test_the_published_hash_is_the_one_on_record():
    """Exact: from third parties' records of the file (678,522,728 bytes)."""
    commit = checkpoints.DEFAULT_REVISION["kuleshov-group/mdlm-owt"]
    assert commit == "d0958fa851335ece6c15260ce0025f030673c0fb"
    assert checkpoints.PUBLISHED_SHA256["kuleshov-group/mdlm-owt", commit] == (
        "47149e73f7552f39ea9776dbe74d925d25237bcf2ed2e2ec03cdff9d51c82aa4"
    )
