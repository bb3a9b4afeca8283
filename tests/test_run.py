"""Test run.py: which runs it starts, which it skips, and how it ranks a sweep."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime import checkpoint
from runtime.cli import run_main
from tests.conftest import OPTIMIZERS, ROOT, load_script, read_lines

run = load_script("run")

GRID = """
[runs.adamw.grid]
optimizer.lr = [1e-3, 1e-2]
train.seed = [1, 2, 3]
[runs.lion.grid]
optimizer.lr = [1e-4, 1e-3, 1e-2]
"""

Caller = Callable[..., str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Iterator[Caller]:
    """Return a function that runs run.py in this process and returns what it printed.

    The training runs that run.py starts are processes of their own.
    """

    def caller(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        run_main(run.main)
        return capsys.readouterr().out

    handler = signal.getsignal(signal.SIGTERM)
    yield caller
    signal.signal(signal.SIGTERM, handler)


def names(printed: str) -> list[str]:
    """Return the --name of each command, or its --run if it has no --name."""
    found = []
    for line in printed.splitlines():
        flags = dict(part.split("=", 1) for part in line.split() if "=" in part)
        found.append(flags.get("--name", flags["--run"]))
    return found


def test_all_runs_with_seeds_and_horizons(experiment: Path, call: Caller) -> None:
    printed = call(experiment, "--print=torchrun")
    assert names(printed) == list(OPTIMIZERS)

    arguments = ("--runs=lion,adamw", "--seeds=2", "--horizons=1,0.5")
    printed = call(experiment, "--print=torchrun", *arguments)
    suffixes = ["", ",seed=1338", ",max_steps=6", ",max_steps=6,seed=1338"]
    lion = ["lion" + suffix for suffix in suffixes]
    adamw = ["adamw" + suffix for suffix in suffixes]
    assert names(printed) == lion + adamw
    assert "--train.max_steps=6 --train.seed=1338" in printed.splitlines()[3]


def test_sweep_covers_the_full_grid_or_its_axes(experiment: Path, call: Caller) -> None:
    experiment.write_text(experiment.read_text() + GRID)

    product = names(call(experiment, "--sweep", "--print=torchrun"))
    assert len(product) == 2 * 3 + 3
    assert product[0] == "adamw,lr=0.001,seed=1"

    axes = names(call(experiment, "--sweep=axes", "--print=torchrun", "--runs=adamw"))
    center, other_lr, *other_seeds = axes
    assert center == "adamw,lr=0.01,seed=1337"
    assert other_lr == "adamw,lr=0.001,seed=1337"
    assert other_seeds == [f"adamw,lr=0.01,seed={seed}" for seed in (1, 2, 3)]


def test_finished_sweep_is_ranked_and_not_run_again(
    experiment: Path, call: Caller, tmp_path: Path
) -> None:
    experiment.write_text(experiment.read_text() + GRID)
    arguments = (experiment, "--sweep", "--runs=lion", "--jobs=2", "--train.max_steps=4")
    printed = call(*arguments)
    assert "3 runs, 0 of them finished already" in printed

    folder = tmp_path / "out/tiny"
    losses = {path.name: read_lines(path, "val_loss")[-1][1] for path in folder.iterdir()}
    best = min(losses, key=lambda name: losses[name])
    assert best == "lion,lr=0.01"
    assert f"* {losses[best]:.4f}  {best}" in printed
    assert "the best lion has optimizer.lr = 0.01, the edge of its grid" in printed

    def modification_times() -> list[int]:
        return [path.stat().st_mtime_ns for path in sorted(folder.rglob("metrics.jsonl"))]

    before = modification_times()
    assert "3 runs, 3 of them finished already" in call(*arguments)
    assert modification_times() == before

    # The same folders, but another experiment.
    for other in ("--train.warmup_steps=1", "--data.path=elsewhere"):
        with pytest.raises(SystemExit) as ended:
            call(*arguments, other)
        assert ended.value.code == 2


def test_sweep_ranks_the_whole_grid_and_puts_failed_runs_last(
    experiment: Path, call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment.write_text(experiment.read_text() + GRID.replace("train.seed", "train.warmup_steps"))
    losses = {"adamw,lr=0.001,warmup_steps=1": math.inf, "adamw,lr=0.001,warmup_steps=2": 1.5}
    monkeypatch.setattr(run, "final_loss", lambda trial: losses.get(trial.name, 2.0))
    monkeypatch.setattr(run, "run_all", lambda *_: [])

    printed = call(experiment, "--sweep", "--runs=adamw")

    (best,) = [line for line in printed.splitlines() if line.startswith("*")]
    assert best == "* 1.5000  adamw,lr=0.001,warmup_steps=2"
    assert "failed  adamw,lr=0.001,warmup_steps=1" in printed
    assert "warmup_steps = 2, the edge" not in printed
    assert "optimizer.lr = 0.001, the edge" in printed


def test_sweep_with_seeds_ranks_by_the_mean_loss(
    experiment: Path, call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment.write_text(experiment.read_text() + GRID)
    losses = {"lion,lr=0.0001": 1.0, "lion,lr=0.0001,seed=1338": 4.0}
    monkeypatch.setattr(run, "final_loss", lambda trial: losses.get(trial.name, 2.0))
    monkeypatch.setattr(run, "run_all", lambda *_: [])

    printed = call(experiment, "--sweep", "--runs=lion", "--seeds=2").splitlines()
    assert printed == [
        "  2.5000  lion,lr=0.0001",
        "* 2.0000  lion,lr=0.001",
        "  2.0000  lion,lr=0.01",
    ]


def test_failed_runs_are_named_and_do_not_stop_the_others(
    experiment: Path, call: Caller, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(experiment, "--runs=lion,adamw", "--jobs=2", f"--data.path={tmp_path / 'none'}")
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert "error: 2 of 2 runs failed: lion, adamw" in errors
    assert "no such file" in errors


def test_sigterm_stops_the_runs_which_save(experiment: Path, tmp_path: Path) -> None:
    """A service manager signals run.py alone. What it started must not go on without it."""
    command = [sys.executable, str(ROOT / "scripts/run.py"), str(experiment), "--runs=adamw,lion"]
    command += ["--jobs=2", "--train.max_steps=100000", "--train.eval_interval=10"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    running = {"adamw", "lion"}
    while running:
        line = process.stdout.readline()
        assert line, "run.py ended by itself"
        name, _, rest = line.partition(": ")
        if rest.startswith("step 10/"):
            running.discard(name)

    process.send_signal(signal.SIGTERM)

    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue" in errors
    for name in ("adamw", "lion"):
        assert checkpoint.checkpoints(tmp_path / "out/tiny" / name)


def test_runs_share_the_cores_and_do_not_spin(
    experiment: Path, call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own OMP_WAIT_POLICY is kept."""
    environments = []

    class Started:
        def __init__(self, command: list[str], env: dict[str, str], **options: object) -> None:
            environments.append(env)
            self.stdout: list[str] = []
            self.returncode = 0

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(run.subprocess, "Popen", Started)
    monkeypatch.setattr(run.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    call(experiment, "--runs=adamw,lion", "--jobs=2")
    assert len(environments) == 2
    for environment in environments:
        assert environment["OMP_NUM_THREADS"] == "4"
        assert environment["OMP_WAIT_POLICY"] == "passive"

    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    call(experiment, "--runs=adamw", "--jobs=1")
    assert environments[-1]["OMP_WAIT_POLICY"] == "active"
    assert "OMP_NUM_THREADS" not in environments[-1]


def test_slurm_script_starts_one_run_per_task(
    experiment: Path, call: Caller, tmp_path: Path
) -> None:
    text = call(experiment, "--seeds=2", "--gpus=8", "--print=slurm", "--train.device=auto")
    assert "#SBATCH --array=0-7" in text
    assert "#SBATCH --gpus-per-node=8" in text
    assert "gpus" not in call(experiment, "--print=slurm")  # the experiment's device is the CPU

    # Replace scripts/slurm.sh by a script that prints its arguments.
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/slurm.sh").write_text('echo "$@"\n')
    (tmp_path / "jobs.sh").write_text(text)
    done = subprocess.run(
        ["bash", "jobs.sh"],
        capture_output=True,
        text=True,
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "3"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    arguments = "--run=lion --name=lion,seed=1338 --train.device=auto --train.seed=1338"
    assert done.stdout == f"{experiment} {arguments}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs=sofia"], "no run named 'sofia'; there are: adamw"),
        (["--horizons=0"], "--horizons=0: must be numbers greater than 0"),
        (["--horizons=a,b"], "--horizons=a,b: must be numbers"),
        (["--sweep"], "none of its runs has a grid; add e.g. [runs.adamw.grid]"),
        (["--scale=gpu"], "--scale=gpu: scales are files now; use configs/gpu/"),
        (["--train.max_step=3"], "unknown argument --train.max_step"),
        (["--train.max_steps"], "write --section.key=value"),
        (["--run=adamw"], "unknown argument --run=adamw"),
    ],
)
def test_bad_arguments_give_a_one_line_error(
    experiment: Path,
    call: Caller,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(experiment, *arguments)

    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
