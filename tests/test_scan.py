"""Files to ordered slices, and the reason for every one that is left out."""

import gc
import multiprocessing
import os
import signal

import numpy as np
import pandas as pd
import pytest

from ichpipe.common.errors import DataError
from ichpipe.dicom.archive import list_files
from ichpipe.index import scan
from ichpipe.index.scan import read_headers

COLUMNS = {*scan.HEADER_SCHEMA.names, "slice_index", "position_mm", "spacing_mm"} - {"reason", "code", "size", "stamp"}


def scan_folder(folder, workers=1):
    return scan.scan([folder], workers)


def assert_same(tables, others):
    for table, other in zip(tables, others, strict=True):
        pd.testing.assert_frame_equal(table, other)


def test_every_file_is_in_exactly_one_table(tmp_path, write_series, write_ct):
    write_series("a", [3, 1, 2], series="1.2.3")
    write_series("b", [0, 5], series="1.2.4", patient="P2")
    write_ct("c/scout", series="1.2.5", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (tmp_path / "c/notes.txt").write_text("hello")
    index, rejected = scan_folder(tmp_path)
    paths = [one.path for one in list_files([tmp_path]).files]
    assert sorted([*index["path"], *rejected["path"]]) == paths
    assert set(index.columns) == COLUMNS
    assert index["position_mm"].tolist() == [1, 2, 3, 0, 5]
    assert rejected["reason"].str.len().gt(5).all()


def test_workers_do_not_change_the_result(tmp_path, write_series, monkeypatch):
    write_series("a", [3, 1, 2])
    (tmp_path / "a/odd").write_text("x")
    alone = scan_folder(tmp_path)
    assert_same(alone, scan_folder(tmp_path, 2))
    monkeypatch.setattr(scan, "PROCESSES_FROM", 2)
    assert_same(alone, scan_folder(tmp_path, 2))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_of_the_caller_is_left_alone(tmp_path, write_series, monkeypatch, enabled):
    write_series("a", [1, 2, 3])
    seen, read = [], scan.read_header
    monkeypatch.setattr(scan, "read_header", lambda *path, **how: seen.append(gc.isenabled()) or read(*path, **how))
    if not enabled:
        gc.disable()
    try:
        assert len(scan_folder(tmp_path)[0]) == 3
        assert [*seen, gc.isenabled()] == [enabled] * 4
    finally:
        gc.enable()


def kill_at_the_second_chunk(files):
    if any(one.path.endswith("/kill") for one in files):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_headers(files)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on; nothing runs in the other threads
def test_a_killed_process_is_said_and_what_was_read_is_kept(tmp_path, write_series, monkeypatch):
    write_series("a", [3, 1, 2, 4])
    (tmp_path / "a/kill").write_text("x")
    monkeypatch.setattr(scan, "PROCESSES_FROM", 2)
    monkeypatch.setattr(scan, "CHUNK_FILES", 4)
    forked = multiprocessing.get_context("fork")  # a new process could not import this file's function
    with monkeypatch.context() as patch:
        patch.setattr(scan, "read_headers", kill_at_the_second_chunk)
        patch.setattr(multiprocessing, "get_context", lambda _kind: forked)
        with pytest.raises(DataError, match=r"process that reads headers was killed.*fewer --workers"):
            scan.scan([tmp_path / "a"], 2, tmp_path / "cache")
    assert_same(scan.scan([tmp_path / "a"], 1, tmp_path / "cache"), scan_folder(tmp_path / "a"))


def test_nothing_to_scan_gives_two_empty_tables_with_their_columns(tmp_path):
    index, rejected = scan.scan([tmp_path], 1)
    assert (set(index.columns), len(index)) == (COLUMNS, 0)
    assert (list(rejected.columns), len(rejected)) == (scan.REJECTED, 0)


def test_of_one_sop_uid_the_first_file_is_kept(tmp_path, write_ct):
    first = write_ct("a", number=1)
    (tmp_path / "b").write_bytes(first.read_bytes())
    write_ct("c", number=1, z=9)
    index, rejected = scan_folder(tmp_path)
    assert index["path"].tolist() == [first.as_posix()]
    reasons = rejected.set_index("path")["reason"]
    assert "a copy of" in reasons[(tmp_path / "b").as_posix()]
    assert "other content" in reasons[(tmp_path / "c").as_posix()]


def test_a_series_under_two_patients_is_rejected_whole(tmp_path, write_ct):
    write_ct("a", number=1, patient="P1")
    write_ct("b", number=2, patient="P2")
    kept = write_ct("c", series="1.2.9")
    index, rejected = scan_folder(tmp_path)
    assert index["path"].tolist() == [kept.as_posix()]
    assert rejected["reason"].str.contains("more than one patient").all()


def test_a_compressed_slice_that_does_not_decode_is_rejected(tmp_path, write_ct):
    path = write_ct(pixels=np.zeros((32, 32), np.int16))
    data = path.read_bytes()
    syntax = b"1.2.840.10008.1.2.1\0"
    path.write_bytes(data.replace(syntax, b"1.2.840.10008.1.2.5\0").replace(bytes(64), b"\xfe\xff\x00\xe0" + bytes(60)))
    index, rejected = scan_folder(tmp_path)
    assert index.empty
    assert "1.2.840.10008.1.2.5" in rejected["reason"][0]
