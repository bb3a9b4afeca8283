"""Test wandb from end to end against a stand-in for its service: training, syncing, comparing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from analysis.report import make_report
from analysis.runs import find_runs, wandb_runs
from runtime import trackers
from runtime.cli import run_main
from runtime.run_folder import METRICS, read_metrics
from tests.conftest import ROOT, load_script
from tests.wandb_server import ServedRun, WandbServer, serve_wandb

GROUP = "e/sophia-gpt2/tiny"
sync = load_script("wandb_sync")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    with serve_wandb() as running:
        environment = running.environment | {"WANDB_CACHE_DIR": str(tmp_path / "wandb_cache")}
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        yield running
    assert running.unknown == []


def served(server: WandbServer, folder: Path) -> ServedRun:
    return server.runs[(folder / "wandb_id").read_text()]


def assert_every_record_arrived_once(server: WandbServer, folder: Path) -> None:
    """Compare the server's rows with the records of metrics.jsonl that trackers get."""
    run = served(server, folder)
    expected = [record for record in read_metrics(folder / METRICS) if trackers.is_tracked(record)]
    rows = run.rows
    assert len(rows) == len(expected)
    for row, record in zip(rows, expected, strict=True):
        assert {key: row.get(key) for key in record} == record
    assert set(run.arrivals.values()) == {1}


def train_process(experiment: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), str(experiment), "--run=sophia-g"]
    return subprocess.Popen(
        [*command, "--wandb.mode=online", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def train(experiment: Path, *arguments: str, status: int = 0) -> str:
    """Run train.py to its end and return its messages on stderr."""
    process = train_process(experiment, *arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors
    return errors


def stop_after(experiment: Path, step: int, *arguments: str) -> None:
    """Run train.py, which is sent SIGTERM in the given step."""
    command = [sys.executable, str(ROOT / "tests/float64_train.py"), str(experiment)]
    command += ["--run=sophia-g", "--wandb.mode=online", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "STOP_AFTER": str(step)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr


@pytest.mark.parametrize("log_interval", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_online_run_is_compared_as_its_folder_is(
    log_interval: int, experiment: Path, server: WandbServer, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "out/tiny/sophia-g"
    train(experiment, f"--train.log_interval={log_interval}")
    assert_every_record_arrived_once(server, folder)
    assert served(server, folder).state == "finished"
    assert served(server, folder).summary["final/step"] == 12

    report = make_report(wandb_runs(GROUP)).as_markdown()
    local = make_report(find_runs([folder])).as_markdown()
    if log_interval == 1:
        assert report == local
    for column in ("T(Hessian) ms", "overhead"):
        assert cell(report, column) not in ("–", "")
    assert cell(report, "T(Hessian) ms") == cell(local, "T(Hessian) ms")


def cell(report: str, column: str) -> str:
    """Return the first row's value in a column of the tables of a report."""
    lines = report.splitlines()
    header = next(i for i, line in enumerate(lines) if f" {column} " in line)
    names, values = lines[header].split("|"), lines[header + 2].split("|")
    return next(v.strip() for n, v in zip(names, values, strict=True) if n.strip() == column)


@pytest.mark.parametrize(
    "step", [pytest.param(6, marks=pytest.mark.slow), 8, pytest.param(12, marks=pytest.mark.slow)]
)
def test_stopped_run_continues_its_curve(
    step: int, experiment: Path, server: WandbServer, tmp_path: Path
) -> None:
    """Stop where a validation is due (8), at the end (12), and elsewhere."""
    folder = tmp_path / "out/tiny/sophia-g"
    stop_after(experiment, step)
    assert served(server, folder).state == "failed"
    assert not any(run.is_finished for run in wandb_runs(GROUP))

    errors = train(experiment, "--resume")
    assert "WARNING" not in errors, errors  # wandb has dropped nothing
    assert_every_record_arrived_once(server, folder)
    assert served(server, folder).state == "finished"
    (run,) = wandb_runs(GROUP)
    assert run.is_finished


def wait_for_line(process: subprocess.Popen, text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"no line with {text!r}")


@pytest.mark.slow
def test_killed_run_continues_its_curve(
    experiment: Path, server: WandbServer, tmp_path: Path
) -> None:
    options = ("--train.max_steps=300", "--train.checkpoint_interval=50")
    process = train_process(experiment, *options)
    wait_for_line(process, "step 130/")
    process.send_signal(signal.SIGKILL)
    process.communicate()

    train(experiment, *options, "--resume")
    folder = tmp_path / "out/tiny/sophia-g"
    rows = {row["_step"]: row for row in served(server, folder).rows}
    expected = [record for record in read_metrics(folder / METRICS) if trackers.is_tracked(record)]
    assert len(rows) == len(served(server, folder).rows) == len(expected)
    for record in expected:
        row = rows[trackers.position_of(record)]
        for key in ("step", "loss", "val_loss", "lr"):
            assert row.get(key) == record.get(key)


@pytest.mark.slow
def test_errors_of_the_server_lose_nothing(
    experiment: Path, server: WandbServer, tmp_path: Path
) -> None:
    process = train_process(experiment, "--train.max_steps=600")
    wait_for_line(process, "step 200/")
    server.misbehave("error", seconds=4)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_every_record_arrived_once(server, tmp_path / "out/tiny/sophia-g")


def test_hanging_server_does_not_keep_a_run_from_ending(
    experiment: Path,
    server: WandbServer,
    run_train: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    monkeypatch.setattr(trackers, "FINISH_TIMEOUT", 3.0)
    close = trackers.WandbTracker.close

    def hang_and_close(*arguments) -> None:
        server.misbehave("hang")
        close(*arguments)

    monkeypatch.setattr(trackers.WandbTracker, "close", hang_and_close)
    started = time.monotonic()
    run_train(experiment, "--run=sophia-g", "--wandb.mode=online")
    assert time.monotonic() - started < 60
    captured = capsys.readouterr()
    assert "upload later with scripts/wandb_sync.py" in captured.err
    assert "finished; results are in" in captured.out

    # Later, the rest arrives.
    server.misbehave("none")
    monkeypatch.setattr(trackers.WandbTracker, "close", close)
    folder = tmp_path / "out/tiny/sophia-g"
    monkeypatch.setattr(sys, "argv", ["wandb_sync.py", str(folder)])
    run_main(sync.main)
    assert len(served(server, folder).rows) == 16
    assert served(server, folder).state == "finished"


@pytest.mark.slow
def test_signal_ends_the_wait_for_wandb(
    experiment: Path, server: WandbServer, tmp_path: Path
) -> None:
    process = train_process(experiment, "--train.max_steps=400")
    wait_for_line(process, "step 100/")
    server.misbehave("hang")
    wait_for_line(process, "finished; results are in")
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM
