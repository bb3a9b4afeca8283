"""Run scripts/slurm.sh and run.py's array jobs under a real SLURM on this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, read_lines

CLUSTER = ["bash", str(ROOT / "tests/slurm_cluster.sh")]
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")
IS_AVAILABLE = (
    all(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in NEEDED)
    and os.geteuid() == 0
    and (ROOT / ".venv/bin/activate").exists()
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_AVAILABLE, reason="needs SLURM's programs, root and .venv"),
]
STOPPED = "stopped by a signal after step"
FINISHED = "finished; results are in"


@pytest.fixture(params=["proctrack/cgroup", "proctrack/linuxproc"])
def cluster(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Start SLURM with one of its two ways to find a job's processes; return its folder.

    With linuxproc every process of a step gets SLURM's signals, and the ranks torchrun's too.
    """
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    subprocess.run([*CLUSTER, "up", str(folder), request.param], check=True, timeout=60)
    yield folder
    call("scancel", "--user=root")
    time.sleep(1)
    subprocess.run([*CLUSTER, "down", str(folder)], check=True)
    time.sleep(1)


def call(*command: object) -> str:
    """Run a command of SLURM's and return what it prints."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    return done.stdout


def submit(log: Path, *command: object) -> str:
    """Submit a job that writes to `log`, and return its number."""
    options = ("--parsable", "--time=60", f"--output={log}")
    job = call("sbatch", *options, *command).strip()
    assert job, "sbatch refused the job"
    return job


def state(job: str) -> str:
    found = re.search(r"JobState=(\w+)", call("scontrol", "show", "job", job))
    return found[1] if found else "?"


def wait_until(condition: Callable[[], bool], log: Path, seconds: float = 90) -> None:
    for _ in range(int(5 * seconds)):
        if condition():
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:] if log.exists() else f"{log} does not exist")


def count(log: Path, text: str) -> int:
    return log.read_text().count(text) if log.exists() else 0


def wait_for(log: Path, text: str, times: int = 1) -> None:
    wait_until(lambda: count(log, text) >= times, log)


def wait_for_state(job: str, wanted: str, log: Path) -> None:
    wait_until(lambda: state(job) == wanted, log)


def forever(experiment: Path) -> list[str]:
    return [str(experiment), "--run=sophia-g", "--train.max_steps=1000000"]


def wait_for_checkpoint(folder: Path, log: Path) -> None:
    wait_until(lambda: any(folder.glob("step_*.pt")), log)


def test_job_saves_before_its_time_limit_and_continues_when_requeued(
    cluster: Path, experiment: Path, tmp_path: Path
) -> None:
    """Send SLURM's warning twice, and compare the losses with those of an undisturbed run."""
    log = tmp_path / "job.log"
    steps = ["--run=sophia-g", "--train.max_steps=2000", "--train.log_interval=5"]
    steps += [
        "--train.eval_interval=500",
        "--train.checkpoint_interval=1000000",
        "--train.micro_batch_size=4",
    ]
    options = ("--gpus-per-node=2", "--cpus-per-task=2")
    job = submit(log, *options, "scripts/slurm.sh", experiment, *steps)

    for stops in (1, 2):
        wait_for(log, "lr ", times=count(log, "lr ") + 5)
        call("scancel", "--batch", "--signal=USR1", job)
        wait_for(log, STOPPED, times=stops)
    wait_for(log, FINISHED)
    wait_for_state(job, "COMPLETED", log)
    assert "after step" in log.read_text()

    command = [sys.executable, str(ROOT / "scripts/torchrun.py"), "--standalone"]
    command += ["--nproc_per_node=2", "--", str(ROOT / "train.py"), str(experiment), *steps]
    out = tmp_path / "whole"
    subprocess.run([*command, f"--train.out_dir={out}"], check=True, capture_output=True)
    for key in ("loss", "val_loss"):
        found = read_lines(tmp_path / "out/tiny/sophia-g", key)
        assert found == read_lines(out / "tiny/sophia-g", key)


def test_scancel_saves(cluster: Path, experiment: Path, tmp_path: Path) -> None:
    for how in (["scancel"], ["scontrol", "requeue"]):
        log = tmp_path / f"{how[0]}.log"
        out = f"--train.out_dir={tmp_path / how[0]}"
        job = submit(log, "--gpus-per-node=1", "scripts/slurm.sh", *forever(experiment), out)
        wait_for(log, "lr ", times=5)
        call(*how, job)

        # The message may be lost, because srun forwards nothing any more.
        wait_for_checkpoint(tmp_path / how[0] / "tiny/sophia-g", log)
        call("scancel", job)


def test_jobs_on_one_node_do_not_share_a_port(
    cluster: Path, experiment: Path, tmp_path: Path
) -> None:
    """Start the second job while the first one runs, and let it end later."""
    jobs = []
    for index, steps in enumerate((1000, 2000)):
        log = tmp_path / f"{index}.log"
        options = ("--nodelist=n1", "--gpus-per-node=1", "--cpus-per-task=1")
        arguments = ("--run=adamw", f"--train.max_steps={steps}")
        out = f"--train.out_dir={tmp_path / str(index)}"
        jobs.append(submit(log, *options, "scripts/slurm.sh", experiment, *arguments, out))
        wait_for(log, "lr ")
    for index, job in enumerate(jobs):
        wait_for_state(job, "COMPLETED", tmp_path / f"{index}.log")


def test_dead_agent_ends_the_job(cluster: Path, experiment: Path, tmp_path: Path) -> None:
    """Kill torchrun on the second of two nodes; the rank on the first one still saves."""
    log = tmp_path / "job.log"
    options = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1")
    arguments = [*forever(experiment), "--train.micro_batch_size=4"]
    job = submit(log, *options, "scripts/slurm.sh", *arguments)
    wait_for(log, "lr ", times=5)

    (agent,) = [process for process in agents(job) if process.environ()["SLURM_NODEID"] == "1"]
    agent.send_signal(signal.SIGKILL)
    wait_for_state(job, "FAILED", log)
    wait_until(lambda: not agents(job), log)


def agents(job: str) -> list[psutil.Process]:
    """Return the torchrun processes of a job."""
    found = []
    for process in psutil.process_iter():
        try:
            is_agent = "scripts/torchrun.py" in process.cmdline()[1:2]
            if is_agent and process.environ().get("SLURM_JOB_ID") == job:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_node_without_gpus_has_one_rank(cluster: Path, experiment: Path, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job = submit(log, "scripts/slurm.sh", experiment, "--run=lion")
    wait_for_state(job, "COMPLETED", log)
    assert "device            1 × cpu" in log.read_text()


def test_array_job_saves_is_requeued_and_appends_its_logs(
    cluster: Path, experiment: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "scripts/run.py"), str(experiment)]
    command += ["--runs=adamw,lion", "--print=slurm", "--train.max_steps=2000"]
    script = tmp_path / "jobs.sh"
    script.write_text(subprocess.run(command, capture_output=True, text=True).stdout)
    assert "gpus" not in script.read_text()  # the experiment is one for the CPU

    job = submit(tmp_path / "%a.log", script)
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    for log in logs:
        wait_for(log, "lr ", times=5)
    call("scancel", "--batch", "--signal=USR1", job)
    for log in logs:
        wait_for(log, STOPPED)
        wait_for(log, FINISHED)
        assert count(log, "start  ") == 2
    for run in ("adamw", "lion"):
        steps = [step for step, _ in read_lines(tmp_path / "out/tiny" / run, "loss")]
        assert steps == list(range(1, 2001))
