"""Headers kept between runs: nothing is read twice, and nothing stale is believed."""

import os
import zipfile
from importlib import metadata

import pandas as pd
import pytest

from ichpipe.common.errors import NotOpenedError
from ichpipe.index import scan


@pytest.fixture
def folder(tmp_path, write_series):
    write_series("data/a", [0, 5, 10], series="1.2.1")
    write_series("data/b", [0, 5], series="1.2.2", patient="P2")
    (tmp_path / "data/notes").write_text("x")
    return tmp_path / "data"


@pytest.fixture
def read(monkeypatch):
    """The paths whose headers were read."""
    found, before = [], scan.read_header

    def note(path, **options):
        found.append(path.rpartition("/")[2])
        return before(path, **options)

    monkeypatch.setattr(scan, "read_header", note)
    return found


def same(one, other):
    for first, second in zip(one, other, strict=True):
        pd.testing.assert_frame_equal(first, second)


def test_what_has_not_changed_is_not_read_again(folder, tmp_path, read):
    alone = scan.scan([folder])
    first = scan.scan([folder], cache=tmp_path / "cache")
    del read[:]
    again = scan.scan([folder], cache=tmp_path / "cache")
    assert not read
    same(alone, first)
    same(alone, again)


def test_only_what_is_new_or_changed_is_read(folder, tmp_path, read, write_ct):
    scan.scan([folder], cache=tmp_path / "cache")
    del read[:]
    write_ct("data/a/1.2.1-1", series="1.2.1", number=1, z=20.0)
    write_ct("data/c/new", series="1.2.3")
    (folder / "b/1.2.2-1").unlink()
    index, rejected = scan.scan([folder], cache=tmp_path / "cache")
    assert sorted(read) == ["1.2.1-1", "new"]
    same((index, rejected), scan.scan([folder]))
    assert index["position_mm"].tolist() == [5, 10, 20, 5, 0]


def test_a_file_of_another_time_is_read_again_though_it_has_the_same_size(folder, tmp_path, read):
    scan.scan([folder], cache=tmp_path / "cache")
    del read[:]
    os.utime(folder / "notes", (1, 1))
    scan.scan([folder], cache=tmp_path / "cache")
    assert read == ["notes"]


def test_members_of_an_archive_are_known_by_their_checksum(folder, tmp_path, read):
    packed = tmp_path / "all.zip"

    def pack(names):
        with zipfile.ZipFile(packed, "w") as made:
            for name in names:
                made.write(folder / name, name)

    pack(["a/1.2.1-1", "a/1.2.1-2"])
    scan.scan([packed], cache=tmp_path / "cache")
    pack(["b/1.2.2-1", "a/1.2.1-2", "a/1.2.1-1"])
    del read[:]
    index, _ = scan.scan([packed], cache=tmp_path / "cache")
    assert read == ["1.2.2-1"]
    assert index["path"].tolist() == [f"{packed}/{name}" for name in ("a/1.2.1-1", "a/1.2.1-2", "b/1.2.2-1")]


def test_a_stopped_scan_goes_on_after_its_last_part(folder, tmp_path, read, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK_FILES", 2)
    before, cache = scan.read_headers, tmp_path / "cache"

    def stop(files):
        if len(read) == 4:
            raise KeyboardInterrupt
        return before(files)

    monkeypatch.setattr(scan, "read_headers", stop)
    with pytest.raises(KeyboardInterrupt):
        scan.scan([folder], cache=cache)
    monkeypatch.setattr(scan, "read_headers", before)
    assert len(list(cache.iterdir())) == 2
    found = scan.scan([folder], cache=cache)
    assert len(read) == 6
    assert [path.name for path in cache.iterdir()] == ["headers-000000.parquet"]
    same(found, scan.scan([folder]))


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda _data: b"", lambda data: data[:200] + data[300:]])
def test_a_damaged_part_is_read_anew(folder, tmp_path, read, damage):
    scan.scan([folder], cache=tmp_path / "cache")
    (part,) = (tmp_path / "cache").iterdir()
    part.write_bytes(damage(part.read_bytes()))
    del read[:]
    same(scan.scan([folder], cache=tmp_path / "cache"), scan.scan([folder]))
    assert len(read) == 12


def test_other_code_or_codecs_read_anew(folder, tmp_path, read, monkeypatch):
    scan.scan([folder], cache=tmp_path / "cache")
    del read[:]
    before = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0" if name == "python-gdcm" else before(name))
    scan.scan([folder], cache=tmp_path / "cache")
    assert len(read) == 6


def test_a_file_that_could_not_be_opened_is_tried_again(folder, tmp_path, read, monkeypatch):
    def refuse(_path, **_options):
        raise NotOpenedError("file can't be read: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(scan, "read_header", refuse)
        index, rejected = scan.scan([folder], cache=tmp_path / "cache")
    assert (len(index), len(rejected)) == (0, 6)
    same(scan.scan([folder], cache=tmp_path / "cache"), scan.scan([folder]))
