"""Files below folders and inside zip archives."""

import multiprocessing
import os
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.common.errors import MissingFileError, UnreadableDicomError
from ichpipe.dicom.archive import list_files, read_file

LARGE = 1 << 20
NAMES = st.text("abc. é", min_size=1, max_size=6).filter(lambda name: name.strip(" .") == name)


def make_zip(path, files, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", **options) as made:
        for name, content in files.items():
            made.writestr(name, content)
    return path


def paths_below(*roots):
    return [one.path for one in list_files(roots).files]


def test_all_names_but_hidden_ones_once_and_sorted(tmp_path):
    for name in ("b/IM1", "a/x.dcm", "a/.hidden", ".git/y", "z", "__MACOSX/w"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = paths_below(tmp_path / "b", tmp_path, tmp_path / "z")
    assert found == [(tmp_path / name).as_posix() for name in ("a/x.dcm", "b/IM1", "z")]


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere"):
        list_files([tmp_path / "nowhere"])


@settings(deadline=None, max_examples=30)
@given(files=st.dictionaries(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=50), min_size=1))
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_as_they_were_put_in(tmp_path_factory, files, method):
    folder = tmp_path_factory.mktemp("zip")
    made = make_zip(folder / "a.zip", files, compression=method)
    found = list_files([folder]).files
    assert {one.path.removeprefix(f"{made.as_posix()}/") for one in found} == set(files)
    for one in found:
        content = read_file(one.path, LARGE)
        assert content == files[one.path.removeprefix(f"{made.as_posix()}/")]
        assert one.size == len(content)


def test_a_folder_within_an_archive_can_be_named(tmp_path):
    made = make_zip(tmp_path / "rsna.ZIP", {"x/train/1": b"1", "x/train/2": b"2", "x/test/3": b"3", "__MACOSX/x": b"4"})
    assert paths_below(made) == [f"{made}/x/{name}" for name in ("test/3", "train/1", "train/2")]
    assert paths_below(made / "x/train") == [f"{made}/x/train/{name}" for name in "12"]
    assert paths_below(made / "x/test/3") == [f"{made}/x/test/3"]
    with pytest.raises(MissingFileError, match=r"has no x/tr; see: unzip -l"):
        list_files([made / "x/tr"])


def test_a_folder_may_be_called_zip(tmp_path):
    (tmp_path / "a.zip").mkdir()
    (tmp_path / "a.zip/one").write_bytes(b"1")
    assert paths_below(tmp_path) == [f"{tmp_path}/a.zip/one"]
    assert read_file(f"{tmp_path}/a.zip/one", LARGE) == b"1"


def test_a_damaged_archive_is_named_and_the_rest_goes_on(tmp_path):
    good = make_zip(tmp_path / "good.zip", {"a": b"1"})
    (tmp_path / "bad.zip").write_bytes(good.read_bytes()[:-10])
    listing = list_files([tmp_path])
    assert [one.path for one in listing.files] == [f"{good}/a"]
    assert listing.damaged == [(f"{tmp_path}/bad.zip", "damaged zip archive (BadZipFile); get it again")]


def test_a_flipped_byte_in_a_member_is_refused(tmp_path):
    made = make_zip(tmp_path / "a.zip", {"one": b"0123456789" * 10, "two": b"ok"})
    data = bytearray(made.read_bytes())
    data[data.index(b"0123456789") + 5] ^= 1
    made.write_bytes(data)
    with pytest.raises(UnreadableDicomError, match=r"damaged in its archive \(BadZipFile\)"):
        read_file(f"{made}/one", LARGE)
    assert read_file(f"{made}/two", LARGE) == b"ok"


def test_a_bomb_is_not_unfolded(tmp_path):
    made = make_zip(tmp_path / "a.zip", {"bomb": bytes(4 << 20)}, compression=zipfile.ZIP_DEFLATED)
    assert made.stat().st_size < 10_000
    with pytest.raises(UnreadableDicomError, match="too large"):
        read_file(f"{made}/bomb", LARGE)
    data = made.read_bytes()
    size = (4 << 20).to_bytes(4, "little")
    assert data.count(size) == 2
    made.write_bytes(data.replace(size, (100).to_bytes(4, "little")))  # a directory that lies
    with pytest.raises(UnreadableDicomError, match="damaged in its archive"):
        read_file(f"{made}/bomb", LARGE)


def test_an_archive_that_was_replaced_is_opened_again(tmp_path):
    made = make_zip(tmp_path / "a.zip", {"one": b"old"})
    assert read_file(f"{made}/one", LARGE) == b"old"
    make_zip(made, {"one": b"newer"})
    assert read_file(f"{made}/one", LARGE) == b"newer"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on
def test_forked_processes_do_not_share_the_position(tmp_path):
    files = {str(number): bytes([number]) * 20_000 for number in range(40)}
    made = make_zip(tmp_path / "a.zip", files)
    assert read_file(f"{made}/0", LARGE) == files["0"]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(read_file, [(f"{made}/{name}", LARGE) for name in files] * 3, chunksize=1)
    assert found == list(files.values()) * 3


@pytest.mark.parametrize(("name", "reason"), [("a.zip/none", "no such file"), ("none", "can't be read: No such file")])
def test_what_is_not_there_is_said(tmp_path, name, reason):
    make_zip(tmp_path / "a.zip", {"one": b"1"})
    with pytest.raises(UnreadableDicomError, match=reason):
        read_file(f"{tmp_path}/{name}", LARGE)


def test_encrypted_members_are_refused(tmp_path):
    made = make_zip(tmp_path / "a.zip", {"one": b"1"})
    data = bytearray(made.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    made.write_bytes(data)
    with pytest.raises(UnreadableDicomError, match="encrypted"):
        read_file(f"{made}/one", LARGE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_said_to_be_so(tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    (tmp_path / "x").chmod(0)
    with pytest.raises(UnreadableDicomError, match="can't be read: Permission denied"):
        read_file(f"{tmp_path}/x", LARGE)


def test_a_dicomdir_stands_for_its_folder(tmp_path):
    for name in ("a/DICOMDIR", "a/IM/1", "b/2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert paths_below(tmp_path / "a/DICOMDIR") == [f"{tmp_path}/a/DICOMDIR", f"{tmp_path}/a/IM/1"]
