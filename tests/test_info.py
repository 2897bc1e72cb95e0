"""`ichpipe info`: what it says, that it says it of broken machines too, and what it never says."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
from click.testing import CliRunner
from conftest import PROGRAM
from import_kit import ROOT

from ichpipe.stages.cli import cli

SECTIONS = ["program", "packages", "extras", "codecs", "devices", "model", "locale", "environment"]
WORD = "k9-Tr0ub4dor"


def info(*arguments, folder=None, **environment):
    """Run `ichpipe info` in a fresh interpreter: its standard output."""
    command = [*PROGRAM, "info", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=os.environ | environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def facts(*arguments, **environment):
    return json.loads(info("--json", *arguments, **environment))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What it says in a folder without a model."""
    return facts(folder=tmp_path_factory.mktemp("empty"))


def here(*arguments):
    """The same in this process, for tests that change what is installed."""
    result = CliRunner().invoke(cli, ["info", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_json_has_these_sections_and_none_failed(found):
    assert list(found) == ["format", "format_version", *SECTIONS]
    assert not [name for name in SECTIONS if found[name] and "error" in found[name]]
    assert found["program"]["ichpipe"] == metadata.version("ichpipe")
    assert found["packages"]["torch"]["version"] == metadata.version("torch")
    assert found["model"] is None
    assert found["devices"]["cores_allowed"] >= 1
    assert found["devices"]["memory_bytes"] > 2**28


def test_extras_are_those_of_the_package(found):
    assert list(found["extras"]) == metadata.metadata("ichpipe").get_all("Provides-Extra")
    assert "highdicom" in found["extras"]["sr"]["packages"]


def test_every_syntax_that_is_read_has_its_decoders(found):
    from ichpipe.dicom.dataset import READABLE

    codecs = found["codecs"]
    assert set(codecs) == READABLE
    assert "pydicom" in codecs["1.2.840.10008.1.2.5"]["decoders"]
    assert not codecs["1.2.840.10008.1.2.1"]["compressed"]


def test_text_fits_80_columns_and_needs_no_torch(tmp_path):
    code = f"import sys; sys.argv = ['ichpipe', 'info']; {PROGRAM[-1].partition(';')[0]}; import atexit; "
    code += "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("ichpipe ")
    assert max(map(len, done.stdout.splitlines())) <= 80
    loaded = done.stderr.strip() == "True"
    assert loaded == ("no device file" not in done.stdout)


@pytest.fixture
def without(monkeypatch):
    """Hide packages, as if they were not installed."""
    real = metadata.distribution

    def hide(*names):
        def distribution(name):
            if name in names:
                raise metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(metadata, "distribution", distribution)

    return hide


def test_what_is_missing_comes_with_the_command_that_mends_it(without):
    without("highdicom", "zarr", "distributed")
    text, found = here(), json.loads(here("--json"))
    assert found["extras"]["sr"]["lacking"] == ["highdicom"]
    assert found["extras"]["sr"]["install"] == "pip install 'ichpipe[sr]'"
    assert found["packages"]["zarr"]["state"] == "missing"
    assert "distributed" in found["extras"]["train"]["lacking"]  # of dask[distributed]
    lines = [line.strip() for line in text.splitlines()]
    assert "pip install 'ichpipe[sr]'" in lines
    assert "pip install 'zarr>=" in text
    assert any(line.startswith("sr lacks highdicom") for line in lines)


def plant(folder, name, version, record=""):
    """Write the metadata of a package that is not there."""
    path = folder / f"{name}-{version}.dist-info"
    path.mkdir(parents=True)
    (path / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (path / "RECORD").write_text(record)


def test_an_old_package_and_one_without_its_files_are_told_apart(tmp_path):
    plant(tmp_path, "pandas", "0.1")
    plant(tmp_path, "timm", metadata.version("timm"), "timm/__init__.py,,\n")
    found = facts(PYTHONPATH=str(tmp_path))["packages"]
    assert (found["pandas"]["version"], found["pandas"]["state"]) == ("0.1", "other version")
    assert found["timm"]["state"] == "broken"
    text = info(PYTHONPATH=str(tmp_path))
    assert "pip install --force-reinstall --no-deps timm" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError", "SyntaxError"])
def test_a_package_that_cant_be_imported_is_said_and_the_rest_stands(tmp_path, error):
    (tmp_path / "pydicom").mkdir()
    (tmp_path / "pydicom" / "__init__.py").write_text(f"raise {error}('undefined symbol in /home/janeroe/lib.so')")
    found = facts(PYTHONPATH=str(tmp_path))
    assert found["codecs"] == {"error": f"{error}: undefined symbol in …"}
    assert not [name for name in SECTIONS if name != "codecs" and found[name] and "error" in found[name]]
    assert "codecs: not known" in info(PYTHONPATH=str(tmp_path))


def test_without_packaging_it_says_so(tmp_path):
    (tmp_path / "packaging.py").write_text("raise ImportError('broken')")
    found = facts(PYTHONPATH=str(tmp_path))
    assert "ImportError" in found["packages"]["error"]
    assert found["codecs"]


def test_accelerators_are_named_and_a_broken_torch_is_said(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("ichpipe.stages.info._DEVICE_FILES", ("null",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Card {number}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = json.loads(here("--json"))["devices"]
    assert [part["name"] for part in found["accelerators"]] == ["Card 0", "Card 1"]
    assert found["precision_auto"] in {"fp16", "bf16"}
    assert "Card 1" in here()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch failed: ModuleNotFoundError" in here()


def test_paths_names_and_secrets_stay_out(tmp_path):
    home = tmp_path / "Jane Roe"
    home.mkdir()
    environment = {
        "HOME": str(home), "USER": "janeroe", "LOGNAME": "janeroe", "ICHPIPE_ARTIFACTS": str(home / "artifacts"),
        "ICHPIPE_KEY": WORD, "ICHPIPE_PIN": "424242", "HF_TOKEN": WORD, "OMP_NUM_THREADS": "janeroe",
        "TORCH_HOME": str(home), "OMP_WAIT_POLICY": "PASSIVE", "ICHPIPE_WORKERS": "2", "ICHPIPE_GPU": WORD,
    }  # fmt: skip
    for text in (info(folder=home, **environment), info("--json", folder=home, **environment)):
        for word in ("Jane", "Roe", "janeroe", WORD, "424242", str(tmp_path), str(ROOT), sys.prefix, "HF_TOKEN"):
            assert word not in text
    shown = facts(folder=home, **environment)["environment"]
    assert (shown["OMP_WAIT_POLICY"], shown["ICHPIPE_WORKERS"]) == ("PASSIVE", "2")
    assert {shown[name] for name in ("ICHPIPE_KEY", "ICHPIPE_PIN", "ICHPIPE_ARTIFACTS", "OMP_NUM_THREADS")} == {"set"}


@pytest.fixture
def exported(run, tmp_path):
    folder = tmp_path / "Jane Roe" / "model"
    run.steps(("export", "--out", folder))
    return folder


def test_a_model_is_summed_up(run, exported):
    model = json.loads(here("--json", "--model", exported))["model"]
    card = json.loads((exported / "config.json").read_text())
    assert (model["kind"], model["slice_cnn"]["size_px"]) == ("end-to-end", card["slice_cnn"]["size_px"])
    for split in ("train", "val", "test"):
        for key in ("patients", "studies", "slices"):
            assert model["training_data"][split][key] == card["training_data"][split][key]
    assert model["scores"]["test_log_loss"] == card["metrics"]["test"]["weighted_log_loss"]
    assert model["model_sha256"] == card["model_sha256"]
    text = here("--model", exported)
    assert f"train: {card['training_data']['train']['patients']} patients" in text
    assert "Jane" not in text
    own = json.loads(CliRunner().invoke(cli, run.arguments("info", "--json")).output)["model"]
    assert own["model_sha256"] == model["model_sha256"]  # the run's own model, without --model


def test_a_tampered_card_passes_no_text_on(exported):
    path = exported / "config.json"
    card = json.loads(path.read_text())
    card["training_data"] = {"dataset": "Doe^John", "train": {"patients": "Doe^John", "slices": 7, "names": ["Doe"]}}
    card["metrics"] = {"validation": "Doe", "test": {"weighted_log_loss": "Doe", "auc": ["Doe"]}}
    path.write_text(json.dumps(card))
    (exported / "calibration.json").write_text('{"method": ["Doe"]}')
    text = here("--json", "--model", exported)
    assert "Doe" not in text
    assert json.loads(text)["model"]["training_data"]["train"]["slices"] == 7
    card["model_sha256"] = "0" * 64
    path.write_text(json.dumps(card))
    assert "another model file" in here("--model", exported)
    path.write_text("{")
    assert "config.json can't be read" in here("--model", exported)


@pytest.mark.parametrize("content", [None, b"", b"Doe^John" * 9, b'\x10\0\0\0\0\0\0\0{"Doe^John": 1} '])
def test_what_is_no_model_is_said_without_its_path(tmp_path, content):
    folder = tmp_path / "Jane Roe"
    folder.mkdir()
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    for text in (here("--model", folder), here("--model", folder, "--json")):
        assert "model.safetensors" in text
        assert "Jane" not in text
        assert "Doe" not in text
        assert str(tmp_path) not in text
