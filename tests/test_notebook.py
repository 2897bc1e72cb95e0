"""The notebook runs from its first cell to its last on a fresh folder, and git holds it without outputs."""

import os
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_steps.ipynb"
SECONDS = 300  # for one cell, on a machine that other work uses too


def read_notebook():
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: pip install 'ichpipe[dev]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_no_outputs_are_in_git():
    code = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []
    assert '"image/png"' not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_notebook_runs_and_shows_a_picture(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'ichpipe[dev]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'ichpipe[dev]'")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    notebook = read_notebook()
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = "".join(output.get("text", "") for output in outputs)
    assert "fine-tuned" in shown  # the table of scores
    assert "any" in shown
    assert [output for output in outputs if output.output_type == "error"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert (tmp_path / "first-steps" / "artifacts" / "finetuned" / "model.safetensors").exists()
    assert "first-steps" not in os.listdir(Path(__file__).parents[1])  # noqa: PTH208 - names alone
