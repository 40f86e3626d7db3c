"""A store in an object store: `s3://bucket/prefix`, and `gs://` and `az://`, which are not tested.

Every file of the store is one object, the same bytes as in a directory. An object is there whole or not at
all, and durable once the service has acknowledged it; so a commit needs no temporary names:

1. The files of a shard are kept in memory while they grow: `shard_rows` times the bytes of a row. If the
   service is slower than the model, three shards are held: one is put, one waits, one is filled. With 24 hook
   points of width 768 a shard of 16,384 rows is 1.2 GB; `--shard-rows 2048` takes an eighth of it.
2. They are put side by side, large ones in parts; then the manifest that lists them is put.
3. A small file that this process has read or written before is replaced on condition that nobody else changed
   it (If-Match), so a writer that lost its lock unawares cannot undo the commits of the next one.

Locks are objects too; see `leases.py`. The service must know conditional writes, as S3 itself, MinIO, R2, Google
and Azure do. A process killed while it puts an object in parts leaves parts that nobody sees and somebody
pays for; a lifecycle rule for incomplete multipart uploads removes them.

obstore has threads of its own, which a forked process lacks: a process forked after a request is refused any
other, also to a store that it opens itself. Start processes that read or write such stores by "spawn" or
"forkserver", and open the store in each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import MemoryStore
from zarr.abc.store import Store

from capture.leases import Lease, holder_of, insist, version_of
from capture.places import LOCK, Draft
from capture.remote_connection import connection
from capture.remote_errors import reason
from capture.remote_zarr import ErrorTellingStore
from capture.shards import Piece
from mdlm_interp.errors import MdlmError, StoreError, WriteError

CREATING = "create"
"""Name of the lock of the process that makes the store's first files."""
GROUP = "zarr.json"
"""The file that is put last of these: with it the store is there."""

PUTS = 8
"""Objects that are put, or removed, at a time."""
PART_BYTES = 2**23
"""Larger objects are put in parts of this size."""
PARTS = 4
"""Parts of one object that are put at a time."""


_requesting: int | None = None
"""The process that made the first request, whose threads serve all later ones."""


class ObjectStore:
    """A store under a prefix of a bucket; see `Place`.

    Args:
        store: An obstore, or the URL of one.
        endpoint: URL of an S3-compatible service; none takes AWS_ENDPOINT_URL, or Amazon's.
        name: What messages call it; none takes the URL.
    Raises:
        ConfigError: If the URL or the endpoint cannot be right.
        StoreError: If the service cannot be reached, or refuses us.
    """

    def __init__(self, store: Any, *, endpoint: str | None = None, name: str | None = None) -> None:
        self.name = str(store if name is None else name).rstrip("/")
        self.endpoint = endpoint
        if isinstance(store, str):
            connect = connection(store, endpoint)
            with self._errors(StoreError, "reached"):
                for _ in obstore.list(connect(first=True), chunk_size=1):
                    break
            store = connect(first=False)
        self._store = store
        self._versions: dict[str, Mapping[str, Any]] = {}
        """Of the files that were read or replaced, when that was last done."""
        self._leases: list[Lease] = []
        """Locks that are held."""

    def exists(self) -> bool:
        """Whether anything is there, but for what a creation that has not ended has put."""
        names = self.names()
        if names:
            return GROUP in names or CREATING + LOCK not in names
        with self._errors(StoreError, "read"):
            return any(map(len, obstore.list(self._store, chunk_size=1)))

    @contextmanager
    def create(self, tag: str) -> Iterator[ObjectStore]:
        """Make the files in memory, then put them, the group's own zarr.json last and only if there is none."""
        made = ObjectStore(MemoryStore(), name=self.name)
        yield made
        with self._locked(CREATING, wait=True) as lease:
            there = [path for path in self.files() if path != CREATING + LOCK]
            if GROUP in there or (there and not lease.overtaken):
                return
            paths = [path for path in made.files() if path != GROUP]
            try:
                # Of the process that left its lock behind; it may have been asked for another store.
                self._each(self._delete, there)
                self._each(partial(self._copy, made), paths)
                self._copy(made, GROUP)
            except StoreError:
                raise  # another process was faster after all, and these files are its own
            except BaseException:
                with suppress(MdlmError):
                    lease.check()
                    self._each(self._delete, paths)
                raise

    def zarr_store(self) -> Store:
        """Zarr's own store over the bucket."""
        return ErrorTellingStore(self._store, self._errors)

    def draft(self, path: str) -> MemoryDraft:
        """A file that is kept in memory until it is published."""
        return MemoryDraft(path)

    def publish(self, drafts: Sequence[Draft]) -> None:
        """Put all; a name never leads to a part of a file."""
        self._check_leases()

        def put(draft: Draft) -> None:
            assert isinstance(draft, MemoryDraft)
            large = len(draft.content) > PART_BYTES
            options: Any = {"use_multipart": large, "chunk_size": PART_BYTES, "max_concurrency": PARTS}
            insist(partial(obstore.put, self._store, draft.path, draft.content, **options))

        with self._errors(WriteError, "written"):
            self._each(put, drafts)

    def replace(self, path: str, content: bytes) -> None:
        """Put a file, on condition that nobody else changed it since we knew it.

        Raises:
            StoreError: If another process did.
        """
        self._check_leases()
        self._versions[path] = self._put(path, content, self._versions.get(path, "overwrite"))

    def read(self, path: str) -> bytes | None:
        """A file's content, or None if there is no such file."""
        found = self._get(path)
        if found is None:
            self._versions.pop(path, None)
            return None
        content, self._versions[path] = found
        return content

    def names(self, directory: str = "") -> list[str]:
        """Names of the files in a directory, sorted."""
        with self._errors(StoreError, "read"):
            found = obstore.list_with_delimiter(self._store, directory or None)["objects"]
            return sorted(str(entry["path"]).rpartition("/")[2] for entry in found)

    def files(self) -> list[str]:
        """Paths of all files, sorted."""
        return self._below("")

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """Bytes of each of these files, by one list of all; none of one that is not there."""
        with self._errors(StoreError, "read"):
            found = {
                str(entry["path"]): int(entry["size"])
                for block in obstore.list(self._store)
                for entry in block
            }
        return [found.get(path) for path in paths]

    def remove(self, path: str) -> None:
        """Remove a file or all files of a directory; the lock of another process that lives stays."""
        self._check_leases()
        if path.endswith(LOCK):
            with self._errors(StoreError, "read"):
                holder = holder_of(self._store, path)
                if holder is None or not holder.is_gone():
                    return
        with self._errors(WriteError, "written"):
            self._each(self._delete, [*self._below(path), path])

    def sync(self) -> None:
        """Nothing: what the service acknowledged is durable."""

    def sweep(self) -> None:
        """Nothing: no file is ever there half written."""

    @contextmanager
    def lock(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """A lease, which is renewed as long as this process lives; see `leases.py`."""
        with self._locked(name, wait=wait):
            yield

    def free_bytes(self) -> int | None:
        """None: there is no telling."""
        return None

    @contextmanager
    def _locked(self, name: str, *, wait: bool) -> Iterator[Lease]:
        lease = Lease(self._store, name + LOCK, self.name)
        lease.acquire(wait=wait, errors=lambda: self._errors(WriteError, "written"))
        self._leases.append(lease)
        try:
            yield lease
        finally:
            self._leases.remove(lease)
            lease.release()

    def _check_leases(self) -> None:
        for lease in tuple(self._leases):
            lease.check()

    def _below(self, directory: str) -> list[str]:
        with self._errors(StoreError, "read"):
            return sorted(
                str(entry["path"])
                for block in obstore.list(self._store, directory or None)
                for entry in block
            )

    def _get(self, path: str) -> tuple[bytes, Mapping[str, Any]] | None:
        """A file's content and version."""
        with self._errors(StoreError, "read"):
            try:
                result = obstore.get(self._store, path)
                return bytes(result.bytes()), version_of(result.meta)
            except FileNotFoundError:
                return None

    def _put(self, path: str, content: bytes, mode: Any) -> Mapping[str, Any]:
        """Put a file on a condition; its version."""
        try:
            with self._errors(WriteError, "written"):
                put = partial(obstore.put, self._store, path, content, mode=mode, use_multipart=False)
                return version_of(insist(put))
        except (PreconditionError, AlreadyExistsError):
            # Also what is said of a put that is sent again because the answer to the first was lost.
            found = self._get(path)
            if found is None or found[0] != content:
                raise StoreError(
                    f"{self.name}/{path} was changed by another process, which took this store over; what that "
                    f"one commits stays"
                ) from None
            return found[1]

    def _copy(self, made: ObjectStore, path: str) -> None:
        self._check_leases()
        self._put(path, made.read(path) or b"", "create")

    def _delete(self, path: str) -> None:
        self._versions.pop(path, None)
        with suppress(FileNotFoundError):  # S3 does not say so, others do
            insist(partial(obstore.delete, self._store, path))

    def _each(self, function: Callable[[Any], None], items: Sequence[Any]) -> None:
        with ThreadPoolExecutor(PUTS) as pool:
            for _ in pool.map(function, items):
                pass

    @contextmanager
    def _errors(self, kind: type[MdlmError], what: str) -> Iterator[None]:
        """Tell in one line why the service did not do as it was asked."""
        _refuse_forked(self.name)
        try:
            yield
        except (AlreadyExistsError, PreconditionError):
            raise  # an answer, and no failure
        except (BaseError, FileNotFoundError) as error:
            raise kind(f"{self.name} cannot be {what}: {reason(error, self.name, self.endpoint)}") from error


def _refuse_forked(name: str) -> None:
    """Raise StoreError in a process that lacks the threads: it would wait for ever, and then its parent too."""
    global _requesting
    _requesting = _requesting or os.getpid()
    if os.getpid() != _requesting:
        raise StoreError(
            f"{name} cannot be reached from a process that was forked after a request to an object store; start it "
            f'by "spawn" or "forkserver", and open the store there'
        )


class MemoryDraft:
    """A file of an `ObjectStore` that is not published yet."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.content = bytearray()

    def write(self, pieces: Sequence[Piece]) -> None:
        """Append the pieces."""
        for piece in pieces:
            self.content += piece if isinstance(piece, bytes) else piece.data

    def finish(self) -> None:
        """Nothing more is added: there is nothing left to do."""
