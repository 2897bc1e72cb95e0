"""Lists and reads files below folders and inside zip archives; nothing is unpacked to disk.

A member of an archive is named by a path that goes through it: ``rsna.zip/stage_2_train/ID_000039fa0.dcm``.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from ichpipe.common.errors import FileTooLargeError, MissingFileError, NotOpenedError, UnreadableDicomError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_SUFFIX: Final = ".zip"
_ENCRYPTED: Final = 0x1  # bit of a member's flags
_DAMAGED: Final = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)


class ListedFile(NamedTuple):
    """One file, or one member of an archive."""

    path: str  # with forward slashes; undecodable bytes as surrogates, as the operating system gives them
    size: int  # bytes, uncompressed
    stamp: int  # changes with the content: time of the last change in ns, or a member's CRC-32


class Listing(NamedTuple):
    """Files, sorted by path, each once; and what can't be read, such as a damaged archive, with the reason."""

    files: list[ListedFile]
    damaged: list[tuple[str, str]]


def list_files(roots: Sequence[Path]) -> Listing:
    """List the files below ``roots`` whatever their names; zip archives are opened, and count as folders.

    Left out are names that begin with a dot (``.DS_Store``, ``._x``, half-written temporaries) or are ``__MACOSX``,
    and everything in such folders. Archives within archives are not opened. Dangling links, links to folders, folders
    that can't be opened and second members of one name are listed as damaged.
    A root may be a folder, a file, an archive or a folder within one; MissingFileError names one that does not exist.
    """
    files: dict[str, ListedFile] = {}
    damaged: dict[str, str] = {}
    for root in roots:
        files |= {file.path: file for file in _list_root(root, damaged)}
    return Listing(sorted(files.values(), key=lambda file: os.fsencode(file.path)), sorted(damaged.items()))


def read_file(path: str, largest: int) -> bytes:
    """Read a file or a member of an archive whole.

    Raises UnreadableDicomError with the reason: gone, not readable, over ``largest`` bytes, damaged or encrypted
    in its archive.
    """
    try:
        with open(path, "rb", buffering=0) as handle:  # noqa: PTH123  (a Path costs as much as the open)
            _require_size(os.fstat(handle.fileno()).st_size, largest)
            return handle.readall()
    except OSError as error:
        inside = _split(path)
        if inside is None:
            raise NotOpenedError(f"file can't be read: {error.strerror or type(error).__name__}") from error
    return _read_member(*inside, largest)


def stamp_of(path: str) -> tuple[int, int]:
    """Return what changes with a file, or with the archive that it lies in: bytes, and time in ns; zeros without it."""
    inside = None if os.path.exists(path) else _split(path)  # noqa: PTH110
    try:
        status = os.stat(inside[0] if inside else path)  # noqa: PTH116
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def portable(path: str) -> str:
    """Return a path as text; bytes that are not UTF-8 become backslash escapes, so it then names no file."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def _list_root(root: Path, damaged: dict[str, str]) -> Iterator[ListedFile]:
    if root.is_file() and root.name.upper() == "DICOMDIR":  # a table of contents stands for what lies beside it
        root = root.parent
    if root.is_dir():
        yield from _walk(os.fspath(root), damaged)
    elif root.is_file():
        yield from _list_file(root.as_posix(), os.stat(root), damaged)  # noqa: PTH116
    elif (inside := _split(root.as_posix())) is None:
        raise MissingFileError(f"{root} does not exist; name a folder or file with DICOM images")
    else:
        archive, member = inside
        members = list(_list_members(archive, member, damaged))
        if not members and archive not in damaged:
            raise MissingFileError(f"{root}: the archive {archive} has no {member}; see: unzip -l {archive}")
        yield from members


def _walk(folder: str, damaged: dict[str, str]) -> Iterator[ListedFile]:
    subfolders = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    subfolders.append(entry.path)
                    continue
                try:
                    yield from _list_entry(entry, damaged)
                except OSError as error:  # such as links that go round in a circle
                    damaged[_slashes(entry.path)] = f"file can't be read: {_cause(error)}"
    except OSError as error:
        damaged[_slashes(folder)] = f"the folder can't be read ({_cause(error)}); allow it to be read"
    for path in subfolders:
        yield from _walk(path, damaged)


def _list_entry(entry: os.DirEntry[str], damaged: dict[str, str]) -> Iterator[ListedFile]:
    if entry.is_file():
        yield from _list_file(entry.path, entry.stat(), damaged)
    elif entry.is_dir():
        damaged[_slashes(entry.path)] = "a link to a folder, which is not followed; name the folder itself"
    elif entry.is_symlink():
        damaged[_slashes(entry.path)] = "a link to a file that is not there; fetch the file (git annex get)"
    else:
        damaged[_slashes(entry.path)] = "no regular file"


def _slashes(path: str) -> str:
    return portable(path.replace(os.sep, "/"))


def _list_file(path: str, status: os.stat_result, damaged: dict[str, str]) -> Iterator[ListedFile]:
    if path.lower().endswith(_SUFFIX):
        yield from _list_members(path, "", damaged)
    else:
        yield ListedFile(path.replace(os.sep, "/"), status.st_size, status.st_mtime_ns)


def _list_members(archive: str, below: str, damaged: dict[str, str]) -> Iterator[ListedFile]:
    """List an archive's files whose name is ``below`` or lies below it."""
    try:
        opened = _open(archive)
    except _DAMAGED as error:
        damaged[_slashes(archive)] = f"damaged zip archive ({_cause(error)}); get it again"
        return
    prefix = f"{below.rstrip('/')}/" if below else ""
    repeats: Counter[str] = Counter()
    for info in opened.infolist():
        name, is_below = info.filename, info.filename.startswith(prefix) or info.filename == below
        if not is_below or info.is_dir() or any(map(_is_hidden, name.split("/"))):
            continue
        path = f"{archive}/{name}".replace(os.sep, "/")
        if opened.NameToInfo[name] is info:
            yield ListedFile(path, info.file_size, info.CRC)
        else:  # a name finds the last of its members
            repeats[path] += 1
            damaged[f"{path} ({repeats[path]})"] = (
                "the archive has another file of this name; unpack it with `unzip -B`, which keeps both, and name "
                "the folder"
            )


def _is_hidden(name: str) -> bool:
    return (name.startswith(".") and name not in {".", ".."}) or name == "__MACOSX"  # ./x is a plain member's name


def _split(path: str) -> tuple[str, str] | None:
    """Split a path that goes through an archive: the archive's path, and the rest; None if there is none."""
    lower, start = path.lower(), 0
    while (end := lower.find(f"{_SUFFIX}/", start)) >= 0:
        start = end + len(_SUFFIX)
        if os.path.isfile(path[:start]):  # noqa: PTH113
            return path[:start], path[start + 1 :]
    return None


def _open(archive: str) -> zipfile.ZipFile:
    status = os.stat(archive)  # noqa: PTH116
    return _open_once(archive, status.st_size, status.st_mtime_ns, os.getpid())


@lru_cache(maxsize=4)
def _open_once(archive: str, _size: int, _stamp: int, _process: int) -> zipfile.ZipFile:
    """Open an archive once per process: a forked one would share the position in the file."""
    return zipfile.ZipFile(archive)


def _read_member(archive: str, member: str, largest: int) -> bytes:
    try:
        opened = _open(archive)
        info = opened.NameToInfo.get(member)
    except _DAMAGED as error:
        raise UnreadableDicomError(f"its archive is damaged ({_cause(error)})") from error
    if info is None:
        raise UnreadableDicomError(f"the archive {archive} has no such file")
    if info.flag_bits & _ENCRYPTED:
        raise UnreadableDicomError("encrypted in its archive; unpack it first")
    _require_size(info.file_size, largest)
    try:
        with opened.open(info) as handle:
            data = handle.read(info.file_size)  # no more than the directory says: a bomb does not unfold
    except _DAMAGED as error:
        raise UnreadableDicomError(f"damaged in its archive ({_cause(error)})") from error
    if len(data) < info.file_size:
        raise UnreadableDicomError("damaged in its archive (cut short)")
    return data


def _require_size(size: int, largest: int) -> None:
    if size > largest:
        raise FileTooLargeError(f"file of {size} bytes is too large for one CT slice")


def _cause(error: Exception) -> str:
    """Name the cause without names or content, which messages of zipfile may quote."""
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__
