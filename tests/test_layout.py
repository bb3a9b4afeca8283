"""Check the layout: what imports what, what can be copied, how many files a step goes through."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import train
from tests.conftest import ROOT

# A package may import itself and the packages of lower levels.
LEVELS = (
    ("scripts", "benchmarks", "tests", "examples"),
    ("train",),
    ("optimizers", "data", "analysis"),
    ("runtime",),
    ("model", "sophia"),
)
PACKAGES: dict[str, int] = {}
for level, packages in enumerate(LEVELS):
    PACKAGES |= dict.fromkeys(packages, level)


def python_files() -> Iterator[tuple[Path, str]]:
    """Yield every Python file of the project with the package that it belongs to."""
    for path in sorted(ROOT.glob("*.py")):
        yield path, path.stem
    for package in PACKAGES:
        for path in sorted(ROOT.glob(f"{package}/**/*.py")):
            yield path, package


def imported_packages(path: Path) -> set[str]:
    """Return the project's packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names & PACKAGES.keys()


def test_the_root_has_three_modules() -> None:
    names = [path.name for path in sorted(ROOT.glob("*.py"))]
    assert names == ["model.py", "sophia.py", "train.py"]
    # Without __init__.py, an installed package of the same name would be imported instead.
    for package in ("optimizers", "runtime", "analysis", "benchmarks", "data"):
        assert (ROOT / package / "__init__.py").exists()


@pytest.mark.parametrize(("path", "package"), list(python_files()), ids=str)
def test_imports_go_one_way(path: Path, package: str) -> None:
    imported = imported_packages(path) - {package}
    for name in imported:
        assert PACKAGES[name] > PACKAGES[package] or package == "tests", f"{path} imports {name}"
    if package in ("model", "sophia"):
        assert not imported


def test_scripts_are_not_imported() -> None:
    for path, _ in python_files():
        assert "scripts" not in imported_packages(path), path


@pytest.mark.parametrize("name", ["sophia.py", "optimizers/lion.py"])
def test_optimizer_works_as_a_single_copied_file(name: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / name, tmp_path)
    stem = Path(name).stem
    optimizer = {"sophia": "SophiaG", "lion": "Lion"}[stem]
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from {stem} import {optimizer}
w = torch.nn.Parameter(torch.ones(3))
optimizer = {optimizer}([w], lr=0.1, weight_decay=0.0)
w.square().sum().backward()
optimizer.step()
assert torch.allclose(w, torch.full((3,), 0.9)), w
"""

    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# ---- The path of a step --------------------------------------------------------------------------

# Properties of the config, left out of the path.
PROPERTIES = {
    "text_vocab_size",
    "labels_per_sequence",
    "mask_token",
    "tokens_per_step",
    "hessian_interval",
    "hessian_batch_size",
    "hessian_estimator",
}


def files_called(function: Callable[[], Any]) -> list[tuple[str, str]]:
    """Return (file, function) for every call of the project's functions, in order.

    Properties of the config and comprehensions are left out: they do not send a reader to a file.
    """
    calls: list[tuple[str, str]] = []

    def record(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        is_ours = path.is_relative_to(ROOT) and ".venv" not in path.parts
        name = frame.f_code.co_name
        is_call = event == "call" and name not in PROPERTIES and not name.startswith("<")
        if is_call and is_ours and path.name != "test_layout.py":
            calls.append((str(path.relative_to(ROOT)), name))

    sys.setprofile(record)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def switches(calls: list[tuple[str, str]], end: str) -> list[str]:
    """Return the files on the path to the function `end`, in order, once per change of file."""
    files: list[str] = []
    for file, name in calls:
        if not files or files[-1] != file:
            files.append(file)
        if name == end:
            return files
    raise AssertionError(f"{end} was not called")


@pytest.mark.parametrize(
    ("run", "function", "end", "most"),
    [
        ("lion", "train_step", "_single_tensor", 7),
        ("sophia-g", "train_step", "_single_tensor", 7),
        ("sophia-g", "update_hessian", "update_hessian_from_grad", 11),
        ("sophia-h", "update_hessian", "update_hessian", 11),
    ],
)
def test_path_of_a_step_changes_files_only_a_few_times(
    run: str,
    function: str,
    end: str,
    most: int,
    experiment: Path,
    run_train: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = getattr(train, function)
    found: list[list[str]] = []

    def traced(this: train.Run, step: int) -> Any:
        # Steps 0 and 3 update the Hessian; step 1 does not.
        if step != (1 if function == "train_step" else 3):
            return original(this, step)
        results: list[Any] = []
        calls = files_called(lambda: results.append(original(this, step)))
        found.append(switches(calls[1:] if function == end else calls, end))
        return results[0]

    monkeypatch.setattr(train, function, traced)
    arguments = ["--train.max_steps=4"]
    if run == "sophia-h":
        arguments.append("--optimizer.hessian_micro_batch_size=4")  # one micro-batch
    run_train(experiment, f"--run={run}", *arguments)

    (files,) = found
    assert files[0] == "train.py"
    assert len(files) - 1 <= most, "\n".join(files)
