"""run.py: what it would run, what it skips, how it judges a sweep."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.cli import run_main
from scripts import run
from tests.conftest import OPTIMIZERS, read_lines

GRID = """
[runs.adamw.grid]
optimizer.lr = [1e-3, 1e-2]
train.seed = [1, 2, 3]
[runs.lion.grid]
optimizer.lr = [1e-4, 1e-3, 1e-2]
"""

Caller = Callable[..., str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Caller:
    """run.py with these arguments, in this process; its children are processes as ever. Returns what it printed."""

    def caller(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        run_main(run.main)
        return capsys.readouterr().out

    return caller


def names(printed: str) -> list[str]:
    """The --name of each line, or its --run where it has none."""
    lines = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in printed.splitlines()]
    return [line.get("--name", line["--run"]) for line in lines]


def test_all_runs_with_seeds_and_horizons(experiment: Path, call: Caller) -> None:
    printed = call(experiment, "--print=torchrun")
    assert names(printed) == list(OPTIMIZERS)
    printed = call(experiment, "--print=torchrun", "--runs=lion,adamw", "--seeds=2", "--horizons=1,0.5")
    expected = ["", ",seed=1338", ",max_steps=6", ",max_steps=6,seed=1338"]
    assert names(printed) == [name + rest for name in ("lion", "adamw") for rest in expected]
    assert "--train.max_steps=6 --train.seed=1338" in printed.splitlines()[3]


def test_a_sweep_is_the_product_of_a_grid_or_its_axes(experiment: Path, call: Caller) -> None:
    experiment.write_text(experiment.read_text() + GRID)
    product = names(call(experiment, "--sweep", "--print=torchrun"))
    assert len(product) == 2 * 3 + 3
    assert product[0] == "adamw,lr=0.001,seed=1"
    axes = names(call(experiment, "--sweep=axes", "--print=torchrun", "--runs=adamw"))
    centre = "adamw,lr=0.01,seed=1337"
    assert axes == [centre, "adamw,lr=0.001,seed=1337", *(f"adamw,lr=0.01,seed={seed}" for seed in (1, 2, 3))]


def test_a_finished_sweep_is_judged_and_not_run_again(experiment: Path, call: Caller, tmp_path: Path) -> None:
    experiment.write_text(experiment.read_text() + GRID)
    arguments = (experiment, "--sweep", "--runs=lion", "--jobs=2", "--train.max_steps=4")
    printed = call(*arguments)
    assert "3 runs, 0 of them finished already" in printed
    folder = tmp_path / "out/tiny"
    losses = {run_dir.name: read_lines(run_dir, "val_loss")[-1][1] for run_dir in folder.iterdir()}
    best = min(losses, key=lambda name: losses[name])
    assert best == "lion,lr=0.01"
    assert f"* {losses[best]:.4f}  {best}" in printed
    assert "the best lion has optimizer.lr = 0.01, the edge of its grid" in printed
    stamps = [path.stat().st_mtime_ns for path in sorted(folder.rglob("metrics.jsonl"))]
    assert "3 runs, 3 of them finished already" in call(*arguments)
    assert [path.stat().st_mtime_ns for path in sorted(folder.rglob("metrics.jsonl"))] == stamps
    for other in ("--train.warmup_steps=1", "--data.path=elsewhere"):  # the same folders, another experiment
        with pytest.raises(SystemExit) as ended:
            call(*arguments, other)
        assert ended.value.code == 2


def test_a_sweep_ranks_over_all_of_its_grid_and_a_loss_that_is_no_number_last(
    experiment: Path, call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment.write_text(experiment.read_text() + GRID.replace("train.seed", "train.warmup_steps"))
    losses = {"lr=0.001,warmup_steps=1": math.inf, "lr=0.001,warmup_steps=2": 1.5}
    monkeypatch.setattr(run, "final_loss", lambda trial: losses.get(trial.name.removeprefix("adamw,"), 2.0))
    monkeypatch.setattr(run, "run_all", lambda *_: [])
    printed = call(experiment, "--sweep", "--runs=adamw")
    assert [line for line in printed.splitlines() if line.startswith("*")] == [
        "* 1.5000  adamw,lr=0.001,warmup_steps=2"
    ]
    assert "failed  adamw,lr=0.001,warmup_steps=1" in printed
    assert "warmup_steps = 2, the edge" not in printed
    assert "optimizer.lr = 0.001, the edge" in printed


def test_a_sweep_with_seeds_ranks_by_their_mean(
    experiment: Path, call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment.write_text(experiment.read_text() + GRID)
    lucky = {"lion,lr=0.0001": 1.0, "lion,lr=0.0001,seed=1338": 4.0}
    monkeypatch.setattr(run, "final_loss", lambda trial: lucky.get(trial.name, 2.0))
    monkeypatch.setattr(run, "run_all", lambda *_: [])
    printed = call(experiment, "--sweep", "--runs=lion", "--seeds=2").splitlines()
    assert printed == ["  2.5000  lion,lr=0.0001", "* 2.0000  lion,lr=0.001", "  2.0000  lion,lr=0.01"]


def test_a_failed_run_does_not_stop_the_others_and_is_named(
    experiment: Path, call: Caller, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(experiment, "--runs=lion,adamw", "--jobs=2", f"--data.path={tmp_path / 'none'}")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "error: 2 of 2 runs failed: lion, adamw" in said
    assert "no such file" in said


def test_the_slurm_script_calls_one_run_a_task(experiment: Path, call: Caller, tmp_path: Path) -> None:
    script = tmp_path / "jobs.sh"
    script.write_text(call(experiment, "--seeds=2", "--gpus=8", "--print=slurm"))
    assert "#SBATCH --array=0-7" in script.read_text()
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:4] == ["--standalone", "--nproc_per_node=8", "--", "train.py"]
    assert "--run=lion --name=lion,seed=1338 --resume --train.seed=1338" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--runs=sofia"], "no run named 'sofia'; there are: adamw"),
        (["--horizons=0"], "--horizons=0: must be numbers greater than 0"),
        (["--horizons=a,b"], "--horizons=a,b: must be numbers"),
        (["--sweep"], "no run of it has a grid; add e.g. [runs.adamw.grid]"),
        (["--scale=gpu"], "has no scale 'gpu'; use one of: paper"),
        (["--train.max_step=3"], "unknown argument --train.max_step"),
        (["--train.max_steps"], "write --section.key=value"),
        (["--run=adamw"], "unknown argument --run=adamw"),
    ],
)
def test_bad_arguments_end_in_one_line(
    experiment: Path, call: Caller, capsys: pytest.CaptureFixture, arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(experiment, *arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
