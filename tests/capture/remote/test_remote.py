"""A store in an object store is the one that a directory would hold, byte for byte, and reads the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from obstore.store import MemoryStore, from_url

from capture import ActivationStore, CaptureConfig, leases, open_store, run_capture
from capture.manifest import MANIFEST, from_bytes
from capture.places import Directory, Place
from capture.remote import PART_BYTES, ObjectStore
from capture.verify import verify_files, verify_store
from mdlm_interp.errors import OutputExistsError, StoreError, WriteError
from tests.capture.remote.service import DROPPED, Answer, Gateway, make_bucket

OVERLOADED = Answer(503, "<Error><Code>SlowDown</Code></Error>")


@pytest.fixture(params=["directory", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Place]:
    """Opens the same empty place, as often as it is called."""
    if request.param == "directory":
        return lambda: Directory(tmp_path / "run.zarr")
    if request.param == "memory":
        store = MemoryStore()
        return lambda: ObjectStore(store, name="s3://bucket/run")
    url, service = request.getfixturevalue("url"), request.getfixturevalue("service")
    return lambda: ObjectStore(url, endpoint=service)


def contents(place: Place) -> dict[str, bytes]:
    """Every file of a place."""
    return {path: place.read(path) or b"" for path in place.files()}


def published(place: Place, files: dict[str, list[bytes]]) -> None:
    drafts = []
    for path, pieces in files.items():
        draft = place.draft(path)
        for piece in pieces:
            draft.write([piece, np.frombuffer(piece, np.uint8)])
        drafts.append(draft)
    place.publish(drafts)


def filled(place: Place) -> None:
    """Make a store of two files."""
    with place.create("rank-0") as made:
        zarr.create_group(made.zarr_store(), attributes={"a": 1})
        made.replace(MANIFEST, b"{}")


def gone(place: ObjectStore, lock: str) -> None:
    """Make a lock look like one of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    content = json.loads(place.read(lock) or b"")
    place.replace(lock, json.dumps({**content, "owner": "another", "pid": process.pid}).encode())


# What any place does


def test_files_are_there_once_published_and_not_before(place):
    one = place()
    filled(one)
    draft = one.draft("acts/x/c.0")
    draft.write([b"abc"])
    assert one.read("acts/x/c.0") is None
    draft.write([b"def"])
    one.publish([draft])
    published(one, {"acts/x/c.1": [b"gh", b"i"], "acts/y/c.0": [b""]})
    other = place()
    assert {path: data for path, data in contents(other).items() if path.startswith("acts")} == {
        "acts/x/c.0": b"abcdef",
        "acts/x/c.1": b"ghghii",
        "acts/y/c.0": b"",
    }
    assert other.names("acts/x") == ["c.0", "c.1"]
    assert other.names("acts") == []
    assert other.names() == [MANIFEST, "zarr.json"]


def test_a_file_is_replaced_whole(place):
    one = place()
    filled(one)
    for content in (b"longer content", b"", b"1"):
        one.replace("done", content)
        assert place().read("done") == content


def test_what_is_removed_takes_its_files_along_and_no_neighbours(place):
    one = place()
    filled(one)
    published(one, {name: [b"x"] for name in ("seqs/t/c.0", "seqs/c.0", "seqs2/c.0", "seqs.json")})
    one.remove("seqs")
    one.remove("seqs.json")
    one.remove("was/never/there")
    assert one.files() == [MANIFEST, "seqs2/c.0", "zarr.json"]


def test_a_place_exists_once_something_is_there(place):
    assert not place().exists()
    filled(place())
    assert place().exists()
    assert place().files() == [MANIFEST, "zarr.json"]


def test_of_two_who_create_one_wins_whole(place):
    one, other = place(), place()
    with one.create("rank-0") as first, other.create("rank-1") as second:
        for number, made in enumerate((first, second)):
            zarr.create_group(made.zarr_store(), attributes={"number": number})
            made.replace(f"manifest.rank-{number}-of-2.json", b"{}")
    # The inner context ends first.
    assert place().files() == ["manifest.rank-1-of-2.json", "zarr.json"]
    assert dict(zarr.open_group(place().zarr_store(), mode="r").attrs) == {"number": 1}


def test_a_failed_creation_leaves_nothing(place):
    def fail() -> None:
        with place().create("rank-0") as made:
            zarr.create_group(made.zarr_store())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not place().exists()
    assert place().files() == []


def test_large_files_arrive_whole(place):
    one = place()
    filled(one)
    pieces = [bytes([number]) * (PART_BYTES // 3) for number in range(4)]
    published(one, {"acts/x/c.0": pieces})
    assert place().read("acts/x/c.0") == b"".join(2 * piece for piece in pieces)


# What an object store does besides


def test_a_creation_that_was_killed_is_made_anew(url, service, monkeypatch):
    def killed(self: ObjectStore, made: ObjectStore, path: str) -> None:
        if path == "zarr.json":
            raise SystemExit
        copy(self, made, path)

    copy = ObjectStore._copy
    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "_copy", killed)
        patched.setattr(ObjectStore, "_delete", lambda self, path: None)
        patched.setattr(leases.Lease, "release", lambda self: self._stop.set())
        with pytest.raises(SystemExit):
            filled(ObjectStore(url, endpoint=service))
    place = ObjectStore(url, endpoint=service)
    assert place.files() == ["create.lock", MANIFEST]
    assert not place.exists()
    gone(place, "create.lock")
    with place.create("rank-0") as made:
        zarr.create_group(made.zarr_store(), attributes={"a": 2})
        made.replace("manifest.rank-0-of-2.json", b"{}")
    assert place.files() == ["manifest.rank-0-of-2.json", "zarr.json"]


def test_a_lock_of_a_creation_that_ended_puts_no_store_at_risk(url, service, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(leases.Lease, "release", lambda self: self._stop.set())
        filled(ObjectStore(url, endpoint=service))
    place = ObjectStore(url, endpoint=service)
    place.replace(MANIFEST, b"committed")
    assert place.exists()
    gone(place, "create.lock")
    filled(place)
    assert place.files() == [MANIFEST, "zarr.json"]
    assert place.read(MANIFEST) == b"committed"


def test_a_creator_that_is_overtaken_leaves_the_store_of_the_other(url, service, monkeypatch):
    def overtaken(self: ObjectStore, made: ObjectStore, path: str) -> None:
        if path == "zarr.json":
            monkeypatch.setattr(ObjectStore, "_copy", copy)
            gone(self, "create.lock")
            with other.create("rank-1") as theirs:
                zarr.create_group(theirs.zarr_store(), attributes={"a": 2})
                theirs.replace(MANIFEST, b"theirs")
            other.replace(MANIFEST, b"committed")
        copy(self, made, path)

    copy = ObjectStore._copy
    one, other = (ObjectStore(url, endpoint=service) for _ in range(2))
    monkeypatch.setattr(ObjectStore, "_copy", overtaken)
    with pytest.raises(
        StoreError, match=r"zarr\.json was changed by another process, which took this store over"
    ):
        filled(one)
    assert other.files() == [MANIFEST, "zarr.json"]
    assert other.read(MANIFEST) == b"committed"
    assert dict(zarr.open_group(other.zarr_store(), mode="r").attrs) == {"a": 2}


def test_a_failed_put_of_a_creation_leaves_nothing(url, through):
    place = ObjectStore(url, endpoint=through.endpoint)
    denied = Answer(403, "<Error><Code>AccessDenied</Code></Error>")
    through.fault = lambda method, path: (
        denied if method == "PUT" and path.endswith("where.zarr/zarr.json") else None
    )
    with pytest.raises(WriteError, match="access is denied"):
        filled(place)
    assert any(done.method == "PUT" and done.path.endswith(MANIFEST) for done in through.exchanges)
    assert place.files() == []


def test_who_was_overtaken_cannot_undo_a_commit(url, service):
    one, other = (ObjectStore(url, endpoint=service) for _ in range(2))
    filled(one)
    assert one.read(MANIFEST) == b"{}"
    other.read(MANIFEST)
    other.replace(MANIFEST, b"next")
    other.replace(MANIFEST, b"after")
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            one.replace(MANIFEST, b"stale")
        assert str(caught.value) == (
            f"{one.name}/{MANIFEST} was changed by another process, which took this store over; what that one "
            f"commits stays"
        )
    assert other.read(MANIFEST) == b"after"


@pytest.mark.parametrize("what", ["its answer is lost", "its answer comes late", "the service is overloaded"])
def test_a_commit_is_tried_again(url, through, monkeypatch, what):
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    monkeypatch.setattr("capture.remote.REQUEST_S", 0.5 if "late" in what else 60.0)
    place = ObjectStore(url, endpoint=through.endpoint)
    filled(place)
    place.read(MANIFEST)
    seen: list[str] = []

    def fault(method: str, path: str) -> Answer | None:
        if method not in ("PUT", "POST"):
            return None
        seen.append(path)
        if len(seen) % 2 == 0:
            return None
        if "late" in what:
            time.sleep(0.7)
        return OVERLOADED if "overloaded" in what else DROPPED

    through.fault = fault
    place.replace(MANIFEST, b"next")
    place.replace(MANIFEST, b"after")
    place.remove("zarr.json")
    assert len(seen) == 6
    through.fault = lambda method, path: None
    assert place.read(MANIFEST) == b"after"


def test_a_prefix_may_hold_spaces_and_letters_of_any_kind_and_none_is_needed(service, url):
    bucket = url.split("/")[2]
    for number, where in enumerate((f"s3://{bucket}/a b/é+=&(1)", f"s3://{bucket}/")):
        place = ObjectStore(where, endpoint=service)
        place.replace("deep/file", bytes([number]))
        assert ObjectStore(where, endpoint=service).read("deep/file") == bytes([number])
    assert ObjectStore(f"s3://{bucket}", endpoint=service).names("deep") == ["file"]


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_the_endpoint_may_come_from_the_environment_and_the_option_wins(url, service, monkeypatch, variable):
    monkeypatch.setenv(variable, service)
    ObjectStore(url).replace("x", b"1")
    assert ObjectStore(url).read("x") == b"1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert ObjectStore(url, endpoint=service).read("x") == b"1"


# Captures


def small(model_directory: Path, texts: tuple[Path, ...], out: object, **changes: Any) -> CaptureConfig:
    """504 rows in two shards, the second of which is not full, in batches that end in neither."""
    given = {
        "model": str(model_directory),
        "files": texts,
        "out": str(out),
        "length": 24,
        "max_sequences": 21,
    }
    hooks = ("blocks.1.mlp.hook_in", "blocks.1.attn.hook_z")
    return CaptureConfig(
        **{**given, "hooks": hooks, "seed": 5, "shard_rows": 256, "batch_size": 4, **changes}
    )


@pytest.fixture(scope="module")
def local(
    model_directory: Path, texts: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """The capture into a directory; only to be read."""
    return run_capture(small(model_directory, texts, tmp_path_factory.mktemp("local") / "run.zarr"))


@pytest.fixture(scope="module")
def remote(
    model_directory: Path, texts: tuple[Path, ...], service: str, local: ActivationStore
) -> ActivationStore:
    """The same in an object store; only to be read."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ACCESS_KEY_ID", "test")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "test")
        make_bucket(service, "captured")
        return run_capture(small(model_directory, texts, "s3://captured/run.zarr", endpoint=service))


@pytest.fixture
def wanted(model_directory: Path, texts: tuple[Path, ...], url: str, through: Gateway) -> CaptureConfig:
    """The same to an empty place behind a gateway."""
    return small(model_directory, texts, url, endpoint=through.endpoint)


def test_a_capture_gives_the_same_bytes_as_into_a_directory(local, remote):
    assert remote.complete
    expected, found = contents(local.place), contents(remote.place)
    assert expected.keys() == found.keys()
    assert [path for path in expected if expected[path] != found[path]] == []


def test_an_interrupted_capture_goes_on_to_the_same_bytes(wanted, local, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("capture.run.finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_capture(wanted)
    store = open_store(wanted.out, endpoint=wanted.endpoint)
    assert not store.complete
    assert len(store) == 504
    assert torch.equal(store.times(), local.times())
    assert not any(name.endswith(".lock") for name in store.place.names())
    assert run_capture(wanted).complete
    assert contents(store.place) == contents(local.place)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(OVERLOADED, id="overloaded", marks=pytest.mark.slow),
        pytest.param(DROPPED, id="answers get lost"),
    ],
)
def test_a_capture_passes_through_a_service_that_stumbles(wanted, local, through, monkeypatch, wrong):
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    requests = 0

    def fault(method: str, path: str) -> Answer | None:
        nonlocal requests
        requests += 1
        # Not the first of all, which is to find a wrong address soon.
        return wrong if requests % 17 == 0 else None

    through.fault = fault
    found = run_capture(wanted)
    assert requests > 17
    assert contents(found.place) == contents(local.place)


def test_a_service_that_goes_away_leaves_what_was_committed(wanted, local, through, monkeypatch):
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    rule = rf"^{wanted.out} cannot be written: the service is overloaded \(SlowDown\); run this again later$"
    through.fault = lambda method, path: (
        OVERLOADED if method == "PUT" and path.endswith("hook_in/c.1.0") else None
    )
    with monkeypatch.context() as patched:
        patched.setattr("capture.remote.PATIENCE_S", 0.2)
        with pytest.raises(WriteError, match=rule):
            run_capture(wanted)
    through.fault = lambda method, path: None
    store = open_store(wanted.out, endpoint=wanted.endpoint)
    assert len(store) == 256
    verify_files(store)
    assert contents(run_capture(wanted).place) == contents(local.place)


def test_something_else_under_the_prefix_is_left_alone(wanted):
    place = ObjectStore(wanted.out, endpoint=wanted.endpoint)
    place.replace("notes.txt", b"mine")
    with pytest.raises(
        OutputExistsError, match=rf"^{wanted.out} exists and is no activation store; choose another"
    ):
        run_capture(wanted)
    assert contents(place) == {"notes.txt": b"mine"}


def test_a_second_writer_is_refused_and_changes_nothing(wanted):
    place = ObjectStore(wanted.out, endpoint=wanted.endpoint)
    with place.lock("rank-0"):
        filled(place)
        place.remove("rank-0.lock")  # as the end of a capture does with what is temporary
        before = contents(place)
        rule = rf"^{wanted.out} is being written by process {os.getpid()} on "
        second = ObjectStore(wanted.out, endpoint=wanted.endpoint)
        with pytest.raises(StoreError, match=rule), second.lock("rank-0"):
            pass
        assert contents(place) == before


# Reading


def test_a_remote_store_reads_like_a_local_one(local, remote):
    assert (len(remote), remote.hooks, remote.config) == (504, local.hooks, local.config)
    for wanted in (slice(None), slice(250, 260), [503, 0, 0, 255, 256, 17]):
        for read in ("read", "gather", "coords"):
            expected, found = getattr(local, read)(wanted), getattr(remote, read)(wanted)
            assert expected.keys() == found.keys()
            for name, values in expected.items():
                assert torch.equal(values, found[name]), (read, name)
    assert all(torch.equal(a, b) for a, b in zip(local.tokens(), remote.tokens(), strict=True))
    for hook in local.hooks:
        expected, found = local.statistics(hook), remote.statistics(hook)
        for name in ("count", "mean", "mean_square"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True
            )
    assert remote.fingerprint() == local.fingerprint()
    assert remote.bytes_on_disk == local.bytes_on_disk


def test_a_remote_store_is_verified(remote):
    found = verify_store(remote.name, endpoint=remote.place.endpoint, batches=6)
    assert found.bitwise
    assert (found.files, found.rows) == (len(remote.place.files()) - 1, 504)


def test_any_zarr_reader_opens_it(local, remote):
    hook = local.hooks[0]
    options: Any = {"endpoint": remote.place.endpoint, "client_options": {"allow_http": True}}
    store = zarr.storage.ObjectStore(from_url(remote.name, **options), read_only=True)
    array = zarr.open_array(store, path=f"acts/{hook}", mode="r")
    assert np.array_equal(np.asarray(array[10:20]), local.read(slice(10, 20), hook)[hook].numpy())


def test_a_few_rows_are_few_bytes_of_a_shard(wanted, through):
    store = run_capture(replace(wanted, max_sequences=None, max_rows=1100, shard_rows=2048))
    hook = store.hooks[1]
    size = len(store.place.read(f"acts/{hook}/c.0.0") or b"")
    chunk = 256 * 32 * 4 + 4
    assert size > 4 * chunk
    before = through.sent("c.0.0")
    store.read(slice(300, 310), hook)
    # A chunk, and the index: 16 bytes for each of 8 chunks and a checksum.
    assert through.sent("c.0.0") - before == chunk + 8 * 16 + 4


@contextmanager
def changed(place: ObjectStore, path: str, content: bytes | None) -> Iterator[None]:
    before = place.read(path) or b""
    if content is None:
        place.remove(path)
    else:
        place.replace(path, content)
    try:
        yield
    finally:
        place.replace(path, before)


READS: dict[str, Callable[[ActivationStore], object]] = {
    "read": lambda store: store.read([300]),
    "verify": verify_files,
}


@pytest.mark.parametrize("read", READS)
def test_one_flipped_bit_is_found(remote, read):
    path = f"acts/{remote.hooks[1]}/c.1.0"
    content = bytearray(remote.place.read(path) or b"")
    content[1000] ^= 1
    with (
        changed(remote.place, path, bytes(content)),
        pytest.raises(StoreError, match=rf"^{remote.name}/{path} is damaged \(.*; restore it from a copy"),
    ):
        READS[read](open_store(remote.name, endpoint=remote.place.endpoint))


@pytest.mark.parametrize("read", READS)
def test_a_missing_object_is_named(remote, read):
    path = f"acts/{remote.hooks[1]}/c.1.0"
    with (
        changed(remote.place, path, None),
        pytest.raises(StoreError, match=rf"^{remote.name}/{path} is missing; restore it from a copy"),
    ):
        READS[read](open_store(remote.name, endpoint=remote.place.endpoint))


@pytest.mark.parametrize("read", [*READS, "fingerprint", "size"])
def test_a_service_that_refuses_while_reading_is_told_in_one_line(remote, through, read):
    store = open_store(remote.name, endpoint=through.endpoint)
    store.read([0])
    through.fault = lambda method, path: Answer(400, "<Error><Code>ExpiredToken</Code></Error>")
    more = {"fingerprint": ActivationStore.fingerprint, "size": lambda store: store.bytes_on_disk}
    with pytest.raises(
        StoreError, match=rf"^{remote.name} cannot be read: the credentials have expired; set AWS"
    ):
        {**READS, **more}[read](store)


# Processes


def command(config: CaptureConfig, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "mdlm_interp", "capture", "run", *map(str, config.files), "--model", config.model,
        "--length", "24", "--seed", "5", "--batch-size", "4", "--shard-rows", "256", "--hooks",
        ",".join(config.hooks), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(
    model_directory: Path, texts: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> CaptureConfig:
    """All the text, into a directory."""
    out = tmp_path_factory.mktemp("whole") / "run.zarr"
    return small(model_directory, texts, out, max_sequences=None)


@pytest.fixture(scope="module")
def alone(whole: CaptureConfig) -> dict[str, bytes]:
    """What one process writes."""
    subprocess.run(command(whole, "--out", whole.out), check=True, capture_output=True)
    return contents(Directory(Path(whole.out)))


def committed(place: ObjectStore) -> int:
    content = place.read(MANIFEST)
    return 0 if content is None else len(from_bytes(content, MANIFEST).shards)


@pytest.mark.slow
def test_a_killed_writer_is_followed_by_the_next_to_the_same_bytes(whole, alone, url, through):
    ours = command(whole, "--out", url, "--endpoint", through.endpoint)
    place = ObjectStore(url, endpoint=through.endpoint)
    for goal in (0, 1, 2):
        # Slow enough that it is still there to be killed.
        through.fault = lambda method, path: time.sleep(0.02 if method == "PUT" else 0)
        with subprocess.Popen(ours, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and (committed(place) < goal or "rank-0.lock" not in place.names()):
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert "rank-0.lock" in place.names()
        assert committed(place) >= goal
    subprocess.run(ours, check=True, capture_output=True)
    assert contents(place) == alone


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one_process(whole, alone, url, service):
    there = ["--out", url, "--endpoint", service, "--world-size", "2"]
    ours = [command(whole, *there, "--rank", str(rank)) for rank in (0, 1)]
    processes = [subprocess.Popen(one, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for one in ours]
    assert [process.wait() for process in processes] == [0, 0]
    assert contents(ObjectStore(url, endpoint=service)) == alone
