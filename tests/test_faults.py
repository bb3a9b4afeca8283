"""Test faults: kills, signals, full disks, damaged and foreign files, another number of ranks."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train
from runtime import checkpoint
from runtime.cli import UserError
from runtime.files import locked, whole_file
from tests.conftest import ROOT, newest_state, read_lines
from tests.test_train import TORCHRUN, Runner, refuse, torchrun

TORTURE = [sys.executable, str(ROOT / "tests/torture.py")]
PREPARE = [sys.executable, str(ROOT / "data/openwebtext/prepare.py")]


def write_jsonl(path: Path, texts: list[str]) -> None:
    """Write one document per line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize(
    "optimizer",
    [
        "sophia-g",
        pytest.param("sophia-h", marks=pytest.mark.slow),
        pytest.param("adamw", marks=pytest.mark.slow),
        pytest.param("lion", marks=pytest.mark.slow),
    ],
)
def test_random_kills_lose_nothing(optimizer: str) -> None:
    """Run a short form of tests/torture.py, which checks losses, lines, checkpoints and weights."""
    command = [*TORTURE, "--kills", "6", "--optimizers", optimizer]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "6 kills" in done.stdout
    assert "checkpoints torn: 0, steps lost or doubled: 0" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_torture(ranks: str) -> None:
    kills = {"1": "50", "2": "10"}[ranks]
    command = [*TORTURE, "--kills", kills, "--ranks", ranks]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps lost or doubled: 0") == 4


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(
    experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    """Kill rank 1 in its 8th step, after the checkpoint of step 5, and restart with --resume."""
    arguments = [str(experiment), "--run=lion", "--train.micro_batch_size=4"]
    command = [*TORCHRUN, "--nproc_per_node=2", "--max-restarts=1", "--"]
    command += [str(ROOT / "tests/torture.py"), "--child", "in a step", "8", "1"]
    command += [*arguments, "--resume"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    out = f"--train.out_dir={tmp_path / 'whole'}"
    assert torchrun(2, *arguments, out).returncode == 0
    for key in ("loss", "val_loss"):
        expected = read_lines(tmp_path / "whole/tiny/lion", key)
        assert read_lines(tmp_path / "out/tiny/lion", key) == expected


@pytest.mark.parametrize(
    "run",
    [
        "sophia-g",
        pytest.param("adamw", marks=pytest.mark.slow),
        pytest.param("lion", marks=pytest.mark.slow),
        pytest.param("sophia-h", marks=pytest.mark.slow),
    ],
)
def test_moving_to_two_ranks_and_back_keeps_the_losses(
    run: str, experiment: Path, tmp_path: Path
) -> None:
    """Compare in float64: sums in a different order differ by 1e-16, which 12 steps amplify.

    The optimizer's state is sharded over the two ranks, and not sharded before and after.
    """
    script = str(ROOT / "tests/float64_train.py")
    command = [sys.executable, script, str(experiment), f"--run={run}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, f"--train.out_dir={tmp_path / 'whole'}"], check=True, env=environment)

    # Steps 1 to 4 on one rank.
    done = subprocess.run(command, env=environment | {"STOP_AFTER": "4"})
    assert done.returncode == 128 + signal.SIGTERM

    # Steps 5 to 8 on two.
    os.environ["STOP_AFTER"] = "8"
    arguments = ["--train.micro_batch_size=2", "--train.shard_optimizer=true", "--resume"]
    moved = torchrun(2, experiment, f"--run={run}", *arguments, script=script)
    del os.environ["STOP_AFTER"]
    assert "stopped by a signal after step 8" in moved.stdout, moved.stderr

    # The rest on one.
    back = [*command, "--train.micro_batch_size=4", "--resume"]
    subprocess.run(back, check=True, env=environment)

    keys = ["loss", "val_loss"]
    if run == "sophia-g":
        keys += ["unclipped", "hessian_norm"]
    for key in keys:
        expected = dict(read_lines(tmp_path / "whole/tiny" / run, key))
        found = dict(read_lines(tmp_path / "out/tiny" / run, key))
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_and_set_the_exit_status(
    number: int, experiment: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "train.py"), str(experiment)]
    command += ["--run=adamw", "--train.max_steps=100000"]

    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)

    assert process.returncode == 128 + number
    assert "continue with --resume" in output
    newest = newest_state(tmp_path / "out/tiny/adamw")
    assert newest["step"] == len(read_lines(tmp_path / "out/tiny/adamw", "loss"))


def test_slurm_script_stops_and_requeues_before_the_time_limit(tmp_path: Path) -> None:
    """Check with fake SLURM commands that its warning stops the steps and requeues the job."""
    log = tmp_path / "log"
    pid = tmp_path / "pid"
    fake_commands = {
        "srun": f'echo "srun $*" >>{log}; echo $$ >{pid}; trap "exit 0" TERM; '
        "while :; do sleep 0.1; done",
        "scancel": f'echo "scancel $*" >>{log}; kill -TERM "$(cat {pid})"',
        "scontrol": f'[ "$1" = show ] && echo node7 || echo "scontrol $*" >>{log}',
    }
    for name, body in fake_commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42"}
    environment |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}

    # Start it, and send SLURM's warning.
    command = ["bash", str(ROOT / "scripts/slurm.sh"), "configs/gpt2_125m.toml", "--run=lion"]
    process = subprocess.Popen(command, env=environment)
    while not pid.exists():
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 0

    started, cancelled, requeued = log.read_text().splitlines()
    assert "--rdzv_endpoint=node7:20042" in started
    assert "--nproc_per_node=1" in started
    assert started.endswith("-- train.py configs/gpt2_125m.toml --run=lion --resume")
    assert (cancelled, requeued) == ("scancel --signal=TERM 42", "scontrol requeue 42")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 400 KB, whose size and mode the test may change by `mount -o remount`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount a tmpfs")
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")

    yield folder

    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_keeps_older_checkpoints_and_the_run_resumes(
    small_disk: Path, experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    arguments = [str(experiment), "--run=adamw"]
    arguments += ["--train.checkpoint_interval=1", "--train.keep_checkpoints=100"]
    run_train(*arguments, f"--train.out_dir={tmp_path / 'whole'}")

    # It stops when the disk is full.
    out = f"--train.out_dir={small_disk}"
    error = refuse(run_train, capsys, *arguments, out)
    assert "the disk is full" in error
    assert str(small_disk) in error
    folder = small_disk / "tiny/adamw"
    kept = checkpoint.checkpoints(folder)
    assert 0 < len(kept) < 12
    assert [checkpoint.load(path)["step"] for path in kept] == list(range(1, len(kept) + 1))

    # Still full.
    refuse(run_train, capsys, *arguments, out, "--resume")
    assert checkpoint.checkpoints(folder) == kept

    # With more room it continues.
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    run_train(*arguments, out, "--resume")
    for key in ("loss", "val_loss"):
        assert read_lines(folder, key) == read_lines(tmp_path / "whole/tiny/adamw", key)
    assert not list(folder.glob("*.tmp"))


def test_read_only_disk_gives_one_error_line(
    small_disk: Path, experiment: Path, run_train: Runner, capsys
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    error = refuse(run_train, capsys, experiment, "--run=adamw", f"--train.out_dir={small_disk}")
    assert "Read-only file system" in error


@pytest.fixture
def trained(experiment: Path, run_train: Runner, tmp_path: Path) -> Path:
    """Train with AdamW and return the folder of the run."""
    run_train(experiment, "--run=adamw")
    return tmp_path / "out/tiny/adamw"


def test_flipped_bits_are_detected_or_harmless(trained: Path, tmp_path: Path) -> None:
    """Refuse the checkpoint, or read it unchanged: zip files have padding and unused fields."""
    path = checkpoint.checkpoints(trained)[-1]
    whole, content = checkpoint.load(path), path.read_bytes()
    rng = random.Random(0)
    refused = 0

    for _ in range(200):
        position = rng.randrange(len(content))
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            read = checkpoint.load(tmp_path / "flipped.pt")
        except UserError:
            refused += 1
            continue
        for name, weight in whole["model"].items():
            assert torch.equal(weight, read["model"][name])
        assert read["step"] == whole["step"]

    assert refused > 100


def test_checkpoints_of_other_runs_are_refused(
    trained: Path, experiment: Path, run_train: Runner, tmp_path: Path, tiny_data: Path, capsys
) -> None:
    newest = trained / "step_00000012.pt"
    resume = (experiment, "--run=adamw", "--resume")

    # Of another model.
    arguments = ["--run=lion", "--model.n_embd=32", f"--train.out_dir={tmp_path / 'other'}"]
    run_train(experiment, *arguments)
    shutil.copy(tmp_path / "other/tiny/lion/step_00000012.pt", newest)
    assert "was started with model.n_embd = 32" in refuse(run_train, capsys, *resume)

    # Of another optimizer.
    run_train(experiment, "--run=lion", f"--train.out_dir={tmp_path / 'third'}")
    shutil.copy(tmp_path / "third/tiny/lion/step_00000012.pt", newest)
    assert "was started with optimizer.name = 'lion'" in refuse(run_train, capsys, *resume)

    # Of other data.
    shutil.copytree(tiny_data, tmp_path / "data")
    content = bytearray((tmp_path / "data/train.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "data/train.bin").write_bytes(content)
    newest.unlink()
    error = refuse(run_train, capsys, *resume, f"--data.path={tmp_path / 'data'}")
    assert "was started with another train.bin" in error

    # With the right config, but weights of another shape.
    state = torch.load(trained / "step_00000010.pt", weights_only=True)
    state["model"]["wpe.weight"] = state["model"]["wpe.weight"][:3].clone()
    torch.save(state, newest)
    assert "not a checkpoint of this run" in refuse(run_train, capsys, *resume)

    # Without it, the run resumes from its own older one.
    newest.unlink()
    run_train(*resume)
    assert newest.exists()


def test_full_gpu_does_not_blame_the_checkpoint(
    trained: Path, experiment: Path, run_train: Runner, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def fill_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    (trained / "step_00000012.pt").unlink()  # a finished run does not resume
    monkeypatch.setattr(train.state, "load_state", fill_memory)
    error = refuse(run_train, capsys, experiment, "--run=adamw", "--resume")
    assert "is out of memory" in error
    assert "train.micro_batch_size=" in error
    assert "checkpoint of this run" not in error
    assert (trained / "step_00000010.pt").exists()

    # A device that has failed is not a mistake of the user: the traceback stays.
    def fail(*arguments: object) -> None:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error")

    monkeypatch.setattr(train.state, "load_state", fail)
    with pytest.raises(torch.AcceleratorError):
        run_train(experiment, "--run=adamw", "--resume")


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_malicious_checkpoint_executes_nothing(trained: Path, tmp_path: Path) -> None:
    state = torch.load(trained / "step_00000012.pt", weights_only=True)
    state["config"]["extra"] = Payload(tmp_path / "executed")
    torch.save(state, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))

    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(UserError, match="unreadable"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()

    # A plain unpickling does execute the payload, so the test could fail.
    with pytest.raises(OSError, match="exists"):
        pickle.loads(pickle.dumps(Payload(tmp_path)))


def test_run_folder_has_one_writer(
    trained: Path, experiment: Path, run_train: Runner, capsys, monkeypatch
) -> None:
    holder = os.open(trained, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    (trained / "step_00000012.pt").unlink()

    with pytest.raises(UserError, match="another process writes here"), locked(trained, wait_s=0.2):
        pass
    error = refuse(run_train, capsys, experiment, "--run=adamw", "--resume")
    assert "another process writes here" in error

    os.close(holder)
    run_train(experiment, "--run=adamw", "--resume")


def test_concurrent_preparation_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_jsonl(tmp_path / "a.jsonl", ["word " * 50] * 50)
    command = [*PREPARE, "--files", str(tmp_path / "*.jsonl"), "--out", str(out)]

    with locked(out):
        done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 2
    assert "another process writes here" in done.stderr
    assert list(out.iterdir()) == []


def test_whole_file_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_half_way() -> None:
        with whole_file(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert path.read_bytes() == b"old"

    with whole_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_training_detects_changed_token_files(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"number {i} " * 20 for i in range(50)])
    data = tmp_path / "data"
    command = [*PREPARE, "--files", str(tmp_path / "*.jsonl"), "--out", str(data)]
    subprocess.run(command, check=True, capture_output=True)

    # Flip a bit.
    train_bin = data / "train.bin"
    content = bytearray(train_bin.read_bytes())
    content[len(content) // 2] ^= 1
    train_bin.write_bytes(content)

    arguments = ["--run=adamw", f"--data.path={data}", "--model.vocab_size=50257"]
    error = refuse(run_train, capsys, experiment, *arguments)
    assert "its content does not match its meta.json" in error
    assert stat.S_ISREG(train_bin.stat().st_mode)


def test_damaged_checkpoint_does_not_displace_a_good_one(
    trained: Path, experiment: Path, run_train: Runner
) -> None:
    newest = trained / "step_00000012.pt"
    newest.write_bytes(newest.read_bytes()[:-200])
    run_train(experiment, "--run=adamw", "--resume")
    names = [path.name for path in checkpoint.checkpoints(trained)]
    assert names == ["step_00000010.pt", "step_00000012.pt"]
    assert (trained / "step_00000012.pt.damaged").exists()


def test_damaged_log_line_is_skipped(
    trained: Path, experiment: Path, run_train: Runner, capsys
) -> None:
    (trained / "step_00000012.pt").unlink()
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    lines.insert(5, "%%%")
    (trained / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run_train(experiment, "--run=adamw", "--resume")
    assert [step for step, _ in read_lines(trained, "loss")] == list(range(1, 13))
    assert "metrics.jsonl, line 6: damaged, skipped" in capsys.readouterr().err


@pytest.mark.slow
def test_preparing_again_repairs_damaged_token_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"number {i} " * 20 for i in range(50)])
    data = tmp_path / "data"
    command = [*PREPARE, "--files", str(tmp_path / "*.jsonl"), "--out", str(data)]
    subprocess.run(command, check=True, capture_output=True)
    train_bin = data / "train.bin"
    whole = train_bin.read_bytes()

    # A missing, a truncated and a changed file.
    for damaged in (None, whole[:100], bytes([whole[0] ^ 1]) + whole[1:]):
        train_bin.unlink()
        if damaged:
            train_bin.write_bytes(damaged)
        subprocess.run(command, check=True, capture_output=True)
        assert train_bin.read_bytes() == whole

    # A damaged progress.json is reported.
    wrong = '{"shards": 0, "documents": 0, "tokens": {"train": 9, "val": 0}, "recipe": {}}'
    for progress in ("{", "[]", "{}", wrong):
        shutil.rmtree(data)
        data.mkdir()
        (data / "progress.json").write_text(progress)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert "progress.json: damaged" in done.stderr
