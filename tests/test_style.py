"""Check the style: blank lines, walruses, comprehensions, line lengths, phrases."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAX_LINE = 100
LONG_FUNCTION = 15  # lines
# Split, because this file must not contain them either.
PHRASES = ("no " + "number", "is " + "no ", "are " + "no ", "who" + "ever", "no" + "body")


def tracked(*patterns: str) -> list[Path]:
    """Return the files that git tracks, and untracked ones that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return [ROOT / name for name in sorted(set(done.stdout.split())) if (ROOT / name).is_file()]


PYTHON = tracked("*.py")
TEXTS = tracked("*.py", "*.md", "*.toml", "*.sh", "*.yaml", "*.yml", "*.txt", "*.cff", "*.ipynb")
# Written by programs.
GENERATED = re.compile(r"results/.*/[a-z]+\.md")


def has_blank_line(function: ast.FunctionDef, lines: list[str]) -> bool:
    """Return whether the body of a function, without its docstring, has a blank line."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    if not body:
        return True
    code = lines[body[0].lineno - 1 : function.end_lineno]
    return any(not line.strip() for line in code)


@pytest.mark.parametrize("where", ["code", "tests"])
def test_long_functions_have_blank_lines(where: str) -> None:
    dense, count = [], 0

    for path in PYTHON:
        if (ROOT / "tests" in path.parents) != (where == "tests"):
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
                continue
            if node.end_lineno - node.lineno + 1 < LONG_FUNCTION:
                continue
            count += 1
            if not has_blank_line(node, text.splitlines()):
                dense.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")

    assert len(dense) <= 0.3 * count, f"{len(dense)} of {count}: {dense}"


def test_a_file_has_at_most_one_walrus() -> None:
    for path in PYTHON:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        count = sum(isinstance(node, ast.NamedExpr) for node in ast.walk(tree))
        assert count <= 1, path


def test_comprehensions_are_not_nested() -> None:
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, kinds) or ROOT / "tests" in path.parents:
                continue
            inner = [n for n in ast.walk(node) if isinstance(n, kinds) and n is not node]
            assert not inner, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_phrases(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    if GENERATED.fullmatch(name):
        pytest.skip("written by a program")

    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        is_table = path.suffix == ".md" and line.lstrip().startswith("|")
        is_link = "http" in line and " " not in line.strip()
        assert len(line) <= MAX_LINE or is_table or is_link, f"{name}:{number}"
        for phrase in PHRASES:
            assert phrase not in line.lower(), f"{name}:{number}: {phrase!r}"
