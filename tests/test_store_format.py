"""The parts of the store's format: UIDs, half precision, the fingerprint, and the layout that the page describes."""

import json
import re
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.fingerprint import FORMAT_VERSION, differences, digest_rows
from ichpipe.cache.reader import EmbeddingStore

DOC = Path(__file__).parents[1] / "docs" / "store-format.md"
DIM, CLASSES = 5, ("any", "other")


@given(st.floats(-layout.EMBEDDING_LIMIT, layout.EMBEDDING_LIMIT, width=32))
def test_half_precision_is_within_the_documented_bound(value):
    stored = float(np.float32(value).astype(layout.EMBEDDING_DTYPE))
    assert abs(stored - value) <= max(2.0**-11 * abs(value), 2.0**-25)


@given(st.lists(st.from_regex(r"[0-9.]{1,64}", fullmatch=True), min_size=1))
def test_uids_survive_encoding(uids):
    assert layout.decode_uids(layout.encode_uids(tuple(uids))) == uids


@pytest.mark.parametrize("uid", ["", "1" * 65, "1.2.é"])
def test_uids_that_do_not_fit_are_refused(uid):
    with pytest.raises(StoreError, match="ASCII"):
        layout.encode_uids(("1.2", uid))


def test_digest_depends_on_every_part_and_on_order():
    rows = [("1", "1.1", "a"), ("1", "1.2", "b")]
    others = [rows[::-1], rows[:1], [("1", "1.1", "a"), ("1", "1.2", "c")], [("11", ".1", "a"), rows[1]], []]
    digests = [digest_rows(case) for case in (rows, *others)]
    assert len(set(digests)) == len(digests)
    assert digest_rows(iter(rows)) == digests[0]


@given(st.dictionaries(st.text(min_size=1), st.integers()), st.dictionaries(st.text(min_size=1), st.integers()))
def test_differences_are_empty_exactly_for_equals(left, right):
    assert differences(left, left) == []
    assert bool(differences(left, right)) == (left != right)


def write_by_hand(path):
    """Format version 1 from its description, without zarr or our writer: two series, two chunks of two rows."""
    embedding = np.arange(3 * DIM, dtype="<f2").reshape(3, DIM)
    logit = np.arange(3 * 2, dtype="<f4").reshape(3, 2)
    sops, series = (np.array(uids, "S64").view("u1").reshape(-1, 64) for uids in (["1.1", "1.2", "2.1"], ["1", "2"]))
    attributes = {"format": "ichpipe-embeddings", "format_version": 1, "classes": list(CLASSES)}
    attributes |= {"complete": True, "fingerprint": {"weights": "aaa"}}
    path.mkdir()
    node = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (path / "zarr.json").write_text(json.dumps(node))
    array_by_hand(path / "embedding", embedding, 2, "NaN")
    array_by_hand(path / "logit", logit, 2, "NaN")
    array_by_hand(path / "sop_uid", sops, 3, 0)
    array_by_hand(path / "series_uid", series, 2, 0)
    array_by_hand(path / "series_offset", np.array([0, 2, 3], "<i8"), 3, 0)
    return embedding, logit


def array_by_hand(path, data, rows, fill):
    node = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": data.shape,
        "data_type": data.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": (rows, *data.shape[1:])}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    path.mkdir()
    (path / "zarr.json").write_text(json.dumps(node))
    for chunk, start in enumerate(range(0, len(data), rows)):
        block = np.full((rows, *data.shape[1:]), np.nan if fill == "NaN" else 0, data.dtype)
        block[: len(data[start : start + rows])] = data[start : start + rows]
        file = path.joinpath("c", str(chunk), *["0"] * (data.ndim - 1))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(block.tobytes() + google_crc32c.value(block.tobytes()).to_bytes(4, "little"))


def test_store_of_format_1_made_by_hand_is_read(tmp_path):
    embedding, logit = write_by_hand(tmp_path / "embeddings.zarr")
    store = EmbeddingStore(tmp_path / "embeddings.zarr", {"weights": "aaa"})
    first, second = (store.series(uid) for uid in ("1", "2"))
    assert (first.sop_uids, second.sop_uids) == (("1.1", "1.2"), ("2.1",))
    np.testing.assert_array_equal(np.concatenate([first.embedding, second.embedding]), embedding)
    np.testing.assert_array_equal(np.concatenate([first.logit, second.logit]), logit)


def test_documented_tables_are_those_of_a_store(tmp_path):
    path = tmp_path / "embeddings.zarr"
    sops = tuple(f"1.{row}" for row in range(10))
    layout.create(path, layout.StorePlan(sops, ("1", "2", "3", "4"), (3, 1, 4, 2), DIM, CLASSES, 4, {}))
    group = zarr.open_group(str(path), mode="r")
    rows = re.findall(r"^\| `(\w+)` \| (\(.*?\)) \| (\w+) \| (.*?) \|", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    sizes = {"N": 10, "S": 4, "S + 1": 5, "D": DIM, "C": len(CLASSES), "64": 64}
    assert sorted(name for name, *_ in rows) == sorted(group.array_keys())
    for name, shape, dtype, dimensions in rows:
        array = group[name]
        assert array.shape == tuple(sizes[size.strip()] for size in shape.strip("()").split(",") if size)
        assert str(array.dtype) == dtype
        assert array.metadata.dimension_names == tuple(dimensions.split(", "))
    documented = DOC.read_text(encoding="utf-8").partition("## Attributes")[2]
    assert all(f"| `{name}` |" in documented for name in group.attrs)
    assert f"format version {FORMAT_VERSION}\n" in DOC.read_text(encoding="utf-8")
