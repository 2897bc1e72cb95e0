"""What a stranger looks for: citation, contributing, security, issue templates, workflow, container, privacy."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from import_kit import ROOT
from test_packaging import read_setup

SMOKE = ROOT / ".ci" / "smoke.py"
WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"
# Hosts and addresses of package indexes; pip's own configuration names them.
INDEX = re.compile(r"index-url\s+[\"']?https?:|--find-links|/simple\b|trusted-host", re.IGNORECASE)


def words(path):
    return (ROOT / path).read_text(encoding="utf-8")


def logical_lines(dockerfile):
    """The instructions of a Dockerfile, comments left out and continued lines joined."""
    kept = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    return [line for line in re.sub(r"\\\n", " ", "\n".join(kept)).splitlines() if line.strip()]


def instructions(name):
    return [line.split(None, 1)[1] for line in logical_lines(words("Dockerfile")) if line.split(None, 1)[0] == name]


def test_the_citation_has_what_its_format_requires():
    cited = yaml.safe_load(words("CITATION.cff"))
    assert cited["cff-version"] == "1.2.0"
    assert all(cited[key] for key in ("message", "title", "authors", "abstract"))
    assert cited["type"] == "software"
    for reference in cited["references"]:
        assert {"type", "title", "authors", "year"} <= set(reference)
        assert all({"name"} == set(author) or "family-names" in author for author in reference["authors"])
    assert "10.1148/ryai.2020190211" in {reference.get("doi") for reference in cited["references"]}
    assert "arXiv:2005.10992" in words("CITATION.cff")


def test_version_and_licence_of_the_citation_are_those_of_the_package():
    cited, metadata = yaml.safe_load(words("CITATION.cff")), read_setup()["metadata"]
    assert (cited["title"], cited["version"], cited["license"]) == (
        metadata["name"], metadata["version"], metadata["license"],
    )  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md")), ids=lambda path: path.name)
def test_an_issue_template_has_a_head_and_warns_of_patient_data(path):
    _, head, body = path.read_text(encoding="utf-8").split("---\n", 2)
    assert {"name", "about"} <= set(yaml.safe_load(head))
    assert "never attach patient data" in body.lower()


def test_the_template_of_a_bug_asks_for_what_a_bug_needs():
    text = words(".github/ISSUE_TEMPLATE/bug.md")
    for wanted in ("ichpipe info", "command line", "ichpipe phantom", "expected"):
        assert wanted in text


def test_the_workflow_runs_make_test_on_linux_and_the_smoke_script_elsewhere():
    flow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    steps = {name: [step.get("run", "") for step in job["steps"]] for name, job in flow["jobs"].items()}
    assert any(line.startswith("make test") for line in steps["linux"])
    assert "python .ci/smoke.py" in steps["smoke"]
    assert {"macos-latest", "windows-latest"} == set(flow["jobs"]["smoke"]["strategy"]["matrix"]["os"])
    assert flow["permissions"] == {"contents": "read"}
    # An untried workflow says so, here and where the platforms are listed.
    assert ("Untried" in WORKFLOW.read_text(encoding="utf-8")) == ("has not run yet" in words("docs/index.md"))


@pytest.mark.parametrize("path", [WORKFLOW, ROOT / "Dockerfile", SMOKE], ids=lambda path: path.name)
def test_no_package_index_is_named(path):
    assert INDEX.search("pip install --index-url https://packages.example/simple torch")
    assert not INDEX.search(path.read_text(encoding="utf-8"))


def test_the_image_runs_ichpipe_as_an_ordinary_user():
    assert instructions("ENTRYPOINT") == ['["ichpipe"]']
    user = instructions("USER")[-1].partition(":")[0]
    assert int(user) > 0
    assert f"--uid {user} " in words("Dockerfile")


def test_the_image_writes_to_tmp_alone():
    variables = dict(re.findall(r"(\w+)=(\S+)", instructions("ENV")[-1]))
    assert {variables[name].split("/")[1] for name in ("HOME", "TMPDIR", "MPLCONFIGDIR")} == {"tmp"}


def test_what_the_image_copies_exists_and_is_sent_to_docker():
    ignore = words(".dockerignore").splitlines()
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = {word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]}
    assert "*" in ignore
    assert copied == sent
    assert [name for name in copied if not (ROOT / name).exists()] == []
    folders = {folder.strip().partition("=")[2].strip().split("/")[0]
               for folder in read_setup()["options"]["package_dir"].strip().splitlines()}  # fmt: skip
    assert folders <= copied, "a package of setup.cfg would be missing in the image"


def test_the_extras_of_the_image_are_those_of_the_package():
    (given,) = (line.partition("=")[2] for line in instructions("ARG") if line.startswith("EXTRAS="))
    assert set(given.split(",")) <= set(read_setup()["options.extras_require"])


def test_dvc_of_this_project_asks_and_tells_nobody():
    config = configparser.ConfigParser()
    config.read_string(re.sub(r"^\s+", "", words(".dvc/config"), flags=re.MULTILINE))
    assert config["core"]["analytics"] == config["core"]["check_update"] == "false"


@pytest.mark.soak
def test_the_smoke_script_passes_here(tmp_path):
    done = subprocess.run(
        [sys.executable, SMOKE], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("16 studies predicted\n")


def test_the_smoke_script_fails_where_a_step_fails(tmp_path):
    (tmp_path / "ichpipe").write_text('#!/bin/sh\n[ "$1" = phantom ] && exit 3\nexit 0\n')
    (tmp_path / "ichpipe").chmod(0o755)
    broken = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([sys.executable, SMOKE], capture_output=True, text=True, check=False, env=broken)
    assert done.returncode == 1
    assert "ichpipe phantom ended with exit code 3" in done.stdout


def environment(home):
    return {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(home)}
