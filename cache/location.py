"""The address of a store: a local folder or any fsspec address (``s3://…``, ``memory://…``)."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from zarr.storage import FsspecStore, LocalStore

from ichpipe.cache.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zarr.abc.store import Store

PARTIAL = ".partial"  # suffix of a file being written, as in zarr's LocalStore; a killed process leaves such files
log = logging.getLogger("ichpipe")

_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})  # NFS, FUSE and the like without flock
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})


class StoreLocation:
    """One store address. fsspec's own configuration (``FSSPEC_S3_…``) gives credentials and endpoints.

    ``local`` is the folder, if the store is on this machine's file system; else None.
    """

    def __init__(self, address: str | Path) -> None:
        self.address = os.fspath(address)
        try:
            self._fs, root = url_to_fs(self.address)
        except (ValueError, ImportError) as error:  # an unknown protocol, or its package is not installed
            raise StoreError(f"{self.address}: {error}") from error
        self._root = str(root).rstrip("/")
        self.local = Path(self._root) if isinstance(self._fs, LocalFileSystem) else None

    def __str__(self) -> str:
        """Return the address as the user wrote it."""
        return self.address

    def zarr_store(self, *, read_only: bool) -> Store:
        """Return the zarr store at this address."""
        if self.local is not None:
            return LocalStore(self.local, read_only=read_only)
        return FsspecStore.from_url(self.address, read_only=read_only)

    def files(self, folder: str = "") -> dict[str, int]:
        """Return the size in bytes of every file below ``folder``, by name relative to the store."""
        if self.local is None:
            self._fs.invalidate_cache()
            files = self._fs.find(f"{self._root}/{folder}".rstrip("/"), detail=True).items()
            return {name[len(self._root) :].lstrip("/"): int(facts["size"]) for name, facts in files}
        sizes = {}
        for parent, _, names in os.walk(self.local / folder):  # fsspec's walk takes ten times as long
            for path in (Path(parent, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # renamed or removed since it was listed
                    sizes[path.relative_to(self.local).as_posix()] = path.stat().st_size
        return sizes

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content. A name that does not exist is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(f"{self._root}/{name}".rstrip("/"), recursive=True)

    def remove_partial(self, folder: str) -> None:
        """Remove the unfinished files that killed writers left below a folder."""
        for name in self.files(folder):
            if name.endswith(PARTIAL):
                self.remove(name)

    def exists(self) -> bool:
        """Return whether the address exists."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._root))

    def sync(self, folder: str) -> None:
        """Flush the files of a folder and their directory entries to disk. A remote server does this itself."""
        if self.local is None or os.name == "nt":  # Windows can't open folders
            return
        files = [self.local / name for name in self.files(folder)]
        folders = {parent for file in files for parent in file.parents if self.local in parent.parents}
        for path in [*files, *sorted(folders, reverse=True), self.local]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def writing(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Lock the store against other writers of this machine; report a full or read-only disk as StoreError.

        The kernel releases the lock when the process dies. ``on_wait`` is called if another process holds it.
        A remote store has no lock: writers of the same rows write the same bytes under the same names.
        """
        try:
            if self.local is None:
                yield
                return
            self.local.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.local.with_name(f".{self.local.name}.lock"))
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(lock.acquire(timeout=0))
                except Timeout:
                    on_wait()
                    stack.enter_context(lock.acquire())
                except (NotImplementedError, OSError) as error:
                    if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                        raise
                    log.warning("%s: this file system has no locks; start no second writer at the same time", self)
                yield
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            raise StoreError(
                f"{self} can't be written ({error.strerror}); free space or change permissions there, then run the "
                "same command again: finished chunks are kept"
            ) from error
