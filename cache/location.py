"""Where a store lies: a local folder or any fsspec address (``s3://…``, ``memory://…``), by the same code."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from zarr.storage import FsspecStore, LocalStore

from ichpipe.cache.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import fsspec
    from zarr.abc.store import Store

PARTIAL = ".partial"
"""How the name of a file ends while zarr's LocalStore writes it; one that is left belongs to a killed process."""

_NOT_WRITTEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})


@dataclass(frozen=True)
class Place:
    """One address. Credentials and endpoints come from fsspec's own configuration (``FSSPEC_S3_…``)."""

    address: str

    @staticmethod
    def of(where: str | Path | Place) -> Place:
        """Take a path, an address, or a place."""
        return where if isinstance(where, Place) else Place(os.fspath(where))

    def __str__(self) -> str:
        """Return the address as the user wrote it."""
        return self.address

    @functools.cached_property
    def local(self) -> Path | None:
        """The folder, where the store lies on this machine's file system; else None."""
        return Path(self._root) if isinstance(self._fs, LocalFileSystem) else None

    def zarr_store(self, *, read_only: bool) -> Store:
        """Return zarr's own view of this place."""
        if self.local is not None:
            return LocalStore(self.local, read_only=read_only)
        return FsspecStore.from_url(self.address, read_only=read_only)

    def files(self, folder: str = "") -> dict[str, int]:
        """Return the size in bytes of every file below ``folder``, by name relative to the store."""
        if self.local is not None:  # fsspec's walk costs ten times a scan
            return dict(_scan(self.local / folder, len(str(self.local)) + 1))
        self._fs.invalidate_cache()
        found = self._fs.find(f"{self._root}/{folder}".rstrip("/"), detail=True)
        return {name[len(self._root) :].lstrip("/"): int(facts["size"]) for name, facts in found.items()}

    def remove(self, name: str) -> None:
        """Remove one file or one folder with all that is below it; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(f"{self._root}/{name}".rstrip("/"), recursive=True)

    def exists(self) -> bool:
        """Say whether anything is there."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._root))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the operating system says of a full disk, or of a folder that takes no files, into a StoreError."""
        try:
            yield
        except OSError as error:
            if error.errno not in _NOT_WRITTEN:
                raise
            raise StoreError(
                f"{self} can't be written ({error.strerror}); make room there or let it be written to, then run the "
                "same command again: chunks that were finished are kept"
            ) from error

    def sync(self, folder: str) -> None:
        """Put the files of a folder, and their names, on the disk now. A remote store is left to its server."""
        if self.local is None or os.name == "nt":  # Windows opens no folders
            return
        names = self.files(folder)
        folders = {parent for name in names for parent in (self.local / name).parents if self.local in parent.parents}
        for path in [self.local / name for name in names] + sorted(folders, reverse=True) + [self.local]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def lock(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the store against other writers of this machine (freed by the kernel when the process dies).

        Calls ``on_wait`` once where another process holds it. A remote store has no lock: there two writers
        of the same rows write the same bytes under the same names, and other rows under other names.
        """
        if self.local is None:
            yield
            return
        self.local.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(self.local.with_name(f".{self.local.name}.lock"))
        try:
            held.acquire(timeout=0)
        except Timeout:
            on_wait()
            held.acquire()
        try:
            yield
        finally:
            held.release()

    @functools.cached_property
    def _resolved(self) -> tuple[Any, str]:
        try:
            fs, root = url_to_fs(self.address)
        except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is not installed
            raise StoreError(f"{self.address}: {error}") from error
        return fs, str(root).rstrip("/")

    @property
    def _fs(self) -> fsspec.AbstractFileSystem:
        return self._resolved[0]

    @property
    def _root(self) -> str:
        return self._resolved[1]

    def __getstate__(self) -> dict[str, str]:
        """Travel as the address alone: a file system object holds connections."""
        return {"address": self.address}


def _scan(folder: Path, prefix: int) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _scan(Path(entry.path), prefix)
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield entry.path[prefix:], entry.stat().st_size
