"""The manifest of a generation: the slices that it holds now, in order, and where each row lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.rows import Rows

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

    from ichpipe.cache.location import Place


@dataclass(frozen=True)
class Manifest:
    """``where`` (n, 2) gives each row's place as a number in ``segments`` and a row in that segment."""

    rows: Rows
    segments: list[str]
    where: NDArray[np.int64]


def read_manifest(place: Place, group: zarr.Group, *, prove: bool = False) -> Manifest:
    """Read the manifest that a generation points to; none, or a damaged one, is an error with the remedy.

    Checksums are compared always; ``prove`` compares the content with the manifest's name, too (SHA-256, slower).
    """
    name = group.attrs.get("manifest")
    if not isinstance(name, str):
        raise StoreError(f"{place}: generation {group.path} is not complete; run: ichpipe extract")
    found = layout.subgroup(group, name)
    segments: Any = found.attrs.get("segments")
    if not isinstance(segments, list):
        raise StoreError(f"{place}: {group.path}/{name} is not whole; run: ichpipe extract")
    parts = [layout.read(found, part) for part in ("sop_uid", "source", "series_uid", "study_uid", "series_offset")]
    try:
        result = Manifest(Rows(*parts), segments, layout.read(found, "location"))
        proven = not prove or name == layout.manifest_name(result.rows, result.segments, result.where)
    except layout.DAMAGED as error:
        raise StoreError(f"{place}: {group.path}/{name} is damaged; run: ichpipe extract") from error
    if not proven:
        raise StoreError(f"{place}: {group.path}/{name} is not what its name says; run: ichpipe extract")
    return result


def write_manifest(place: Place, group: zarr.Group, rows: Rows, segments: list[str], where: NDArray[np.int64]) -> None:
    """Write it under a name of its own, point the generation to it, then remove the former one."""
    used, numbers = np.unique(where[:, 0], return_inverse=True)
    where = np.stack([numbers.reshape(-1), where[:, 1]], axis=1).astype(np.int64)
    chosen = [segments[number] for number in used.tolist()]
    name = layout.manifest_name(rows, chosen, where)
    if group.attrs.get("manifest") != name or not _is_whole(place, group):
        layout.create_manifest(group, name, rows, chosen, where)
        place.sync(f"{group.path}/{name}")
        group.attrs["manifest"] = name
    for other in layout.parts(place, group, layout.MANIFEST).keys() - {name}:
        place.remove(f"{group.path}/{other}")


def _is_whole(place: Place, group: zarr.Group) -> bool:
    try:
        read_manifest(place, group, prove=True)
    except StoreError:
        return False
    return True
