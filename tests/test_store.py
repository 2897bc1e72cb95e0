"""The embedding store alone: round trips, resuming, and refusing whatever is not whole or not wanted."""

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.fingerprint import differences, digest_rows
from ichpipe.cache.layout import StorePlan
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.cache.writer import disagreement, write_store

DIM = 5
CLASSES = ("any", "epidural")


@pytest.fixture(scope="module")
def client():
    ports = {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, **ports) as cluster, Client(cluster) as made:
        yield made


def rows_of(name):
    """The true rows of one input: a function of its name alone, with float16's whole range of exponents."""
    generator = np.random.default_rng(list(name.encode()))
    scale = 2.0 ** generator.integers(-14, 15)
    return (generator.normal(size=DIM) * scale).astype(np.float32), generator.normal(size=2).astype(np.float32)


class Counting:
    """A compute function that notes what it was asked for, and can fail after some rows.

    Dask sends a copy of it to the worker, so the notes go to a file.
    """

    def __init__(self, notes, fail_after=None, change=None):
        self.notes, self.fail_after, self.change = notes, fail_after, change
        notes.touch()

    @property
    def asked(self):
        return self.notes.read_text().split()

    def __call__(self, _worker):
        return self.compute

    def compute(self, names):
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise RuntimeError("killed here")
        with self.notes.open("a") as file:
            file.write("\n".join(names) + "\n")
        embedding, logit = plain(names)
        return (embedding, logit) if self.change is None else self.change(embedding, logit)


@pytest.fixture
def counting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    return lambda **changes: Counting(folder / str(len(list(folder.iterdir()))), **changes)


def plain(names):
    made = [rows_of(name) for name in names]
    return np.stack([one[0] for one in made]), np.stack([one[1] for one in made])


def plan_of(lengths, chunk_rows=4, **changes):
    sop_uids = tuple(f"1.2.{s}.{r}" for s, length in enumerate(lengths) for r in range(length))
    plan = StorePlan(
        sop_uids=sop_uids,
        series_uids=tuple(f"1.9.{s}" for s in range(len(lengths))),
        series_lengths=tuple(lengths),
        embedding_dim=DIM,
        classes=CLASSES,
        chunk_rows=chunk_rows,
        fingerprint={"weights": "abc", "size_px": 64},
    )
    return replace(plan, **changes)


def build(folder, plan, client, compute=None):
    compute = compute or (lambda _worker: plain)
    done = sum(write_store(folder / "store.zarr", folder / "building", plan, plan.sop_uids, compute, client))
    assert done == plan.n_rows
    return folder / "store.zarr"


@contextmanager
def folder_in(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    yield path
    shutil.rmtree(path)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), chunk_rows=st.integers(1, 9))
def test_any_set_of_series_in_any_chunks_comes_back(tmp_path_factory, client, lengths, chunk_rows):
    plan = plan_of(lengths, chunk_rows)
    with folder_in(tmp_path_factory) as folder:
        store = EmbeddingStore(build(folder, plan, client), plan.fingerprint)
        assert len(store) == sum(lengths)
        assert tuple(store.series_uids) == plan.series_uids
        start = 0
        for uid, length in zip(plan.series_uids, lengths, strict=True):
            found = store.series(uid)
            assert found.sop_uids == plan.sop_uids[start : start + length]
            for row, name in enumerate(found.sop_uids):
                embedding, logit = rows_of(name)
                # float16: half a unit in the last place, or half the smallest subnormal step
                bound = np.maximum(np.abs(embedding) * 2.0**-11, 2.0**-25)
                assert (np.abs(found.embedding[row].astype(np.float64) - embedding) <= bound).all()
                assert np.array_equal(found.logit[row], logit)
            start += length


def test_an_interrupted_extraction_computes_only_what_is_missing(tmp_path, client, counting):
    plan = plan_of([5, 6, 3])
    first = counting(fail_after=8)
    with pytest.raises(RuntimeError, match="killed here"):
        build(tmp_path, plan, client, first)
    assert not (tmp_path / "store.zarr").exists()
    (tmp_path / "building" / "embedding" / "c" / "orphan.partial").write_bytes(b"torn")
    second = counting()
    path = build(tmp_path, plan, client, second)
    assert len(first.asked) == 8
    assert sorted(first.asked + second.asked) == sorted(plan.sop_uids)
    assert not list(path.rglob("*.partial"))
    (tmp_path / "other").mkdir()
    undisturbed = build(tmp_path / "other", plan, client)
    for file in undisturbed.rglob("*"):
        if file.is_file():
            assert (path / file.relative_to(undisturbed)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("changes", [{"fingerprint": {"weights": "other", "size_px": 64}}, {"chunk_rows": 3}])
def test_rows_made_by_something_else_are_never_resumed(tmp_path, client, counting, changes):
    plan = plan_of([5, 6])
    with pytest.raises(RuntimeError):
        build(tmp_path, plan, client, counting(fail_after=4))
    other, compute = replace(plan, **changes), counting()
    build(tmp_path, other, client, compute)
    assert sorted(compute.asked) == sorted(plan.sop_uids)


def test_a_finished_store_is_replaced_only_by_a_whole_one(tmp_path, client, counting):
    plan = plan_of([5, 6])
    path = build(tmp_path, plan, client)
    other = replace(plan, fingerprint={"weights": "other", "size_px": 64})
    with pytest.raises(RuntimeError):
        build(tmp_path, other, client, counting(fail_after=4))
    assert disagreement(path, plan.fingerprint) == []
    build(tmp_path, other, client)
    assert disagreement(path, other.fingerprint) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["store.zarr"]


def test_the_reader_names_every_field_that_differs(tmp_path, client):
    path = build(tmp_path, plan_of([2]), client)
    with pytest.raises(StoreError) as caught:
        EmbeddingStore(path, {"weights": "xyz", "size_px": 64, "windows": [1]})
    message = str(caught.value)
    assert "weights: store has abc, wanted xyz" in message
    assert "windows: store has None" in message
    assert "size_px" not in message
    assert "ichpipe extract" in message


def test_every_flipped_bit_in_a_chunk_is_found(tmp_path, client):
    path = build(tmp_path, plan_of([3, 4]), client)
    generator = np.random.default_rng(0)
    for file in (*layout.chunk_files(path, 0), *layout.chunk_files(path, 1)):
        whole = file.read_bytes()
        for bit in generator.integers(0, len(whole) * 8, 25):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << (bit % 8)
            file.write_bytes(damaged)
            with pytest.raises(StoreError, match="damaged"):
                EmbeddingStore(path).series("1.9.0")
        file.write_bytes(whole)
    EmbeddingStore(path).series("1.9.0")


def test_a_cut_chunk_is_found(tmp_path, client):
    path = build(tmp_path, plan_of([3, 4]), client)
    file = layout.chunk_files(path, 1)[1]
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(StoreError, match="damaged"):
        EmbeddingStore(path).series("1.9.0")


def test_a_vanished_chunk_names_a_series(tmp_path, client):
    path = build(tmp_path, plan_of([3, 4]), client)
    layout.chunk_files(path, 1)[1].unlink()
    with pytest.raises(StoreError, match=r"3 rows are missing, the first in series 1\.9\.1"):
        EmbeddingStore(path).series("1.9.0")


def edit_attributes(path, **changes):
    file = path / "zarr.json"
    content = json.loads(file.read_text())
    content["attributes"] |= changes
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complete": False}, "not complete"),
        ({"format_version": 99}, "update ichpipe"),
        ({"format": "x"}, "not an ichpipe"),
    ],
)
def test_a_store_that_is_not_ours_or_not_whole_is_refused(tmp_path, client, changes, message):
    path = build(tmp_path, plan_of([3]), client)
    edit_attributes(path, **changes)
    with pytest.raises(StoreError, match=message):
        EmbeddingStore(path)
    assert disagreement(path, plan_of([3]).fingerprint)


def test_no_store_and_no_zarr_are_refused(tmp_path):
    with pytest.raises(StoreError, match=r"does not exist.*ichpipe extract"):
        EmbeddingStore(tmp_path / "nothing.zarr")
    with pytest.raises(StoreError, match="no Zarr v3 group"):
        EmbeddingStore(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_features_that_float16_can_t_hold_are_refused_with_the_slice(tmp_path, client, counting, value):
    def spoil(embedding, logit):
        embedding[-1, 2] = value
        return embedding, logit

    with pytest.raises(StoreError, match=r"not finite in float16, the first is 1\.2\.0\.2"):
        build(tmp_path, plan_of([3]), client, counting(change=spoil))
    assert not (tmp_path / "store.zarr").exists()


def test_features_of_another_shape_are_refused(tmp_path, client, counting):
    with pytest.raises(StoreError, match="shape"):
        build(tmp_path, plan_of([3]), client, counting(change=lambda embedding, logit: (embedding[:, 1:], logit)))


@pytest.mark.parametrize("uid", ["", "1" * 65, "1.2.ä"])
def test_a_uid_that_does_not_fit_is_refused(tmp_path, client, uid):
    with pytest.raises(StoreError, match="ASCII"):
        build(tmp_path, plan_of([1], sop_uids=(uid,)), client)


def test_an_unknown_series_is_refused(tmp_path, client):
    store = EmbeddingStore(build(tmp_path, plan_of([3]), client))
    with pytest.raises(StoreError, match="among the 1"):
        store.series("9.9")


def test_fingerprints_see_order_content_and_series():
    rows = [("s", "a", "1"), ("s", "b", "2")]
    others = [rows[::-1], [("s", "a", "1"), ("s", "b", "3")], [("s", "a", "1"), ("t", "b", "2")], rows[:1]]
    assert len({digest_rows(each) for each in (rows, *others)}) == 5
    assert differences({"a": 1}, {"a": 1}) == []


def test_the_documented_way_to_read_with_zarr_alone_works(tmp_path, client, monkeypatch):
    (tmp_path / "artifacts").mkdir()
    shutil.move(build(tmp_path, plan_of([3, 4]), client), tmp_path / "artifacts" / "embeddings.zarr")
    page = (Path(__file__).parents[1] / "docs" / "store-format.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "store-format.md", "exec"), names)  # noqa: S102 - our own page
    expected = EmbeddingStore(tmp_path / "artifacts" / "embeddings.zarr").series("1.9.1")
    assert names["series_uid"] == "1.9.1"
    assert np.array_equal(names["embedding"], expected.embedding)
    assert names["sop_uids"] == list(expected.sop_uids)
