"""The format on disk: the page says what a store is, and a store of today stays readable for ever."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import store_kit as kit
import zarr
from hypothesis import given
from hypothesis import strategies as st

from ichpipe.cache import layout, maintenance
from ichpipe.cache.errors import StoreError
from ichpipe.cache.layout import FORMAT_VERSION, differences, digest_rows, name_of
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.cache.rows import decode_uids, encode_digests, encode_uids
from ichpipe.features.dask_client import connect

DOC = Path(__file__).parents[1] / "docs" / "store-format.md"
KEPT = Path(__file__).parent / "golden" / "store-v2.zarr"


@given(st.floats(-layout.EMBEDDING_LIMIT, layout.EMBEDDING_LIMIT, width=32))
def test_half_precision_is_within_the_documented_bound(value):
    stored = float(np.float32(value).astype(layout.EMBEDDING_DTYPE))
    assert abs(stored - value) <= max(2.0**-11 * abs(value), 2.0**-25)


@given(st.lists(st.from_regex(r"[0-9.]{1,64}", fullmatch=True), min_size=1))
def test_uids_survive_encoding(uids):
    assert decode_uids(encode_uids(uids)) == uids


@pytest.mark.parametrize("uid", ["", "1" * 65, "1.2.é"])
def test_uids_that_do_not_fit_are_refused(uid):
    with pytest.raises(StoreError, match="ASCII"):
        encode_uids(["1.2", uid])


def test_sources_must_be_sha256():
    assert encode_digests([kit.digest("a"), kit.digest("b")]).shape == (2, 32)
    with pytest.raises(StoreError, match="SHA-256"):
        encode_digests(["abcd"])


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
    assert (name_of(left) == name_of(right)) == (left == right)


@pytest.fixture(scope="module")
def fresh(client, tmp_path_factory):
    path = tmp_path_factory.mktemp("format") / "embeddings.zarr"
    kit.write(path, kit.Slices((3, 1)), client)
    kit.write(path, kit.Slices(), client)
    return path


def test_a_store_of_format_2_is_read_for_ever():
    """Written once, by the first release of this format; never to be written again."""
    facts = json.loads(KEPT.with_suffix(".json").read_text())
    store = EmbeddingStore(KEPT, facts["identity"])
    assert store.series_uids == list(facts["series"])
    for uid, wanted in facts["series"].items():
        found = store.series(uid)
        assert list(found.sop_uids) == wanted["sop_uids"]
        assert found.embedding.tolist() == wanted["embedding"]
        assert found.logit.tolist() == wanted["logit"]
    assert maintenance.verify(StoreLocation(str(KEPT))) == []


@pytest.mark.parametrize("which", ["fresh", "kept"])
def test_the_page_s_code_reads_a_store_with_zarr_alone(which, fresh, tmp_path, monkeypatch):
    path = fresh if which == "fresh" else KEPT
    (tmp_path / "embeddings.zarr").symlink_to(path)
    (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert "ichpipe" not in code
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)  # noqa: S102
    store = EmbeddingStore(path)
    assert list(names["series"]) == store.series_uids
    for uid, (sops, embedding) in names["series"].items():
        assert tuple(sops) == store.series(uid).sop_uids
        np.testing.assert_array_equal(embedding, store.embedding(uid))


def test_documented_tables_are_those_of_a_store(fresh):
    text = DOC.read_text(encoding="utf-8")
    root = zarr.open_group(str(fresh), mode="r")
    ((_, generation),) = root.groups()
    manifest = generation[generation.attrs["manifest"]]
    groups = {"manifest": manifest, "segment": generation[manifest.attrs["segments"][-1]]}
    sizes = {"N": 10, "S": 4, "S + 1": 5, "D": kit.DIM, "C": len(kit.CLASSES), "64": 64, "32": 32, "2": 2}
    sizes["M"] = groups["segment"]["source"].shape[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\(.*?\)) \| (\w+) \| (.*?) \|", text, re.MULTILINE)
    assert sorted((place, name) for name, place, *_ in rows) == sorted(
        (place, name) for place, group in groups.items() for name in group.array_keys()
    )
    for name, place, shape, dtype, dimensions in rows:
        array = groups[place][name]
        assert array.shape == tuple(sizes[size.strip()] for size in shape.strip("()").split(",") if size)
        assert str(array.dtype) == dtype
        assert array.metadata.dimension_names == tuple(dimensions.split(", "))
    for place, group in (("store", root), ("generation", generation), ("manifest", manifest)):
        assert all(f"| `{name}` | {place} |" in text for name in group.attrs)
    assert f"format version {FORMAT_VERSION}\n" in text


def write_kept_store():  # pragma: no cover - ran once: ICHPIPE_WRITE_KEPT=1 python tests/test_store_format.py
    slices = kit.Slices((3, 2, 4))
    with connect(1, None) as client:
        kit.write(KEPT, kit.Slices((3, 2)), client)
        kit.write(KEPT, slices, client)
    store = EmbeddingStore(KEPT)
    series = {
        uid: {
            "sop_uids": list(found.sop_uids),
            "embedding": found.embedding.tolist(),
            "logit": found.logit.tolist(),
        }
        for uid in store.series_uids
        if (found := store.series(uid))
    }
    KEPT.with_suffix(".json").write_text(json.dumps({"identity": store.identity, "series": series}, indent=1) + "\n")


if __name__ == "__main__" and os.environ.get("ICHPIPE_WRITE_KEPT") and not KEPT.exists():
    write_kept_store()
