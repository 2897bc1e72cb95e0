"""Tables as users damage them: one clear error that names file, line and remedy, and never a traceback."""

import gzip
import random

import pytest
from score_kit import KAGGLE, error, long_rows, make, score, write_long, write_wide

from ichpipe.common.errors import IchpipeError
from ichpipe.params.schema import EvaluateParams
from ichpipe.stages.score import run

RSNA = ("--format", "rsna")


@pytest.fixture
def tables():
    return make()


@pytest.fixture
def paths(tables, tmp_path):
    """Labels as Kaggle's long table, predictions as a wide one."""
    labels, predictions = tables
    return write_wide(predictions, tmp_path / "p.csv"), write_long(labels, tmp_path / "l.csv")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("nan", "no probability"),
        ("1.01", "no probability"),
        ("-0.1", "not logits"),
        ("inf", "no probability"),
        ("", "not a number"),
        ("high", "not a number"),
        ('"0,5"', "not a number"),
    ],
)
def test_a_bad_value_is_named_with_file_and_line(tables, tmp_path, capsys, value, complaint):
    labels, predictions = tables
    truth = write_long(labels, tmp_path / "l.csv")
    lines = write_wide(predictions, tmp_path / "w.csv").read_text().splitlines()
    lines[8] = ",".join([*lines[8].split(",")[:-1], value])
    lines.insert(3, "")  # an empty line counts as a line
    (tmp_path / "w.csv").write_text("\n".join(lines) + "\n")
    message = error(capsys, tmp_path / "w.csv", truth, *RSNA)
    assert complaint in message
    assert f"{tmp_path / 'w.csv'}, line 10: column any" in message
    rows = long_rows(predictions)
    rows[41] = f"{rows[41].split(',')[0]},{value}"
    message = error(capsys, write_long(None, tmp_path / "p.csv", rows), truth, *RSNA)
    assert complaint in message
    assert f"{tmp_path / 'p.csv'}, line 43: column Label" in message


@pytest.mark.parametrize(
    ("row", "complaint"),
    [("ID_a_epidurall,0.5", "unknown class"), ("epidural,0.5", "<SOPInstanceUID>_<class>"), ("_any,0.5", "no SOPInst")],
)
def test_a_bad_id_is_named_with_file_and_line(tables, tmp_path, capsys, row, complaint):
    labels, predictions = tables
    bad = write_long(None, tmp_path / "p.csv", [*long_rows(predictions), row])
    message = error(capsys, bad, write_long(labels, tmp_path / "l.csv"), *RSNA)
    assert complaint in message
    assert "line 362" in message


def test_tables_in_the_wrong_places_are_recognised(paths, capsys):
    assert "in this order" in error(capsys, *paths[::-1], *RSNA)


def test_an_absent_or_misspelt_class_column_is_named(tables, tmp_path, capsys):
    labels, predictions = tables
    truth = write_long(labels, tmp_path / "l.csv")
    bad = write_wide(predictions.rename(columns={"epidural": "edh"}), tmp_path / "p.csv", ["edh", *KAGGLE[1:]])
    message = error(capsys, bad, truth, *RSNA)
    assert "lacks epidural" in message
    assert "its columns: ID, edh" in message
    unnamed = predictions[KAGGLE].to_csv(index=False)
    (tmp_path / "p.csv").write_text(unnamed)
    assert "lacks the slices" in error(capsys, tmp_path / "p.csv", truth, *RSNA)


def test_byte_order_mark_and_line_ends_pass(paths):
    expected, _ = score(*paths, *RSNA)
    for path in paths:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert score(*paths, *RSNA)[0] == expected


def cut(text):
    return gzip.compress(text)[:-40]


def with_a_short_line(text):
    lines = text.split(b"\n")
    lines[4] = lines[4].rpartition(b",")[0]
    return b"\n".join(lines)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda text: text.decode().encode("utf-16"), "save it as CSV UTF-8"),
        (lambda text: text.replace(b"\nID_", b"\n\xc4D_", 1), "line 2: not UTF-8"),
        (lambda text: text.replace(b",", b";"), "save it with commas"),
        (lambda text: text.replace(b"epidural", b"any", 1), "names any twice"),
        (with_a_short_line, "line 5 has 6 cells where the heading has 7"),
        (lambda text: text.partition(b"\n")[0] + b"\n", "no rows"),
        (lambda text: text[:0], "Empty CSV file"),
        (cut, "Compressed file ended"),
        (lambda text: b"PK\x03\x04" + text, "zip archive"),
        (lambda text: b"PAR1" + text, "parquet"),
    ],
)
def test_another_encoding_or_a_damaged_file_is_one_clear_error(paths, capsys, damage, complaint):
    paths[0].write_bytes(damage(paths[0].read_bytes()))
    message = error(capsys, *paths, *RSNA)
    assert complaint in message
    assert str(paths[0]) in message


def test_absent_files_and_folders(paths, tmp_path, capsys):
    assert "absent.csv does not exist" in error(capsys, tmp_path / "absent.csv", paths[1], *RSNA)
    assert "is a folder" in error(capsys, paths[0], tmp_path, *RSNA)


def changed(content, generator):
    """Change a file in one to five places, as a slip of an editor or a disk would."""
    content = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 5])):
        place, length = generator.randrange(len(content)), generator.choice([1, 3, 20])
        new = generator.choice([b"", b",", b"\n", b'"', b"\x00", b"nan", b"-", b"\xff\xfe", b"_any", b"1e400"])
        content[place : place + generator.choice([0, length])] = new
        if generator.random() < 0.1:
            del content[place:]
        content = content or bytearray(b"I")
    return bytes(content)


@pytest.mark.parametrize("form", ["long", "wide", "gz", "parquet"])
def test_any_damage_ends_in_figures_or_in_one_error(tmp_path, form):
    labels, predictions = make(n=12, patients=3)
    truth, path = write_long(labels, tmp_path / "l.csv"), tmp_path / "p.csv"
    if form == "parquet":
        predictions.to_parquet(path)
    else:
        (write_long if form == "long" else write_wide)(predictions, path)
    content = gzip.compress(path.read_bytes()) if form == "gz" else path.read_bytes()
    generator, messages = random.Random(0), []  # noqa: S311
    for _ in range(120):
        path.write_bytes(changed(content, generator))
        try:
            run("rsna", path, truth, None, EvaluateParams(bootstrap_samples=2))
        except IchpipeError as caught:
            messages.append(str(caught))
    assert len(messages) > 60
    assert all(str(path) in message for message in messages)
