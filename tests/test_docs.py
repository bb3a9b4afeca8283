"""What the documents say works: the optimizer that is added there, links, and the files they name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, read_lines

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")])


def block(text: str, language: str) -> str:
    """The first code block of a language."""
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def test_an_optimizer_is_added_as_the_document_says(tmp_path: Path, tiny_data: Path) -> None:
    """In a copy of the repository: patch, experiment file, training, and a resumed run with the same losses."""
    text = (ROOT / "docs/adding_an_optimizer.md").read_text()
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT, copy, ignore=lambda folder, names: [n for n in names if n[0] == "." or n in ("out", "results")]
    )
    done = subprocess.run(["patch", "-p1"], input=block(text, "diff"), capture_output=True, text=True, cwd=copy)
    assert done.returncode == 0, done.stdout
    (copy / "configs/gpt2_30m.toml").write_text(TINY.format(data=tiny_data, out=tmp_path / "out"))
    (copy / "configs/radam.toml").write_text(block(text, "toml"))

    def train(*arguments: str) -> None:
        command = [sys.executable, "train.py", "configs/radam.toml", "--run=radam", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=copy, timeout=120)
        assert done.returncode == 0, done.stderr

    train("--name=whole")
    train("--name=parts")
    (tmp_path / "out/radam/parts/step_00000012.pt").unlink()
    train("--name=parts", "--resume")
    whole, parts = (read_lines(tmp_path / "out/radam" / name, "val_loss") for name in ("whole", "parts"))
    assert whole == parts
    assert whole[-1][1] < whole[0][1]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", text):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"`((?:scripts|configs|data|docs|examples|tests)/[\w./-]+\.\w+)", text):
        assert (ROOT / name).exists(), name
