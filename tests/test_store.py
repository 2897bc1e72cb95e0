"""The store alone: rows come back as they were computed, and nothing is computed twice."""

import contextlib
import gc
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import store_kit as kit
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.cache import chunks, layout
from ichpipe.cache.chunks import write_chunk
from ichpipe.cache.errors import StoreError
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.cache.rows import Rows
from ichpipe.cache.writer import Work, update
from ichpipe.features.dask_client import connect

# What is written comes back


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    chunk_rows=st.integers(1, 20),
    data=st.data(),
)
@pytest.mark.slow
def test_round_trip_of_any_studies_in_any_order_and_partition(client, lengths, chunk_rows, data):
    """Parts of the studies, in any order and any chunk sizes, then all of them: every row is right at every step."""
    numbers = list(range(len(lengths)))
    parts = data.draw(st.lists(st.lists(st.sampled_from(numbers), unique=True, min_size=1), max_size=3))
    known = set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        for part in [*parts, data.draw(st.permutations(numbers))]:
            slices = kit.Slices([lengths[number] for number in part], numbers=part)
            made = kit.generation(chunk_rows if part is parts[-1:] else data.draw(st.integers(1, 20)))
            there = kit.write(path, slices, client, made=made)
            assert there == len(known & set(slices.sops))
            known |= set(slices.sops)
            kit.assert_holds(path, slices)
            assert len(EmbeddingStore(path)) == len(slices.sops)


def test_series_are_found_by_uid_in_any_order(tmp_path, client):
    kit.write(tmp_path / "s", kit.Slices(), client)
    store = EmbeddingStore(tmp_path / "s")
    for uid in reversed(store.series_uids):
        assert all(sop.startswith(f"{uid}.") for sop in store.series(uid).sop_uids)
    with pytest.raises(StoreError, match=r"9\.9 is not among the 4"):
        store.series("9.9")


def test_rows_are_read_only_and_within_half_precision(tmp_path, client):
    slices = kit.Slices()
    kit.write(tmp_path / "s", slices, client)
    store = EmbeddingStore(tmp_path / "s")
    for uid in store.series_uids:
        embedding = store.embedding(uid)
        np.testing.assert_allclose(embedding.astype(np.float64), slices.expected(uid)[0], rtol=2**-11, atol=2**-25)
        with pytest.raises(ValueError, match="read-only"):
            embedding[0, 0] = 1


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_features_that_half_precision_can_not_hold_are_refused(tmp_path, client, value):
    def diverged(inputs):
        embedding, logit = kit.features(inputs)
        if "1.2.0" in inputs:
            embedding[inputs.index("1.2.0")] = value
        return embedding, logit

    slices = kit.Slices(numbers=[2, 1, 0, 3])  # 1.2.0 in the first chunk
    with pytest.raises(StoreError, match=r"not finite in float16, the first is 1\.2\.0"):
        kit.write(tmp_path / "s", slices, client, make=kit.maker(compute=diverged))
    with pytest.raises(StoreError, match="not complete"):
        EmbeddingStore(tmp_path / "s")


# Work is shared, and only what is new is computed


def test_number_of_workers_changes_no_byte(tmp_path, client):
    slices = kit.Slices([3] * 8)
    kit.write(tmp_path / "alone", slices, client)
    with connect(2, None) as several:
        assert len(several.scheduler_info()["workers"]) == 2
        kit.write(tmp_path / "together", slices, several)
    assert kit.all_bytes(tmp_path / "alone") == kit.all_bytes(tmp_path / "together")


def test_nothing_new_computes_nothing_and_starts_no_cluster(tmp_path, client):
    slices = kit.Slices()
    kit.write(tmp_path / "s", slices, client)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "s").rglob("*")}

    class Never:
        def __enter__(self):
            raise AssertionError("connected")

    assert kit.write(tmp_path / "s", slices, Never()) == 10
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "s").rglob("*")} == before


@pytest.mark.parametrize(
    ("later", "new"),
    [
        (kit.Slices((3, 1, 4, 2, 3)), ["1.4.0", "1.4.1", "1.4.2"]),
        (kit.Slices(contents={"1.2.1": "edited"}), ["edited"]),
        (kit.Slices((3, 1, 4), numbers=[0, 1, 2]), []),
        (kit.Slices((2, 4, 3, 1), numbers=[3, 2, 0, 1]), []),
        (kit.Slices((3, 1, 5, 2)), ["1.2.4"]),
        (kit.Slices((3, 1, 2, 2)), []),
    ],
    ids=["study added", "file changed", "study vanished", "order changed", "slice added", "slices vanished"],
)
def test_only_rows_of_new_content_are_computed(tmp_path, client, later, new):
    kit.write(tmp_path / "s", kit.Slices(), client)
    journal = tmp_path / "computed"
    kit.write(tmp_path / "s", later, client, make=kit.maker(journal))
    assert kit.computed(journal) == sorted(new)
    kit.assert_holds(tmp_path / "s", later)
    assert set(EmbeddingStore(tmp_path / "s").series_uids) == set(later.series)
    kit.write(tmp_path / "s", kit.Slices(), client, make=kit.maker(tmp_path / "again"))
    assert kit.computed(tmp_path / "again") == []  # and back: nothing was forgotten
    kit.assert_holds(tmp_path / "s", kit.Slices())


def test_one_percent_of_the_studies_changed_computes_one_percent(tmp_path, client):
    many = kit.Slices([4] * 200)
    kit.write(tmp_path / "s", many, client, made=kit.generation(64))
    changed = {f"1.{number}.{row}": f"new {number} {row}" for number in (17, 130) for row in range(4)}
    later = kit.Slices([4] * 200, contents=changed)
    assert kit.write(tmp_path / "s", later, client, made=kit.generation(64)) == 792
    kit.assert_holds(tmp_path / "s", later)


def test_two_files_of_one_content_are_computed_once(tmp_path, client):
    slices = kit.Slices((2, 2), contents={"1.1.0": "same", "1.0.1": "same"})
    journal = tmp_path / "computed"
    work = Work(slices.inputs, kit.maker(journal), lambda: contextlib.nullcontext(client))
    list(update(StoreLocation(tmp_path / "s"), kit.generation(), slices.rows, work))
    assert kit.computed(journal) == ["1.0.0", "1.1.1", "same"]
    kit.assert_holds(tmp_path / "s", slices)


def test_vanished_series_stay_readable_where_asked(tmp_path, client):
    kit.write(tmp_path / "s", kit.Slices(), client)
    fewer = kit.Slices((3, 2), numbers=[0, 3])
    kit.write(tmp_path / "s", fewer, client, keep_vanished=True)
    kit.assert_holds(tmp_path / "s", kit.Slices())
    kit.write(tmp_path / "s", fewer, client)
    assert EmbeddingStore(tmp_path / "s").series_uids == ["1.0", "1.3"]


# Generations


def test_generations_share_a_store_and_never_mix(tmp_path, client):
    slices, other = kit.Slices(), kit.generation(weights="bbb")
    kit.write(tmp_path / "s", slices, client)

    def doubled(inputs):
        return tuple(2 * values for values in kit.features(inputs))

    assert kit.write(tmp_path / "s", slices, client, made=other, make=kit.maker(compute=doubled)) == 0
    kit.assert_holds(tmp_path / "s", slices)
    store = EmbeddingStore(tmp_path / "s", other.identity, slices.rows)
    for uid in store.series_uids:
        np.testing.assert_array_equal(store.series(uid).logit, 2 * slices.expected(uid)[1])
    with pytest.raises(StoreError, match="holds 2 generations"):
        EmbeddingStore(tmp_path / "s")


def test_another_identity_is_refused_by_field(tmp_path, client):
    kit.write(tmp_path / "s", kit.Slices(), client)
    with pytest.raises(StoreError) as caught:
        EmbeddingStore(tmp_path / "s", {**kit.generation().identity, "weights": "bbb", "view": 1})
    message = str(caught.value)
    assert "weights: store has aaa, requested bbb" in message
    assert "view: store has None, requested 1" in message
    assert "size_px" not in message
    assert "ichpipe extract" in message


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (kit.Slices((3, 1, 4, 2, 1)), r"1 of 5 series are missing, the first is 1\.4"),
        (kit.Slices((3, 1, 5, 2)), r"1 series have other slices than the index, the first is 1\.2"),
        (kit.Slices(contents={"1.3.1": "edited"}), r"other slices than the index, the first is 1\.3"),
    ],
)
def test_rows_that_are_not_those_of_the_index_are_refused(tmp_path, client, wanted, message):
    kit.write(tmp_path / "s", kit.Slices(), client)
    with pytest.raises(StoreError, match=message):
        EmbeddingStore(tmp_path / "s", kit.generation().identity, wanted.rows)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[:4])
def test_the_rows_of_a_series_must_stand_together(order):
    names = [("1.1", "1.2", "1.1")[at] for at in order]
    columns = names, names, [str(at) for at in order], [kit.digest(str(at)) for at in order]
    if names[0] == names[2]:
        with pytest.raises(StoreError, match="must be contiguous"):
            Rows.of(*columns)
    else:
        assert len(Rows.of(*columns).series_uid) == 2


def test_known_arrays_are_stored_beside_their_rows(tmp_path, client):
    slices = kit.Slices()

    def extra(rows):
        return {"augmentation": np.asarray(rows, np.float32)[:, None] * 10}

    kit.write(tmp_path / "s", slices, client, extra=extra)
    (segment,) = (tmp_path / "s").glob("*/segment-*")
    found = zarr.open_group(str(segment), mode="r")
    np.testing.assert_array_equal(found["augmentation"][:, 0], np.arange(10) * 10)


@pytest.mark.parametrize("rows", [slice(0, 4), slice(8, 10)], ids=["whole", "last, shorter"])
@pytest.mark.parametrize("kind", layout.ROW_ARRAYS)
def test_our_chunk_files_are_those_of_zarr(tmp_path, monkeypatch, kind, rows):
    slices, made, files = kit.Slices(), kit.generation(), []
    for name, plain in (("ours", True), ("zarr's", False)):
        place = StoreLocation(str(tmp_path / name))
        group = layout.create_generation(layout.create_root(place), made)
        segment = layout.create_segment(group, slices.rows.source, made.chunk_rows, {})
        array = layout.array(layout.subgroup(group, segment.name), kind)
        monkeypatch.setattr(layout, "is_plain", lambda _array, plain=plain: plain)
        values = kit.features(slices.inputs[rows])[kind == "logit"]
        write_chunk(place, array, rows, values)
        files.append({k: v for k, v in kit.all_bytes(tmp_path / name).items() if "/c/" in k and kind in k})
    assert len(files[0]) == 1
    assert files[0] == files[1]


class Counted(str):
    """An input that can be counted: the garbage collector knows nothing of plain strings."""


class CountedInputs(list):
    def __getitem__(self, row):
        found = super().__getitem__(row)
        return list(map(Counted, found)) if isinstance(row, slice) else Counted(found)


@pytest.mark.soak
def test_inputs_of_finished_chunks_are_let_go(tmp_path):
    slices = kit.Slices([4] * 60)
    work = Work(CountedInputs(slices.inputs), kit.maker(), lambda: connect(1, None))
    alive = []
    for _ in update(StoreLocation(tmp_path), kit.generation(), slices.rows, work):
        gc.collect()
        alive.append(sum(type(one) is Counted for one in gc.get_objects()))
    assert len(alive) == 61  # sixty chunks
    assert 0 < max(alive) <= 4 * 10  # those in flight and in the last message of each kind, not all


# Many chunks


@pytest.fixture(scope="module")
def many_chunks(client, tmp_path_factory):
    """Two arrays of 300 chunks, each of one row."""
    slices, path = kit.Slices((1,) * 300), tmp_path_factory.mktemp("many") / "store"
    kit.write(path, slices, client, made=kit.generation(1))
    return path, slices


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what Linux lists")
def test_read_chunks_hold_no_file_open(many_chunks):
    resource = pytest.importorskip("resource")
    path, slices = many_chunks
    store = EmbeddingStore(path)
    expected = {uid: slices.expected(uid)[0].astype(np.float16) for uid in slices.series}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 50, hard))
    try:
        rows = {uid: store.series(uid).embedding for uid in expected}  # views, all kept
        assert len(list(Path("/proc/self/fd").iterdir())) < n_open + 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(np.array_equal(rows[uid], expected[uid]) for uid in expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts what Linux lists")
def test_a_process_maps_a_limited_number_of_chunks(many_chunks, monkeypatch):
    path, slices = many_chunks

    def maps():
        return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    monkeypatch.setattr(chunks, "MAX_MAPPED", 20)
    stores = [EmbeddingStore(path) for _ in range(2)]
    for _ in range(2):
        for uid in dict.fromkeys(slices.series):
            for store in stores:
                assert np.array_equal(store.series(uid).embedding, slices.expected(uid)[0].astype(np.float16))
    assert 0 < maps() <= 21
    del stores, store
    assert maps() == 0
