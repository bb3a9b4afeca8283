"""Execute examples/notebook.ipynb on the data that every machine has, and check the Dockerfile."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT


@pytest.mark.slow
def test_notebook_runs_to_its_end(
    experiment: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace the settings, as a reader without a GPU would, and execute every cell."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "examples/notebook.ipynb", as_version=4)
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    settings.source = f"""
experiment = "{experiment}"
prepare = "python data/stdlib/prepare.py --out {tmp_path}/stdlib"
options = "--train.dtype=float32 --data.path={tmp_path}/stdlib --model.vocab_size=257"
options += " --train.eval_windows=64"
runs = ["adamw", "sophia-g"]
minutes = 0.02
out = "{tmp_path}/notebook"
"""
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute()

    printed = ""
    pictures = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            printed += output.get("text", "")
            pictures += [data for data in output.get("data", {}) if data == "image/png"]
    assert "steps in 0.02 minutes" in printed
    assert "| tiny/sophia-g" in printed
    assert pictures == ["image/png"]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint")
def test_dockerfile_has_no_findings() -> None:
    done = subprocess.run(
        ["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "USER 1000" in (ROOT / "Dockerfile").read_text()
