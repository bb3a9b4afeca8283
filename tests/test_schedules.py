"""Test the learning rate's schedules, and runs that branch off another one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.report import make_report
from analysis.runs import find_runs
from runtime.experiment import load_experiment
from tests.conftest import read_lines
from tests.test_train import refuse
from train import learning_rate

Runner = Callable[..., None]


def test_learning_rate_has_warmup_and_cosine_decay(experiment: Path) -> None:
    overrides = {"train.max_steps": "100", "train.warmup_steps": "10"}
    config = load_experiment(experiment, "adamw", overrides)

    rates = [learning_rate(config, step) / config.optimizer.lr for step in range(101)]

    assert rates[0] == pytest.approx(1 / 11)
    assert rates[9] == pytest.approx(10 / 11)
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.05 + 0.95 / 2)
    assert rates[100] == pytest.approx(0.05)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_linear_and_wsd_schedules(experiment: Path) -> None:
    def rates(**keys: str) -> list[float]:
        overrides = {"train.max_steps": "100", "train.warmup_steps": "10"}
        overrides |= {f"train.{key}": value for key, value in keys.items()}
        config = load_experiment(experiment, "adamw", overrides)
        return [learning_rate(config, step) / config.optimizer.lr for step in range(101)]

    linear = rates(schedule="linear", final_lr_ratio="0.1")
    assert linear[:10] == rates()[:10]  # the same warm-up
    for step in range(10, 101):
        assert linear[step] == pytest.approx(1 - 0.9 * (step - 10) / 90)

    wsd = rates(schedule="wsd", decay_share="0.25", final_lr_ratio="0")
    assert wsd[:10] == rates()[:10]
    assert wsd[10:76] == [1.0] * 66
    for step in range(75, 101):
        assert wsd[step] == pytest.approx((100 - step) / 25)


# ---- Branches ------------------------------------------------------------------------------------

WSD = ("--train.schedule=wsd", "--train.decay_share=0.5", "--train.keep_checkpoints=9")


@pytest.mark.parametrize("run", ["adamw", "sophia-g", "sophia-h"])
def test_branch_equals_a_run_with_its_own_horizon(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    """Train 24 steps, and branch off after 6 for a horizon of 12; checkpoints are made in between.

    The branch is stopped and resumed as well.
    """
    arguments = [experiment, f"--run={run}", *WSD, "--train.checkpoint_interval=3"]
    run_train(*arguments, "--name=long", "--train.max_steps=24")
    short = [*arguments, "--train.max_steps=12"]
    run_train(*short, "--name=whole")
    run_train(*short, "--name=branch", "--branch-from=long@6")
    folder = tmp_path / "out/tiny"
    assert f"start             after step 6, from {folder}/long/" in capsys.readouterr().out

    # Resumed, it need not be told again where it began, even if it has no checkpoint of its own.
    (folder / "branch/step_00000012.pt").unlink()
    run_train(*short, "--name=branch", "--resume")
    assert f"after step 9, from {folder}/branch/" in capsys.readouterr().out
    for path in (folder / "branch").glob("*.pt"):
        path.unlink()
    run_train(*short, "--name=branch", "--resume")
    assert f"after step 6, from {folder}/long/" in capsys.readouterr().out

    for key in ("loss", "val_loss"):
        assert read_lines(folder / "branch", key) == read_lines(folder / "whole", key)
    environment = json.loads((folder / "branch/environment.json").read_text())
    assert environment["branched_from"] == "long@6"
    assert json.loads((folder / "whole/environment.json").read_text())["branched_from"] is None
    runs = find_runs([folder / "branch", folder / "whole"])
    assert (
        "note: tiny/branch is a branch: its first 6 steps are long's"
        in make_report(runs).as_markdown()
    )


def test_branches_are_compared_as_horizons_of_their_run(
    experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    common = [*WSD, "--train.checkpoint_interval=6", "--train.warmup_steps=1"]
    for run in ("adamw", "lion"):
        run_train(experiment, f"--run={run}", *common, "--train.max_steps=24")
        branch = [f"--name={run},max_steps=12", "--train.max_steps=12", f"--branch-from={run}@6"]
        run_train(experiment, f"--run={run}", *common, *branch)
    report = make_report(find_runs([tmp_path / "out"])).as_markdown()
    assert "The paper's test: T steps against T and 2T" in report
    assert "| tiny/lion,max_steps=12" in report.split("The paper's test")[1]


def test_branch_from_nothing_is_refused_in_a_dry_run(
    experiment: Path, run_train: Runner, capsys
) -> None:
    arguments = (experiment, "--run=adamw", *WSD, "--dry-run", "--branch-from=adamw@6")
    assert "checkpoints of that run: none" in refuse(run_train, capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--branch-from=long", "must be RUN@STEP, such as adamw@8000"),
        ("--branch-from=long@7", "does not exist; checkpoints of that run: 3, 6, 9,"),
        ("--branch-from=none@6", "does not exist; checkpoints of that run: none"),
        ("--branch-from=long@9", "step 9 is not in the stable phase of branch"),
        (
            "--branch-from=long@6 --train.schedule=cosine",
            "long has train.schedule = 'wsd', this run",
        ),
        ("--branch-from=long@6 --optimizer.lr=0.5", "long has optimizer.lr = 0.01, this run 0.5"),
        ("--branch-from=long@6 --train.seed=5", "long has train.seed = "),
    ],
)
def test_branches_that_are_not_the_same_run_are_refused(
    arguments: str, message: str, experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    common = [experiment, "--run=adamw", *WSD, "--train.checkpoint_interval=3"]
    run_train(*common, "--name=long", "--train.max_steps=24")
    capsys.readouterr()
    error = refuse(run_train, capsys, *common, "--name=branch", *arguments.split())
    assert message in error
    assert not (tmp_path / "out/tiny/branch").exists()
