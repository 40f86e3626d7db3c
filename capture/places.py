"""Where a store lives: what the writer needs of a directory, so that an object store can take its place.

A `Place` makes content durable under its final name, all or nothing, and gives out locks. `Directory` is the
local one; `remote.py` has the other.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from zarr.abc.store import Store
from zarr.storage import LocalStore

from capture.drafts import PARTIAL, FileDraft
from capture.open_files import remedy_for
from capture.shards import Piece
from mdlm_interp.atomic_files import PREFIX, replacing, sync, sync_tree, write_errors
from mdlm_interp.errors import ConfigError, StoreError

SYNC_THREADS = 8
LOCK = ".lock"


@runtime_checkable
class Draft(Protocol):
    """A file in the making."""

    path: str
    """Its path in the store once it is published."""

    def write(self, pieces: Sequence[Piece]) -> None:
        """Add to its end; the pieces are not needed any more when this returns."""
        ...

    def finish(self) -> None:
        """Nothing more is added."""
        ...


@runtime_checkable
class Place(Protocol):
    """What holds one store. Paths are relative, with slashes."""

    name: str
    """What messages call the store."""

    def exists(self) -> bool:
        """Whether anything is there."""
        ...

    def create(self, tag: str) -> AbstractContextManager[Place]:
        """A place to make the store's first files in; this one has all of them when the context ends.

        If another process was faster, its files stay and these are dropped.

        Args:
            tag: Tells apart the ranks, which may do this at the same time; two processes that give the same one
                never work on the same files.
        """
        ...

    def zarr_store(self) -> Store:
        """For zarr to write metadata and small arrays through."""
        ...

    def draft(self, path: str) -> Draft:
        """Begin a file anew."""
        ...

    def publish(self, drafts: Sequence[Draft]) -> None:
        """Make files durable under their names; returns when they are."""
        ...

    def replace(self, path: str, content: bytes) -> None:
        """Write a small file whole, durably."""
        ...

    def read(self, path: str) -> bytes | None:
        """A file's content, or None if there is no such file.

        Raises:
            StoreError: If it cannot be read.
        """
        ...

    def names(self, directory: str = "") -> list[str]:
        """Names of the files in a directory."""
        ...

    def files(self) -> list[str]:
        """Paths of all files."""
        ...

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """Bytes of each of these files; none of one that is not there."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file or a directory with all that is in it, if it is there."""
        ...

    def sync(self) -> None:
        """Make everything durable that was not written through this place."""
        ...

    def sweep(self) -> None:
        """Remove what killed processes left half written; nobody else may be writing."""
        ...

    def lock(self, name: str, *, wait: bool = False) -> AbstractContextManager[None]:
        """Be the only one that holds this lock.

        Raises:
            StoreError: If another process holds it, unless told to wait.
        """
        ...

    def free_bytes(self) -> int | None:
        """Room that is left; None if there is no telling."""
        ...


class Directory:
    """A store in a local directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)
        self._synced: set[Path] = set()
        """Directories whose own entry in their parent is durable."""

    def exists(self) -> bool:
        """Whether something is at the path, an empty directory aside."""
        return self.root.is_symlink() or (
            any(self.root.iterdir()) if self.root.is_dir() else self.root.exists()
        )

    @contextmanager
    def create(self, tag: str) -> Iterator[Directory]:
        """Make the store beside its path and rename it, so that it is never seen half made.

        What a killed process left there is made anew; a process of the same tag that lives is waited for.
        """
        root = self.root.resolve()
        made = root.with_name(f"{PREFIX}{root.name}.{tag}")
        lock = made.with_name(made.name + LOCK)
        with write_errors(root.parent):
            root.parent.mkdir(parents=True, exist_ok=True)
            with _locked(lock, self.name, wait=True):
                try:
                    shutil.rmtree(made, ignore_errors=True)
                    made.mkdir()
                    yield Directory(made)
                    sync_tree(made)
                    try:
                        os.replace(made, root)
                    except OSError as error:
                        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                            raise
                    sync(root.parent)
                finally:
                    shutil.rmtree(made, ignore_errors=True)
                    with suppress(OSError):
                        lock.unlink()

    def zarr_store(self) -> Store:
        """Zarr's own store over the directory."""
        return LocalStore(self.root)

    def draft(self, path: str) -> FileDraft:
        """A file that is appended to under another name."""
        return FileDraft(self.root, path)

    def publish(self, drafts: Sequence[Draft]) -> None:
        """fsync all, rename all, fsync the directories: in this order a name never leads to lost bytes."""
        for draft in drafts:
            draft.finish()
        with write_errors(self.root):
            finals = [self.root / draft.path for draft in drafts]
            _parallel(sync, [final.with_name(final.name + PARTIAL) for final in finals])
            for final in finals:
                os.replace(final.with_name(final.name + PARTIAL), final)
            parents = {final.parent for final in finals}
            above = {parent for path in parents - self._synced for parent in path.parents}
            _parallel(sync, parents | {path for path in above if path.is_relative_to(self.root)})
            self._synced |= parents

    def replace(self, path: str, content: bytes) -> None:
        """See `atomic_files.replacing`."""
        with replacing(self.root / path) as partial:
            partial.write_bytes(content)

    def read(self, path: str) -> bytes | None:
        """A file's content, or None if there is no such file."""
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(
                f"{self.root / path} cannot be read ({error.strerror}); {remedy_for(error)}"
            ) from None

    def names(self, directory: str = "") -> list[str]:
        """Names of the files in a directory, sorted."""
        path = self.root / directory
        return sorted(entry.name for entry in path.iterdir() if entry.is_file()) if path.is_dir() else []

    def files(self) -> list[str]:
        """Paths of all files, sorted."""
        return sorted(
            path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()
        )

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """Bytes of each of these files; none of one that is not there."""
        found: list[int | None] = []
        for path in paths:
            try:
                found.append((self.root / path).stat().st_size)
            except (FileNotFoundError, NotADirectoryError):
                found.append(None)
        return found

    def remove(self, path: str) -> None:
        """Remove a file or a directory with all that is in it, if it is there."""
        target = self.root / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def sync(self) -> None:
        """fsync everything that is no shard of rows: those are durable since they were published."""
        with write_errors(self.root):
            for top, directories, files in os.walk(self.root):
                if Path(top) == self.root:
                    directories[:] = [name for name in directories if name not in ("acts", "rows")]
                _parallel(sync, [Path(top, name) for name in ["", *files]])
            arrays = [*self.root.glob("acts/*"), *self.root.glob("rows/*")]
            _parallel(
                sync, [path for array in arrays for path in (array, array / "zarr.json") if path.exists()]
            )

    def sweep(self) -> None:
        """Remove the files whose names say that they are not finished."""
        for path in self.root.rglob("*"):
            if path.name.startswith(PREFIX) or path.name.endswith(PARTIAL):
                path.unlink(missing_ok=True)

    @contextmanager
    def lock(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """A lock of the operating system, which ends with the process however that dies."""
        with _locked(self.root / (name + LOCK), self.name, wait=wait):
            yield

    def free_bytes(self) -> int | None:
        """Room on the disk that holds the directory, or will."""
        place = self.root.resolve()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free


@contextmanager
def _locked(path: Path, name: str, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a file, which is made if there is none; its holder may remove it.

    Args:
        name: What messages call what it guards.
    Raises:
        StoreError: If another process holds it, unless told to wait.
    """
    while True:
        with write_errors(path.parent):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise StoreError(
                    f"{name} is being written by another process; wait for it, or stop it first"
                ) from None
            except OSError as error:
                raise StoreError(
                    f"{name} needs file locks, and its file system has none ({error.strerror}); mount it with flock, "
                    f"or choose another --out"
                ) from None
            if _is_at(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name: who locks one that was removed shuts nobody out."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _parallel(function: Callable[[Path], None], items: Iterable[Path]) -> None:
    """Call for several at once; the file system joins their syncs in few commits of its journal."""
    with ThreadPoolExecutor(SYNC_THREADS) as pool:
        for _ in pool.map(function, items):
            pass


def place_of(out: str | Path, endpoint: str | None = None) -> Place:
    """The place that a path or URL names.

    Args:
        endpoint: URL of an S3-compatible service; none takes AWS_ENDPOINT_URL, or Amazon's.
    Raises:
        ConfigError: If the URL cannot be right, or lacks a package to open it.
        StoreError: If its service cannot be reached.
    """
    if "://" not in str(out):
        if endpoint is not None:
            raise ConfigError(
                f"endpoint {endpoint} has no effect on the directory {out}; is an s3:// URL meant?"
            )
        return Directory(Path(out))
    try:
        from capture.remote import ObjectStore
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise ConfigError(
            f"{out} needs obstore, which is not installed: pip install 'mdlm-interp[remote]'"
        ) from None
    return ObjectStore(str(out), endpoint=endpoint)
