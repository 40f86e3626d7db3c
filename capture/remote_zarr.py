"""Zarr's own store over a bucket, with errors in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore as ZarrObjectStore

from mdlm_interp.errors import StoreError, WriteError


class ErrorTellingStore(ZarrObjectStore[Any]):
    """Zarr's object store, whose errors an `ObjectStore` tells.

    Args:
        errors: A context by the kind of error and what could not be done; see `ObjectStore`.
    """

    def __init__(self, store: Any, errors: Callable[..., Any], *, read_only: bool = False) -> None:
        super().__init__(store, read_only=read_only)
        self._told = errors

    def with_read_only(self, read_only: bool = False) -> ErrorTellingStore:
        return ErrorTellingStore(self.store, self._told, read_only=read_only)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        with self._told(StoreError, "read"):
            return await super().get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        with self._told(StoreError, "read"):
            return await super().exists(key)

    async def getsize_prefix(self, prefix: str) -> int:
        with self._told(StoreError, "read"):
            return await super().getsize_prefix(prefix)

    async def set(self, key: str, value: Buffer) -> None:
        with self._told(WriteError, "written"):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        with self._told(WriteError, "written"):
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        with self._told(WriteError, "written"):
            await super().delete(key)
