"""Model sources on the Hugging Face hub: pinned, checked, offline. No test here leaves this machine."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from mdlm_interp import checkpoints
from mdlm_interp.checkpoints import WEIGHTS, resolve_source
from mdlm_interp.errors import CheckpointError
from mdlm_interp.model import HookedMDLM

ROOT = Path(__file__).parents[2]


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


NOWHERE = (
    "is neither a local directory nor reachable on the hub ({reason}), and not in the hub's local cache; "
    "pass a directory or 'bundled', or fetch it once on a connected machine"
)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def no_network(empty_cache, monkeypatch):
    """An error at any attempt to connect or to look up a name."""

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"a connection was attempted: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_offline_mode_makes_no_connection_and_one_clear_line(no_network, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = message("kuleshov-group/mdlm-owt")
    assert found == "'kuleshov-group/mdlm-owt' " + NOWHERE.format(reason="HF_HUB_OFFLINE is set")


def test_a_hub_that_cannot_be_reached_is_asked_once_and_says_nothing_else(
    empty_cache, monkeypatch, capfd, caplog
):
    """A known commit, too: huggingface_hub repeats that question five times, with a warning each."""
    asked: list[object] = []

    def unreachable(*arguments: object, **keywords: object) -> None:
        asked.append(arguments)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for source in ("kuleshov-group/mdlm-owt", "someone/something"):
        asked.clear()
        found = message(source)
        assert found == f"{source!r} " + NOWHERE.format(
            reason="no connection: [Errno -2] Name or service not known"
        )
        assert len(asked) == 1
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


@pytest.mark.parametrize("source", ["a b/c", "kuleshov-group/mdlm--owt", "-x/y"])
def test_a_repository_id_that_cannot_be_one_is_refused_before_any_connection(no_network, source):
    assert message(source).startswith(f"{source!r} is no model directory and no repository id: ")


class FakeHub(BaseHTTPRequestHandler):
    """The hub's few answers that a download needs, for one public repository, from the files of a folder."""

    files: Path
    commit = "c0ffee" + "0" * 34

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        headers = {"X-Repo-Commit": self.commit, "Content-Type": "application/json"}
        if path.startswith("/api/models/someone/model/tree/"):
            content = json.dumps(
                [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                    for file in self.files.iterdir()
                ]
            ).encode()
        elif path.startswith("/api/models/someone/model"):
            names = [{"rfilename": file.name} for file in self.files.iterdir()]
            content = json.dumps({"id": "someone/model", "sha": self.commit, "siblings": names}).encode()
        elif path.startswith(f"/someone/model/resolve/{self.commit}/"):
            content = (self.files / path.rpartition("/")[2]).read_bytes()
            headers["ETag"] = f'"{path.rpartition("/")[2]}"'
        else:
            headers["X-Error-Code"] = "RepoNotFound"
            content = b"{}"
        self.send_response(404 if "X-Error-Code" in headers else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None: ...


ASK_FAKE_HUB = """
import sys
from mdlm_interp.checkpoints import resolve_source
from mdlm_interp.errors import CheckpointError

for source in sys.argv[1:]:
    try:
        print(*sorted(file.name for file in resolve_source(source).iterdir()))
    except CheckpointError as error:
        print(error)
"""


def test_a_hub_that_answers_is_downloaded_from_and_its_files_are_found_again_without_it(saved, tmp_path):
    """Behavioural, in a process of its own, which reads the address of the hub when it starts."""
    (saved / "pytorch_model.bin").write_bytes(b"not asked for")
    handler = type("Handler", (FakeHub,), {"files": saved})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        environment |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

        def ask(*sources: str) -> list[str]:
            command = [sys.executable, "-c", ASK_FAKE_HUB, *sources]
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            return done.stdout.splitlines()

        first = ask("someone/model", "someone/other")
        assert first[0] == "config.json model.safetensors"
        assert first[1] == "'someone/other' " + NOWHERE.format(
            reason="it has no such repository that you may read"
        )
        server.shutdown()
    assert ask("someone/model") == first[:1]


@pytest.fixture
def hub(saved, monkeypatch):
    """A hub that has `saved` as kuleshov-group/mdlm-owt; records what it is asked for."""
    asked: list[dict[str, object]] = []

    def snapshot_download(repository, **keywords):
        asked.append({"repository": repository, **keywords})
        return os.fspath(saved)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, repository, **keywords: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_download_that_fails_halfway_says_why(hub, monkeypatch):
    def full(repository, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert message("someone/model") == (
        "'someone/model' could not be downloaded: [Errno 28] No space left on device: 'model.safetensors'"
    )


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
