"""A run outside the checkout: packaged parameter files, and the recipe that ``ichpipe init`` writes.

``python tests/test_init.py`` writes the packaged recipe anew from the one of the checkout.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
START = ROOT / "params" / "start"
VERSION_STAGE = """stages:
  installed: # runs every time; the stages below run again where the version has changed
    cmd: ichpipe --version > installed.txt
    always_changed: true
    outs:
      - installed.txt:
          cache: false

"""
HEAD = """# The recipe. One word a stage in three places: here, the section of params.yaml, the command.
# What can't change the result (device, workers) stays out of `cmd` and `params`: ICHPIPE_GPU, ICHPIPE_WORKERS.
"""


def installed_recipe(text):
    """Name the installed version in ``deps`` in place of source folders."""

    def of_version(match):
        names = [name.strip() for name in match[1].replace("\n", " ").split(",") if name.strip()]
        kept = [name for name in names if not re.match(r"(pipeline|stages|cache)(/|$)", name)]
        indent = match[0][: len(match[0]) - len(match[0].lstrip())]
        return f"{indent}deps:\n" + "".join(f"{indent}  - {name}\n" for name in ["installed.txt", *kept])

    body = text[text.index("stages:\n") + len("stages:\n") :]
    return HEAD + VERSION_STAGE + re.sub(r"(?m)^ +deps: \[([^]]*)\]\n", of_version, body)


def without_schema(text):
    """Drop the comment that names a file of the checkout."""
    return "".join(line for line in text.splitlines(keepends=True) if "yaml-language-server" not in line)


def packaged():
    return {
        "dvc.yaml": installed_recipe((ROOT / "dvc.yaml").read_text("utf-8")),
        "params.yaml": without_schema((ROOT / "params.yaml").read_text("utf-8")),
        "dvcignore": (ROOT / ".dvcignore").read_text("utf-8"),
        **{
            f"plots/{path.name}": path.read_text("utf-8")
            for path in sorted((ROOT / ".dvc" / "plots").iterdir())
        },
    }  # fmt: skip


def run_init(*arguments):
    from ichpipe.stages.cli import cli

    return CliRunner().invoke(cli, ["init", *arguments])


def test_the_packaged_recipe_is_that_of_the_checkout():
    texts = {str(path.relative_to(START)): path.read_text("utf-8") for path in START.rglob("*") if path.is_file()}
    assert texts == packaged(), "run: python tests/test_init.py"


def test_every_stage_depends_on_the_version_and_on_no_source():
    stages = yaml.safe_load((START / "dvc.yaml").read_text("utf-8"))["stages"]
    of_checkout = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
    assert list(stages) == ["installed", *of_checkout]
    for name, stage in of_checkout.items():
        ours, theirs = (part.get("do", part) for part in (stages[name], stage))
        sources = {dep for dep in theirs["deps"] if dep.split("/")[0] in {"pipeline", "stages", "cache"}}
        assert sources
        assert set(ours["deps"]) == {"installed.txt", *theirs["deps"]} - sources
        assert {key: ours[key] for key in ours if key != "deps"} == {
            key: theirs[key] for key in theirs if key != "deps"
        }


def test_init_writes_the_recipe_and_replaces_nothing(tmp_path):
    done = run_init(str(tmp_path / "run"))
    assert done.exit_code == 0
    assert "dvc repro" in done.output
    assert (tmp_path / "run" / "params.yaml").read_text("utf-8") == packaged()["params.yaml"]
    names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"dvc.yaml", "params.yaml", ".dvcignore", ".dvc/config"} <= names
    again = run_init(str(tmp_path / "run"))
    assert again.exit_code == 1
    assert "is there already" in str(again.exception)


def test_init_keeps_a_file_of_the_user(tmp_path):
    (tmp_path / "params.yaml").write_text("prepare: {seed: 3}\n")
    assert run_init(str(tmp_path)).exit_code == 1
    assert (tmp_path / "params.yaml").read_text() == "prepare: {seed: 3}\n"
    assert not (tmp_path / "dvc.yaml").exists()


@pytest.mark.parametrize("name", ["paper", "best", "small"])
def test_packaged_parameters_go_by_their_name(tmp_path, monkeypatch, name):
    from ichpipe.params.schema import load_params
    from ichpipe.stages.options import find_params

    monkeypatch.chdir(tmp_path)
    assert load_params(find_params(Path(name))) == load_params(ROOT / "params" / f"{name}.yaml")
    (tmp_path / name).write_text("{}")  # a file of the user's goes first
    assert find_params(Path(name)) == Path(name)


def test_an_unknown_name_of_parameters_is_refused_with_the_list(tmp_path):
    from ichpipe.stages.cli import cli

    done = CliRunner().invoke(cli, ["--params", "papper", "prepare"])
    assert done.exit_code == 2
    assert "papper" in done.output
    assert "paper" in done.output.replace("papper", "")


@pytest.mark.slow
def test_the_recipe_runs_in_an_empty_folder(tmp_path):
    """Up to the slices of stage one, with a phantom and a network of a few seconds."""
    pytest.importorskip("dvc", reason="dvc is not installed: pip install 'ichpipe[dvc]'")
    assert run_init(str(tmp_path / "run")).exit_code == 0
    file = tmp_path / "run" / "params.yaml"
    params = yaml.safe_load(file.read_text("utf-8"))
    params["phantom"] |= {"studies": 12, "size_px": 48}
    params["prepare"]["size_px"] = 48
    params["fit-slices"] |= {"backbone": "resnet10t", "pretrained": None, "epochs": 1}
    file.write_text(yaml.safe_dump(params), "utf-8")
    binaries = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": os.pathsep.join([binaries, os.environ["PATH"]])}
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "repro", "extract"],
            cwd=tmp_path / "run", env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    assert (tmp_path / "run" / "artifacts" / "embeddings.zarr").exists()
    assert "Running stage 'extract'" in outputs[0]
    assert "Running stage 'installed'" in outputs[1]
    assert "Running stage 'phantom'" not in outputs[1]


if __name__ == "__main__":
    for name, text in packaged().items():
        (START / name).parent.mkdir(parents=True, exist_ok=True)
        (START / name).write_text(text, encoding="utf-8")
