"""What happens to a run when its machine fails it: kills, disks, torn and foreign files, signals, other hardware."""

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

from runtime import checkpoint
from runtime.cli import UserError
from runtime.files import locked, whole_file
from tests.conftest import OPTIMIZERS, ROOT, read_lines
from tests.test_train import Runner, refuse, torchrun


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_at_random_places_nothing_is_lost(optimizer: str) -> None:
    """The short form of tests/torture.py, which checks losses, lines, checkpoints and weights."""
    command = [sys.executable, str(ROOT / "tests/torture.py"), "--kills", "6", "--optimizers", optimizer]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "6 kills" in done.stdout
    assert "checkpoints torn: 0, steps lost or doubled: 0" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_torture(ranks: str) -> None:
    kills = {"1": "50", "2": "10"}[ranks]
    command = [sys.executable, str(ROOT / "tests/torture.py"), "--kills", kills, "--ranks", ranks]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps lost or doubled: 0") == 4


def test_torchrun_brings_a_killed_rank_back_by_itself(experiment: Path, run_train: Runner, tmp_path: Path) -> None:
    """Rank 1 is killed in its 8th step, after the checkpoint of step 5; --max-restarts and --resume do the rest."""
    arguments = [str(experiment), "--run=lion", "--train.micro_batch_size=4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command += ["--", str(ROOT / "tests/torture.py"), "--child", "in a step", "8", "1", *arguments, "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    out = f"--train.out_dir={tmp_path / 'whole'}"
    assert torchrun(2, *arguments, out).returncode == 0
    for key in ("loss", "val_loss"):
        assert read_lines(tmp_path / "out/tiny/lion", key) == read_lines(tmp_path / "whole/tiny/lion", key)


@pytest.mark.parametrize(
    "run", ["adamw", "sophia-g", *(pytest.param(run, marks=pytest.mark.slow) for run in ("lion", "sophia-h"))]
)
def test_a_run_that_moves_to_two_ranks_and_back_follows_the_same_losses(
    run: str, experiment: Path, tmp_path: Path
) -> None:
    """In float64 to 1e-9: sums in another order round differently, and 12 steps amplify 1e-16 to less than that.

    The two ranks share the optimizer's state out between them, the one before and after has all of it.
    """
    driver = [sys.executable, str(ROOT / "tests/float64_train.py"), str(experiment), f"--run={run}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*driver, f"--train.out_dir={tmp_path / 'whole'}"], check=True, env=environment)
    assert subprocess.run(driver, env=environment | {"STOP_AFTER": "4"}).returncode == 128 + signal.SIGTERM
    os.environ["STOP_AFTER"] = "8"
    two = ["--train.micro_batch_size=2", "--train.shard_optimizer=true", "--resume"]
    moved = torchrun(2, experiment, f"--run={run}", *two, script=driver[1])
    del os.environ["STOP_AFTER"]
    assert "stopped by a signal after step 8" in moved.stdout, moved.stderr
    subprocess.run([*driver, "--train.micro_batch_size=4", "--resume"], check=True, env=environment)
    for key in ("loss", "val_loss", *(("unclipped", "hessian_norm") if run == "sophia-g" else ())):
        found, expected = (dict(read_lines(tmp_path / name / "tiny" / run, key)) for name in ("out", "whole"))
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_and_end_with_their_status(number: int, experiment: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), str(experiment), "--run=adamw", "--train.max_steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert "the same command with --resume continues" in output
    newest = checkpoint.load_newest(tmp_path / "out/tiny/adamw")
    assert newest is not None
    assert newest["step"] == len(read_lines(tmp_path / "out/tiny/adamw", "loss"))


def test_slurm_script_stops_and_requeues_on_its_warning(tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands: the warning becomes a SIGTERM to the steps, then the job is requeued."""
    log = tmp_path / "log"
    stand_ins = {
        "srun": f'echo "srun $*" >>{log}; echo $$ >{tmp_path}/pid; trap "exit 0" TERM; while :; do sleep 0.1; done',
        "scancel": f'echo "scancel $*" >>{log}; kill -TERM "$(cat {tmp_path}/pid)"',
        "scontrol": f'[ "$1" = show ] && echo node7 || echo "scontrol $*" >>{log}',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}
    command = ["bash", str(ROOT / "scripts/slurm.sh"), "configs/gpt2_125m.toml", "--run=lion"]
    process = subprocess.Popen(command, env=environment)
    while not (tmp_path / "pid").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 0
    started, cancelled, requeued = log.read_text().splitlines()
    assert "--rdzv_endpoint=node7:29500" in started
    assert started.endswith("-- train.py configs/gpt2_125m.toml --run=lion --resume")
    assert (cancelled, requeued) == ("scancel --signal=TERM 42", "scontrol requeue 42")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 KB, whose size and mode the test may change by `mount -o remount`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount a tmpfs")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_keeps_the_older_checkpoints_and_the_run_goes_on_when_there_is_room(
    small_disk: Path, experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    arguments = (experiment, "--run=adamw", "--train.checkpoint_interval=1", "--train.keep_checkpoints=100")
    run_train(*arguments, f"--train.out_dir={tmp_path / 'whole'}")
    out = f"--train.out_dir={small_disk}"
    said = refuse(run_train, capsys, *arguments, out)
    assert "cannot write" in said or "No space left on device" in said
    folder = small_disk / "tiny/adamw"
    kept = checkpoint.checkpoints(folder)
    assert 0 < len(kept) < 12
    assert [checkpoint.load(path)["step"] for path in kept] == list(range(1, len(kept) + 1))
    refuse(run_train, capsys, *arguments, out, "--resume")  # still full
    assert checkpoint.checkpoints(folder) == kept
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    run_train(*arguments, out, "--resume")
    for key in ("loss", "val_loss"):
        assert read_lines(folder, key) == read_lines(tmp_path / "whole/tiny/adamw", key)
    assert not list(folder.glob("*.tmp"))


def test_a_read_only_disk_is_one_line(small_disk: Path, experiment: Path, run_train: Runner, capsys) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    said = refuse(run_train, capsys, experiment, "--run=adamw", f"--train.out_dir={small_disk}")
    assert "Read-only file system" in said


@pytest.fixture
def trained(experiment: Path, run_train: Runner, tmp_path: Path) -> Path:
    run_train(experiment, "--run=adamw")
    return tmp_path / "out/tiny/adamw"


def test_any_flipped_byte_is_found_or_harmless(trained: Path, tmp_path: Path) -> None:
    """Either the checkpoint is refused, or what is read is as it was (zip files have padding and unused fields)."""
    (*_, path) = checkpoint.checkpoints(trained)
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
        else:
            assert all(torch.equal(weight, read["model"][name]) for name, weight in whole["model"].items())
            assert read["step"] == whole["step"]
    assert refused > 100


def test_foreign_checkpoints_are_refused_and_left_alone(
    trained: Path, experiment: Path, run_train: Runner, tmp_path: Path, tiny_data: Path, capsys
) -> None:
    newest = trained / "step_00000012.pt"
    again = (experiment, "--run=adamw", "--resume")
    run_train(experiment, "--run=lion", "--model.n_embd=32", f"--train.out_dir={tmp_path / 'other'}")
    shutil.copy(tmp_path / "other/tiny/lion/step_00000012.pt", newest)  # another model's, in our folder
    assert "was begun with model.n_embd = 32" in refuse(run_train, capsys, *again)
    run_train(experiment, "--run=lion", f"--train.out_dir={tmp_path / 'third'}")
    shutil.copy(tmp_path / "third/tiny/lion/step_00000012.pt", newest)  # another optimizer's
    assert "was begun with optimizer.name = 'lion'" in refuse(run_train, capsys, *again)
    shutil.copytree(tiny_data, tmp_path / "data")
    content = bytearray((tmp_path / "data/train.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "data/train.bin").write_bytes(content)
    newest.unlink()
    assert "was begun on another train.bin" in refuse(run_train, capsys, *again, f"--data.path={tmp_path / 'data'}")
    state = torch.load(trained / "step_00000010.pt", weights_only=True)
    state["model"]["wpe.weight"] = state["model"]["wpe.weight"][:3].clone()
    torch.save(state, newest)  # claims to be ours, but is not
    assert "not a checkpoint of this run" in refuse(run_train, capsys, *again)
    newest.unlink()
    run_train(*again)
    assert newest.exists()


class Payload:
    """Unpickling this would create the file of its name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_malicious_checkpoint_executes_nothing(trained: Path, tmp_path: Path) -> None:
    state = torch.load(trained / "step_00000012.pt", weights_only=True)
    state["config"]["extra"] = Payload(tmp_path / "executed")
    torch.save(state, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(UserError, match="unreadable"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(OSError, match="exists"):  # the payload works where it is executed: the test could fail
        pickle.loads(pickle.dumps(Payload(tmp_path)))


def test_one_folder_one_writer(trained: Path, experiment: Path, run_train: Runner, capsys, monkeypatch) -> None:
    holder = os.open(trained, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    (trained / "step_00000012.pt").unlink()
    with pytest.raises(UserError, match="another process writes here"), locked(trained, wait_s=0.2):
        pass
    assert "another process writes here" in refuse(run_train, capsys, experiment, "--run=adamw", "--resume")
    os.close(holder)
    run_train(experiment, "--run=adamw", "--resume")


def test_two_preparations_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "word " * 50}) + "\n" for _ in range(50)))
    command = [sys.executable, str(ROOT / "data/openwebtext/prepare.py"), "--files", str(tmp_path / "*.jsonl")]
    with locked(tmp_path / "out"):
        done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "another process writes here" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
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


def test_train_notices_content_that_is_not_what_was_prepared(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i} " * 20}) + "\n" for i in range(50)))
    command = [sys.executable, str(ROOT / "data/openwebtext/prepare.py"), "--files", str(tmp_path / "*.jsonl")]
    subprocess.run([*command, "--out", str(tmp_path / "data")], check=True, capture_output=True)
    train_bin = tmp_path / "data/train.bin"
    content = bytearray(train_bin.read_bytes())
    content[len(content) // 2] ^= 1
    train_bin.write_bytes(content)
    arguments = (experiment, "--run=adamw", f"--data.path={tmp_path / 'data'}", "--model.vocab_size=50257")
    assert "its content is not what the meta.json beside it says" in refuse(run_train, capsys, *arguments)
    assert stat.S_ISREG(train_bin.stat().st_mode)


def test_a_damaged_newest_checkpoint_does_not_push_out_the_good_one(
    trained: Path, experiment: Path, run_train: Runner
) -> None:
    newest = trained / "step_00000012.pt"
    newest.write_bytes(newest.read_bytes()[:-200])
    run_train(experiment, "--run=adamw", "--resume")
    assert [path.name for path in checkpoint.checkpoints(trained)] == ["step_00000010.pt", "step_00000012.pt"]
    assert (trained / "step_00000012.pt.damaged").exists()


def test_a_damaged_line_costs_that_line_alone(trained: Path, experiment: Path, run_train: Runner, capsys) -> None:
    (trained / "step_00000012.pt").unlink()
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    lines.insert(5, "%%%")
    (trained / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run_train(experiment, "--run=adamw", "--resume")
    assert [step for step, _ in read_lines(trained, "loss")] == list(range(1, 13))
    assert "metrics.jsonl, line 6: damaged, left out" in capsys.readouterr().err


def test_prepare_again_mends_what_train_complains_of(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i} " * 20}) + "\n" for i in range(50)))
    command = [sys.executable, str(ROOT / "data/openwebtext/prepare.py"), "--files", str(tmp_path / "*.jsonl")]
    command += ["--out", str(tmp_path / "data")]
    subprocess.run(command, check=True, capture_output=True)
    whole = (tmp_path / "data/train.bin").read_bytes()
    for damage in (None, whole[:100], bytes([whole[0] ^ 1]) + whole[1:]):
        (tmp_path / "data/train.bin").unlink()
        if damage:
            (tmp_path / "data/train.bin").write_bytes(damage)
        subprocess.run(command, check=True, capture_output=True)
        assert (tmp_path / "data/train.bin").read_bytes() == whole
    for progress in ("{", "[]", "{}", '{"shards": 0, "documents": 0, "tokens": {"train": 9, "val": 0}, "recipe": {}}'):
        shutil.rmtree(tmp_path / "data")
        (tmp_path / "data").mkdir()
        (tmp_path / "data/progress.json").write_text(progress)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert "progress.json: damaged" in done.stderr
