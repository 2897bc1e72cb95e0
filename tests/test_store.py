"""The store alone: rows come back as they were computed, damage is refused, and nothing is computed twice."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.fingerprint import FORMAT_VERSION
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.cache.writer import disagreement, write_store
from ichpipe.cluster import connect

DOC = Path(__file__).parents[1] / "docs" / "store-format.md"
DIM, CLASSES = 5, ("any", "other")
LENGTHS = (3, 1, 4, 2)  # ten rows: three chunks of four, the last one short


@pytest.fixture(scope="module")
def client():
    this = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(this)  # worker processes can't import a test file
    with connect(1, None) as found:
        yield found
    cloudpickle.unregister_pickle_by_value(this)


def make_plan(lengths=LENGTHS, chunk_rows=4, **fingerprint):
    series = tuple(f"1.2.{number}" for number in range(len(lengths)))
    sops = tuple(f"{uid}.{row}" for uid, length in zip(series, lengths, strict=True) for row in range(length))
    made_by = {"weights": "aaa", "size_px": 32, "windows": [[40.0, 80.0]], **fingerprint}
    return layout.StorePlan(sops, series, tuple(lengths), DIM, CLASSES, chunk_rows, made_by)


def features(inputs):
    """Features that depend on the input's text alone, over several orders of magnitude."""
    rows = [np.random.default_rng(list(name.encode())).normal(size=DIM + len(CLASSES)) for name in inputs]
    values = np.exp(3 * np.array(rows)).astype(np.float32)
    return values[:, :DIM], values[:, DIM:]


def maker(journal=None, compute=features):
    """What `write_store` wants; every input that is computed is written into ``journal``.

    A file, because Dask hands a copy of the function even to a worker in this process.
    """

    def make(_worker):
        def run(inputs):
            if journal is not None:
                with journal.open("a") as handle:
                    handle.writelines(f"{name}\n" for name in inputs)
            return compute(inputs)

        return run

    return make


def write(folder, plan, client, make=None):
    path = folder / "embeddings.zarr"
    yielded = list(write_store(path, folder / "building.zarr", plan, list(plan.sop_uids), make or maker(), client))
    assert sum(yielded) == plan.n_rows
    return path


def computed(journal):
    return sorted(journal.read_text().split()) if journal.exists() else []


def interrupt(folder, plan, client, *, after):
    """Leave a building folder as a killed run does: `after` chunks are whole, the rest is absent."""
    path = write(folder, plan, client)
    building = folder / "building.zarr"
    path.rename(building)
    set_attribute(building, complete=False)
    for chunk in range(after, plan.n_chunks):
        for file in layout.chunk_files(building, chunk):
            file.unlink()
    return building


def set_attribute(path, **attributes):
    zarr.open_group(str(path), mode="r+").attrs.update(attributes)


def all_bytes(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def read_all(path):
    store = EmbeddingStore(path)
    return [store.series(uid) for uid in store.series_uids]


# What is written comes back


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), chunk_rows=st.integers(1, 20))
def test_round_trip_of_any_series_and_chunks(client, lengths, chunk_rows):
    plan = make_plan(lengths, chunk_rows)
    with tempfile.TemporaryDirectory() as folder:
        store = EmbeddingStore(write(Path(folder), plan, client), plan.fingerprint)
        assert (len(store), store.embedding_dim, store.classes) == (sum(lengths), DIM, CLASSES)
        assert tuple(store.series_uids) == plan.series_uids
        for uid, length in zip(plan.series_uids, lengths, strict=True):
            one = store.series(uid)
            assert one.sop_uids == tuple(f"{uid}.{row}" for row in range(length))
            embedding, logit = features(one.sop_uids)
            np.testing.assert_array_equal(one.logit, logit)
            np.testing.assert_array_equal(one.embedding, embedding.astype(np.float16))


def test_series_are_found_by_uid_in_any_order(tmp_path, client):
    store = EmbeddingStore(write(tmp_path, make_plan(), client))
    for uid in reversed(store.series_uids):
        assert all(sop.startswith(f"{uid}.") for sop in store.series(uid).sop_uids)
    with pytest.raises(StoreError, match=r"9\.9 is not among the 4"):
        store.series("9.9")


def test_half_precision_bound_holds_in_a_store(tmp_path, client):
    for one in read_all(write(tmp_path, make_plan(), client)):
        wanted = features(one.sop_uids)[0]
        np.testing.assert_allclose(one.embedding.astype(np.float64), wanted, rtol=2**-11, atol=2**-25)


# Work is shared and resumed


def test_number_of_workers_and_of_chunks_changes_no_row(tmp_path, client):
    plan = make_plan(chunk_rows=2)
    alone = write(tmp_path / "alone", plan, client)
    with connect(2, None) as several:
        assert len(several.scheduler_info()["workers"]) == 2
        together = write(tmp_path / "together", plan, several)
    assert all_bytes(alone) == all_bytes(together)
    one_chunk = write(tmp_path / "one", make_plan(chunk_rows=100), client)
    for left, right in zip(read_all(alone), read_all(one_chunk), strict=True):
        assert left.embedding.tobytes() == right.embedding.tobytes()
        assert left.logit.tobytes() == right.logit.tobytes()


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_resume_computes_only_the_missing_rows(tmp_path, client, after):
    plan, journal = make_plan(), tmp_path / "computed"
    undisturbed = all_bytes(write(tmp_path / "whole", plan, client))
    interrupt(tmp_path, plan, client, after=after)
    path = write(tmp_path, plan, client, maker(journal))
    assert computed(journal) == sorted(plan.sop_uids[4 * after :])
    assert all_bytes(path) == undisturbed


def test_chunk_killed_between_its_two_files_is_computed_again(tmp_path, client):
    plan, journal = make_plan(), tmp_path / "computed"
    building = interrupt(tmp_path, plan, client, after=plan.n_chunks)
    layout.chunk_files(building, 1)[1].unlink()
    orphan = building / "embedding" / "c" / "1" / "0.abc.partial"
    orphan.write_bytes(b"half a chunk")
    path = write(tmp_path, plan, client, maker(journal))
    assert computed(journal) == sorted(plan.sop_uids[4:8])
    assert not list(path.rglob("*.partial"))


def test_failure_in_the_middle_keeps_what_is_done(tmp_path, client):
    plan = make_plan(chunk_rows=1)

    def fails_at_last(inputs):
        if plan.sop_uids[-1] in inputs:
            raise OSError("disk is gone")
        return features(inputs)

    with pytest.raises(OSError, match="disk is gone"):
        write(tmp_path, plan, client, maker(compute=fails_at_last))
    assert not (tmp_path / "embeddings.zarr").exists()
    journal = tmp_path / "computed"
    write(tmp_path, plan, client, maker(journal))
    assert computed(journal) == [plan.sop_uids[-1]]


@pytest.mark.parametrize(
    "changed", [make_plan(weights="bbb"), make_plan(chunk_rows=3)], ids=["fingerprint", "chunk_rows"]
)
def test_building_folder_of_something_else_is_started_anew(tmp_path, client, changed):
    interrupt(tmp_path, make_plan(), client, after=2)
    journal = tmp_path / "computed"
    path = write(tmp_path, changed, client, maker(journal))
    assert computed(journal) == sorted(changed.sop_uids)
    assert EmbeddingStore(path).fingerprint == changed.fingerprint


def test_new_store_replaces_the_old_one(tmp_path, client):
    write(tmp_path, make_plan(), client)
    path = write(tmp_path, make_plan((2, 2), weights="bbb"), client)
    assert len(EmbeddingStore(path)) == 4
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# What is not whole, or not the one asked for, is refused


def test_other_fingerprint_is_refused_by_field(tmp_path, client):
    plan = make_plan()
    path = write(tmp_path, plan, client)
    assert not disagreement(path, plan.fingerprint)
    wanted = {**plan.fingerprint, "weights": "bbb", "rows": "ccc"}
    assert disagreement(path, wanted)
    with pytest.raises(StoreError) as caught:
        EmbeddingStore(path, wanted)
    message = str(caught.value)
    assert "weights: store has aaa, wanted bbb" in message
    assert "rows: store has None, wanted ccc" in message
    assert "size_px" not in message
    assert "ichpipe extract" in message


def test_incomplete_store_is_refused(tmp_path, client):
    plan = make_plan()
    building = interrupt(tmp_path, plan, client, after=1)
    assert disagreement(building, plan.fingerprint)
    with pytest.raises(StoreError, match="not complete"):
        EmbeddingStore(building)


def test_a_finished_store_that_lost_a_chunk_is_not_current(tmp_path, client):
    plan = make_plan()
    path = write(tmp_path, plan, client)
    layout.chunk_files(path, 1)[1].unlink()
    assert disagreement(path, plan.fingerprint) == ["1 chunks are missing, the first is number 1"]


def test_absent_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(StoreError, match="does not exist; run: ichpipe extract"):
        EmbeddingStore(tmp_path / "embeddings.zarr")
    with pytest.raises(StoreError, match="no Zarr v3 group"):
        EmbeddingStore(tmp_path)
    zarr.open_group(str(tmp_path / "other"), mode="w", zarr_format=3)
    with pytest.raises(StoreError, match="not an ichpipe embedding store"):
        EmbeddingStore(tmp_path / "other")


def test_newer_format_is_refused(tmp_path, client):
    path = write(tmp_path, make_plan(), client)
    set_attribute(path, format_version=FORMAT_VERSION + 1)
    with pytest.raises(StoreError, match=f"has format {FORMAT_VERSION + 1}.*update ichpipe"):
        EmbeddingStore(path)


ARRAYS = ["embedding", "logit", "sop_uid", "series_uid", "series_offset"]


def chunks_of(path, name):
    return sorted(file for file in (path / name / "c").rglob("*") if file.is_file())


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("place", [0.0, 0.5, 0.99], ids=["first", "middle", "checksum"])
def test_one_flipped_bit_is_refused(tmp_path, client, name, place):
    path = write(tmp_path, make_plan(), client)
    file = chunks_of(path, name)[-1]
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=f"{name} is damaged"):
        read_all(path)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("kept", [0, 3, -1])
def test_cut_chunk_is_refused(tmp_path, client, name, kept):
    path = write(tmp_path, make_plan(), client)
    file = chunks_of(path, name)[0]
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(StoreError, match=f"{name} is damaged"):
        read_all(path)


@pytest.mark.parametrize("name", ["embedding", "logit"])
def test_deleted_chunk_names_the_first_series(tmp_path, client, name):
    path = write(tmp_path, make_plan(), client)
    chunks_of(path, name)[1].unlink()  # rows 4 to 7, all of the third series
    with pytest.raises(StoreError, match=r"4 rows are missing, the first in series 1\.2\.2;"):
        read_all(path)


@pytest.mark.parametrize("name", ["sop_uid", "series_uid", "series_offset"])
def test_deleted_chunk_of_the_row_names_is_refused(tmp_path, client, name):
    path = write(tmp_path, make_plan(), client)
    chunks_of(path, name)[0].unlink()
    with pytest.raises(StoreError, match=r"names of rows are incomplete.*ichpipe extract"):
        EmbeddingStore(path)


@pytest.mark.parametrize("name", ARRAYS)
def test_deleted_array_is_refused(tmp_path, client, name):
    path = write(tmp_path, make_plan(), client)
    (path / name / "zarr.json").unlink()
    with pytest.raises(StoreError, match=f"'{name}' is missing"):
        read_all(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65520.0, -1e9])
@pytest.mark.parametrize("which", [0, 1], ids=["embedding", "logit"])
def test_features_that_half_precision_can_not_hold_are_refused(tmp_path, client, bad, which):
    plan = make_plan()

    def diverged(inputs):
        outputs = features(inputs)
        if "1.2.2.1" in inputs:
            outputs[which][inputs.index("1.2.2.1"), -1] = bad
        return outputs

    with pytest.raises(StoreError, match=r"1 slices have features.*first is 1\.2\.2\.1;"):
        write(tmp_path, plan, client, maker(compute=diverged))
    assert not (tmp_path / "embeddings.zarr").exists()


def test_features_of_another_width_are_refused(tmp_path, client):
    def narrow(inputs):
        embedding, logit = features(inputs)
        return embedding[:, 1:], logit

    with pytest.raises(StoreError, match=r"shape \(4, 4\), the store wants \(4, 5\)"):
        write(tmp_path, make_plan(), client, maker(compute=narrow))


# The page that describes it


def test_documented_snippet_reads_what_the_reader_reads(tmp_path, client, monkeypatch):
    path = write(tmp_path, make_plan(), client)
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile(snippet, str(DOC), "exec"), names)  # noqa: S102 - our own page
    series = read_all(path)
    assert list(names["series"]) == [one.series_uid for one in series]
    for one in series:
        found = names["series"][one.series_uid]
        assert tuple(found["sop_uids"]) == one.sop_uids
        np.testing.assert_array_equal(found["embedding"], one.embedding)
        np.testing.assert_allclose(found["probability"], 1 / (1 + np.exp(-one.logit.astype(float))), rtol=1e-4)


def test_cache_loads_without_torch_and_dicom():
    code = (
        "import sys, ichpipe.cache.reader, ichpipe.cache.writer\n"
        "print(sorted({'torch', 'timm', 'pydicom', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split("\n")[0] in ("[]", "['pandas']")  # dask itself may load pandas
