"""JSON Schemas: the committed copies are current, and they accept what is right and refuse what is wrong."""

import csv
import json
from pathlib import PurePosixPath

import jsonschema
import pytest
from click.testing import CliRunner
from import_kit import ROOT

from ichpipe.common.errors import ParamsError
from ichpipe.params.loading import read_yaml
from ichpipe.params.schema import Params, known_keys, load_params
from ichpipe.stages.cli import cli

NAMES = ("params", "predictions", "slices", "studies")
SETS = [ROOT / "params.yaml", *sorted((ROOT / "params").glob("*.yaml"))]


def committed(name):
    return json.loads((ROOT / "docs" / "schema" / f"{name}.json").read_text(encoding="utf-8"))


def faults(name, value):
    return [error.message for error in jsonschema.Draft7Validator(committed(name)).iter_errors(value)]


@pytest.mark.parametrize("name", NAMES)
def test_committed_schema_is_what_the_command_writes(name, tmp_path):
    printed = CliRunner().invoke(cli, ["schema", name], catch_exceptions=False).output
    remedy = f"run: ichpipe schema {name} --out docs/schema/{name}.json"
    assert printed == (ROOT / "docs" / "schema" / f"{name}.json").read_text(encoding="utf-8"), remedy
    result = CliRunner().invoke(cli, ["schema", name, "--out", str(tmp_path / "a" / "b.json")], catch_exceptions=False)
    assert result.exit_code == 0
    assert (tmp_path / "a" / "b.json").read_text(encoding="utf-8") == printed
    jsonschema.Draft7Validator.check_schema(json.loads(printed))


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.name)
def test_parameter_file_fits_the_schema_that_it_names(path):
    first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    mark, _, target = first.partition("=")
    assert mark == "# yaml-language-server: $schema"
    assert (path.parent / PurePosixPath(target)).samefile(ROOT / "docs" / "schema" / "params.json")
    assert faults("params", read_yaml(rest)) == []


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("fit-slices.epoch", 3, "epoch"),  # a misspelt key
        ("fit-slices.epochs", "three", "three"),  # text for a number
        ("prepare.val_fraction", 15, "15"),  # per cent
        ("finetune.precision", "float16", "float16"),  # a word that is none of the choices
        ("prepare.folds", 2.5, "2.5"),  # no whole number
    ],
)
def test_typical_mistakes_are_faults_here_and_for_the_program(path, key, value, word, tmp_path):
    raw = read_yaml(path.read_text(encoding="utf-8"))
    section, name = key.split(".")
    raw.setdefault(section, {})[name] = value
    found = faults("params", raw)
    assert len(found) == 1
    assert word in found[0]
    (tmp_path / "params.yaml").write_text(json.dumps(raw))
    with pytest.raises(ParamsError, match=name):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    "value", [{"sequence": {"a": {"cell": "rnn"}}}, {"windows": []}, {"windows": [{"level_hu": 40}]}, {"sections": {}}]
)
def test_mistakes_in_arms_windows_and_sections_are_faults(value):
    assert len(faults("params", value)) == 1


def test_defaults_and_shared_min_slices_fit():
    assert faults("params", {}) == []
    assert faults("params", Params().model_dump(mode="json", by_alias=True)) == []
    assert faults("params", {"sequence": {"min_slices": 5, "paper": {}}}) == []
    assert len(faults("params", {"sequence": {"min_slices": 0}})) == 1


def section_of(schema, words):
    """The schema of one section, by the names on the way to it; ARM is any arm."""
    node = schema
    for word in words:
        properties = node.get("properties", {})
        node = properties[word] if word in properties else node["additionalProperties"]
        node = node.get("items", node)
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def test_every_key_is_there_with_range_meaning_and_unit():
    schema = committed("params")
    for key in known_keys():
        words = key.split(".")
        assert words[-1] in section_of(schema, words[:-1])["properties"], key
    decay = section_of(schema, ["finetune"])["properties"]["layer_decay"]
    assert (decay["exclusiveMinimum"], decay["maximum"]) == (0, 1)
    weights = section_of(schema, ["fit-slices"])["properties"]["source_weights"]
    assert "how often an epoch shows a slice" in weights["description"]
    mm = section_of(schema, ["prepare"])["properties"]["mm_per_px"]
    assert "unit: mm per pixel" in mm["description"]
    assert "unit: mm" in section_of(schema, ["prepare", "selection"])["properties"]["thickness_mm"]["description"]


@pytest.fixture(scope="module")
def predicted(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("predicted")
    scans = run.data / "dicom"
    assert run("predict", scans, "--out", out / "plain").exit_code == 0
    assert run("predict", scans, "--out", out / "forced", "--force", "--uncalibrated").exit_code == 0
    return out


@pytest.mark.parametrize("kind", ["plain", "forced"])
def test_what_predict_writes_fits(predicted, kind):
    document = json.loads((predicted / kind / "predictions.json").read_text(encoding="utf-8"))
    assert document["studies"]
    assert faults("predictions", document) == []
    for name in ("slices", "studies"):
        rows = read_rows(predicted / kind / f"{name}.csv")
        assert rows
        assert faults(name, rows) == []
        assert ("forced" in rows[0]) == (kind == "forced")


def read_rows(path):
    """Rows of a CSV table, each value as JSON would hold it."""
    texts = {"patient_id", "study_uid", "series_uid", "sop_uid"}
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [{key: value if key in texts else json.loads(value.lower()) for key, value in row.items()} for row in rows]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda document: document.pop("model_sha256"), "model_sha256"),
        (lambda document: document["studies"][0]["findings"]["any"].update(probability=1.5), "1.5"),
        (lambda document: document["studies"][0]["slices"][0].pop("subdural"), "subdural"),
        (lambda document: document["studies"][0].update(patient_name="Doe^John"), "patient_name"),
        (lambda document: document.update(format_version=2), "1 was expected"),
    ],
)
def test_a_changed_document_does_not_fit(predicted, change, word):
    document = json.loads((predicted / "plain" / "predictions.json").read_text(encoding="utf-8"))
    change(document)
    found = faults("predictions", document)
    assert len(found) == 1
    assert word in found[0]


def test_columns_are_those_of_predict():
    from ichpipe.inference.predictor import SLICE_COLUMNS, STUDY_COLUMNS

    for name, columns in (("slices", SLICE_COLUMNS), ("studies", STUDY_COLUMNS)):
        assert committed(name)["items"]["required"] == columns
