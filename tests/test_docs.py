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
    (copy / "radam.patch").write_text(block(text, "diff"))
    done = subprocess.run(["git", "apply", "radam.patch"], capture_output=True, text=True, cwd=copy)
    assert done.returncode == 0, done.stderr
    for lint in (["check"], ["format", "--check"]):  # test.sh still passes
        command = [sys.executable, "-m", "ruff", *lint, "runtime/config.py", "optimizers/build.py"]
        assert subprocess.run(command, cwd=copy).returncode == 0
    (copy / "configs/gpt2_30m.toml").write_text(TINY.format(data=tiny_data, out=tmp_path / "out"))
    (copy / "configs/radam.toml").write_text(block(text, "toml"))

    def train(*arguments: str) -> None:
        command = [sys.executable, "train.py", "configs/radam.toml", "--run=radam", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=copy, timeout=300)
        assert done.returncode == 0, done.stderr

    train("--name=whole")
    train("--name=parts")
    (tmp_path / "out/radam/parts/step_00000012.pt").unlink()
    train("--name=parts", "--resume")
    whole, parts = (read_lines(tmp_path / "out/radam" / name, "val_loss") for name in ("whole", "parts"))
    assert whole == parts
    assert whole[-1][1] < whole[0][1]


def anchors(path: Path) -> set[str]:
    """Of a document's headings, as they are made from their text."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        linked = path.parent / target if target else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"
    for name in named_files(text) - {"configs/radam.toml"}:  # which the reader makes
        assert (ROOT / name).exists(), name


def named_files(text: str) -> set[str]:
    return set(re.findall(r"\b((?:scripts|configs|docs|examples|tests|data)/[\w./-]+\.(?:py|sh|toml|yaml|md))\b", text))


def test_the_readme_names_what_there_is_to_run() -> None:
    named = named_files((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"scripts/run.py", "scripts/compare.py", "scripts/export_hf.py", "scripts/quickstart.sh"} <= named
