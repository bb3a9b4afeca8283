"""Check the documents: the optimizer they add works, and their links and files exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, read_lines

# Made by the reader, or former names of files.
NOT_HERE = {"configs/nadam.toml", "scripts/bench.py", "scripts/torture.py"}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")])


def block(text: str, language: str) -> str:
    """Return the first code block in a language."""
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def test_adding_an_optimizer_works_as_documented(
    tmp_path: Path, tiny_data: Path, run_train: Callable[..., None]
) -> None:
    """Train the documented experiment's first run, on a tiny base, and resume it."""
    text = (ROOT / "docs/adding_an_optimizer.md").read_text()
    (tmp_path / "cpu").mkdir()
    tiny = TINY.format(data=tiny_data, out=tmp_path / "out")
    (tmp_path / "cpu/gpt2_30m.toml").write_text(tiny)
    experiment = tmp_path / "nadam.toml"
    experiment.write_text(block(text, "toml"))

    run_train(experiment, "--run=nadam", "--name=whole")
    run_train(experiment, "--run=nadam", "--name=parts")
    (tmp_path / "out/nadam/parts/step_00000012.pt").unlink()
    run_train(experiment, "--run=nadam", "--name=parts", "--resume")

    whole = read_lines(tmp_path / "out/nadam/whole", "val_loss")
    parts = read_lines(tmp_path / "out/nadam/parts", "val_loss")
    assert whole == parts
    assert whole[-1][1] < whole[0][1]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        linked = path.parent / target if target else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"

    for name in named_files(text) - NOT_HERE:
        assert (ROOT / name).exists(), name


def named_files(text: str) -> set[str]:
    """Return the files in this repository's folders that a text names."""
    folders = "scripts|configs|docs|examples|tests|data|runtime|optimizers|analysis|benchmarks"
    pattern = rf"\b((?:{folders})/[\w./-]+\.(?:py|sh|toml|yaml|md))\b"
    return set(re.findall(pattern, text))


def test_readme_names_the_main_scripts() -> None:
    named = named_files((ROOT / "README.md").read_text(encoding="utf-8"))
    for script in ("run.py", "compare.py", "export_hf.py", "quickstart.sh"):
        assert f"scripts/{script}" in named
