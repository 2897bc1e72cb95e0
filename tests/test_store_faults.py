"""Machines die and disks rot: never a wrong number, never half a store that looks whole, always resumable."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import store_kit as kit
import zarr

from ichpipe.cache import layout, maintenance
from ichpipe.cache.chunks import Chunks, DamagedChunkError
from ichpipe.cache.errors import StoreError
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.reader import EmbeddingStore

FLIPS = 1000


@pytest.fixture(scope="module")
def whole(client, tmp_path_factory):
    """A store of 40 rows in ten chunks."""
    path = tmp_path_factory.mktemp("whole") / "store"
    kit.write(path, kit.Slices([4] * 10), client)
    return path


@pytest.fixture
def store(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "store")
    return tmp_path / "store"


SLICES = kit.Slices([4] * 10)


def program(*arguments, **options):
    return subprocess.Popen([sys.executable, kit.__file__, *map(str, arguments)], text=True, **options)


# Flipped bits


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_found_and_none_is_read(store):
    """One bit at a time, anywhere in a chunk file, checksum included."""
    draw = random.Random(1)  # noqa: S311
    files = kit.chunk_files(store)
    manifest = EmbeddingStore(store)
    refused = 0
    for _ in range(FLIPS):
        file = draw.choice(files)
        content = file.read_bytes()
        bit = draw.randrange(8 * len(content))
        kit.flip(file, bit // 8, 1 << bit % 8)
        kind, chunk = file.parts[-4], int(file.parts[-2])
        array = layout.array(zarr.open_group(str(file.parents[3]), mode="r"), kind)
        with pytest.raises(DamagedChunkError, match="fails its checksum"):
            Chunks(StoreLocation(file.parents[3]), array).chunk(chunk)
        reader = EmbeddingStore(store)
        try:
            reader.read(manifest.series_uids[chunk], kind)  # chunks of four rows, series of four rows
        except StoreError:
            refused += 1
        kit.replace(file, content)
    assert refused == FLIPS


def test_verify_names_the_studies_of_a_flipped_bit_and_repair_costs_one_chunk(store, client, tmp_path):
    file = next(f for f in kit.chunk_files(store) if f.parts[-4] == "logit" and f.parts[-2] == "7")
    kit.flip(file, 3, 64)
    (problem,) = maintenance.verify(StoreLocation(store))
    assert (problem.array, problem.chunk, problem.what) == ("logit", 7, "fails its checksum")
    assert problem.studies == ["2.7"]
    with pytest.raises(StoreError, match=r"study 2\.7; run: ichpipe cache verify --repair"):
        EmbeddingStore(store).series("1.7")
    assert maintenance.repair(StoreLocation(store)) == [problem]
    journal = tmp_path / "computed"
    kit.write(store, SLICES, client, make=kit.maker(journal))
    assert kit.computed(journal) == [f"1.7.{row}" for row in range(4)]
    assert maintenance.verify(StoreLocation(store)) == []
    kit.assert_holds(store, SLICES)


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "long"])
@pytest.mark.parametrize("kind", layout.ROW_ARRAYS)
def test_a_chunk_that_is_not_whole_is_refused_named_and_computed_again(store, client, tmp_path, damage, kind):
    file = next(f for f in kit.chunk_files(store) if f.parts[-4] == kind and f.parts[-2] == "2")
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        kit.replace(file, {"cut": content[:-9], "empty": b"", "long": content + b"x"}[damage])
    with pytest.raises(StoreError, match=r"chunk 2 of .* study 2\.2"):
        EmbeddingStore(store).series("1.2")
    assert [problem.studies for problem in maintenance.verify(StoreLocation(store))] == [["2.2"]]
    journal = tmp_path / "computed"
    kit.write(store, SLICES, client, make=kit.maker(journal))  # its size tells: no repair is needed
    assert kit.computed(journal) == [f"1.2.{row}" for row in range(4)]
    kit.assert_holds(store, SLICES)


def test_damage_to_names_is_found_and_refused(store, client):
    """Manifest, sources and metadata: each file in turn has its middle byte changed."""
    names = [f for f in store.rglob("*") if f.is_file() and f not in kit.chunk_files(store)]
    assert len(names) > 15
    for file in names:
        content = file.read_bytes()
        kit.flip(file, len(content) // 2)
        try:
            read = {uid: EmbeddingStore(store).series(uid) for uid in dict.fromkeys(SLICES.series)}
        except (StoreError, UnicodeDecodeError):
            pass  # refused
        else:
            for uid, found in read.items():
                assert np.array_equal(found.logit, SLICES.expected(uid)[1]), file
        kit.replace(file, content)
    kit.assert_holds(store, SLICES)


# Killed, full, together


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_content(tmp_path):
    """The loop of fifty is benchmarks/kills.py; a few here."""
    n, draw = 24, random.Random(3)  # noqa: S311
    slices = kit.Slices([3] * n)
    path, kills = tmp_path / "store", 0
    for _ in range(4):
        process = program(path, n, stdout=subprocess.PIPE)
        process.stdout.readline()  # it has begun
        time.sleep(draw.uniform(0, 0.3))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        with contextlib.suppress(StoreError):  # either refused or right
            kit.assert_holds(path, slices)
    assert kills >= 2
    assert program(path, n, stdout=subprocess.DEVNULL).wait() == 0
    kit.assert_holds(path, slices)
    assert not list(path.rglob("*.partial"))
    assert maintenance.verify(StoreLocation(path)) == []
    assert maintenance.info(StoreLocation(path))["generations"][0]["rows_stored"] == 3 * n


def test_what_a_killed_writer_left_is_swept(store, client):
    orphan = kit.chunk_files(store)[0].with_name("0.abc.partial")
    orphan.write_bytes(b"half a chunk")
    kit.write(store, SLICES, client)
    assert not orphan.exists()


def test_two_writers_at_once_give_one_result(tmp_path):
    path, n = tmp_path / "store", 12
    both = [program(path, n, stdout=subprocess.PIPE) for _ in range(2)]
    output = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("waiting" in text for text in output) <= 1
    kit.assert_holds(path, kit.Slices([3] * n))
    facts = maintenance.info(StoreLocation(path))["generations"][0]
    assert (facts["segments"], facts["rows_stored"], facts["rows_unused"]) == (1, 3 * n, 0)
    assert sorted(text.count("wrote") for text in output) == [1, 10]  # nine chunks, once; and the look before each


def test_a_full_disk_is_an_error_and_what_was_written_stays(tmp_path, client):
    """A real error of the kernel: no file of the process may grow beyond 60 bytes, so the first chunk fails."""
    path, n = tmp_path / "store", 6
    slices = kit.Slices([3] * n)
    kit.write(path, kit.Slices([3] * 2), client)
    before = kit.all_bytes(path)
    process = program(path, n, 60, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert "File too large" in process.communicate(timeout=120)[1]
    assert process.returncode != 0
    kit.assert_holds(path, kit.Slices([3] * 2))
    assert all(kit.all_bytes(path)[name] == content for name, content in before.items())
    with pytest.raises(StoreError, match="series are missing"):
        EmbeddingStore(path, kit.generation().identity, slices.rows)
    kit.write(path, slices, client)
    kit.assert_holds(path, slices)


def test_reading_writes_nothing(store):
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in store.parent.rglob("*")}
    kit.assert_holds(store, SLICES)
    maintenance.verify(StoreLocation(store))
    maintenance.info(StoreLocation(store))
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in store.parent.rglob("*")} == before


def test_a_failing_slice_keeps_what_is_done(tmp_path, client):
    slices = kit.Slices([1] * 9)

    def fails_at_last(inputs):
        if "1.8.0" in inputs:
            raise OSError("disk is gone")
        return kit.features(inputs)

    made = kit.generation(1)
    with pytest.raises(OSError, match="disk is gone"):
        kit.write(tmp_path / "s", slices, client, made=made, make=kit.maker(compute=fails_at_last))
    with pytest.raises(StoreError, match="not complete"):
        EmbeddingStore(tmp_path / "s")
    journal = tmp_path / "computed"
    kit.write(tmp_path / "s", slices, client, made=made, make=kit.maker(journal))
    assert "1.8.0" in kit.computed(journal)
    assert len(kit.computed(journal)) <= 3  # tasks that were under way are all that is lost


# Not a store of ours, or not of this time


def test_absent_foreign_newer_and_older_stores_are_refused(tmp_path, store):
    with pytest.raises(StoreError, match="does not exist; run: ichpipe extract"):
        EmbeddingStore(tmp_path / "none.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="no Zarr v3 group"):
        EmbeddingStore(tmp_path / "folder")
    zarr.open_group(str(tmp_path / "other"), mode="w", zarr_format=3)
    with pytest.raises(StoreError, match="not an ichpipe embedding store"):
        EmbeddingStore(tmp_path / "other")
    for version, message in ((99, "update ichpipe"), (1, "never released; remove it")):
        attributes = json.loads((store / "zarr.json").read_text())
        attributes["attributes"]["format_version"] = version
        (store / "zarr.json").write_text(json.dumps(attributes))
        with pytest.raises(StoreError, match=message):
            EmbeddingStore(store)


def _turned(text):
    found = json.loads(text)
    grid = found["chunk_grid"]["configuration"]
    grid["chunk_shape"] = grid["chunk_shape"][::-1]
    return json.dumps(found)


def _shape(text, size):
    found = json.loads(text)
    found["shape"][0] = size
    return json.dumps(found)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("", lambda text: text.replace('"group"', '"x"')),
        ("", lambda _: "[" * 100_000),
        ("manifest-*/location", lambda text: text.replace('"shape": [', '"shape": [9', 1)),
        ("manifest-*/location", _turned),
        ("manifest-*/sop_uid", lambda text: _shape(text, 10**12)),
        ("manifest-*/series_offset", lambda text: _shape(text, 0)),
        ("segment-*/embedding", _turned),
    ],
)
def test_damaged_metadata_is_one_error_and_no_wrong_row(store, part, change):
    generation = next(path for path in store.iterdir() if path.is_dir())
    file = next(generation.glob(f"{part}/zarr.json")) if part else generation / "zarr.json"
    kit.replace(file, change(file.read_text()).encode())
    with pytest.raises(StoreError):
        kit.assert_holds(store, SLICES)
