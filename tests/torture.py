"""Kill training at random, again and again, and check that nothing is lost.

    python tests/torture.py                         # 50 kills of each optimizer on one process
    python tests/torture.py --ranks 2 --kills 10    # one of torchrun's two ranks is killed
    python tests/torture.py --prepare 'DIR/*.txt'   # 20 kills of prepare.py on these files

--prepare takes .parquet, .jsonl or .txt files.

Every attempt is the same command with --resume, and ends in a SIGKILL: after a random time, or at a
random one of the points below (in a step, in a validation, while a checkpoint or a metrics line is
being written, …). At the end, metrics.jsonl must contain every step once, in order, with the loss
of a run that was never killed, bit for bit, and no checkpoint may ever be torn; otherwise the exit
status is not 0.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import train
from data import batches
from runtime import checkpoint, files
from runtime.cli import Parser, UserError, number, run_main
from runtime.metrics import RunLog
from runtime.run_folder import METRICS, read_metrics, to_line

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = ("adamw", "lion", "sophia-g", "sophia-h")
STEPS = 120
EXPERIMENT = """
base = "{root}/tests/tiny.toml"
[data]
path = "{folder}"
[train]
batch_size = 4
max_steps = {steps}
warmup_steps = 5
log_interval = 3
out_dir = "{folder}/out"
[runs.adamw]
[runs.lion]
[runs.sophia-g]
[runs.sophia-h]
"""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--kills", type=number(int, 1), default=50, metavar="N", help="kills of each optimizer"
    )
    parser.add_argument(
        "--ranks", type=number(int, 1, 2), default=1, metavar="N", help="1, or 2 under torchrun"
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=OPTIMIZERS,
        default=OPTIMIZERS,
        metavar="NAME",
        help="(default: all four)",
    )
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, metavar="N", help="seed of the kills"
    )
    parser.add_argument("--prepare", metavar="FILES", help="kill prepare.py on these files instead")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    # One attempt under torchrun: only the chosen rank is killed.
    if arguments.child is not None:
        point, nth, rank, *train_arguments = arguments.child
        if os.environ.get("RANK", "0") != rank:
            point = "nowhere"
        run_until_killed(train_arguments, point, int(nth))
        return

    with tempfile.TemporaryDirectory() as folder:
        if arguments.prepare:
            if not glob.glob(arguments.prepare, recursive=True):
                raise UserError(
                    f"--prepare {arguments.prepare!r}: no file matches "
                    f"(quote the pattern for the shell)"
                )
            torture_prepare(arguments.prepare, Path(folder), random.Random(arguments.seed))
            return

        experiment = make_experiment(Path(folder))
        for optimizer in arguments.optimizers:
            rng = random.Random(arguments.seed)
            print(torture(experiment, optimizer, arguments.kills, arguments.ranks, rng), flush=True)


def make_experiment(folder: Path) -> Path:
    """Write random tokens and an experiment that trains on them, and return its path."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20_000), ("val", 300)):
        rng.integers(61, size=count).astype("<u2").tofile(folder / f"{split}.bin")
    path = folder / "torture.toml"
    path.write_text(EXPERIMENT.format(root=ROOT, steps=STEPS, folder=folder))
    return path


def torture(experiment: Path, optimizer: str, kills: int, ranks: int, rng: random.Random) -> str:
    """Kill the run `kills` times, resuming it each time, then let it finish. Return a summary.

    Raises UserError if the result is not that of a run that was never killed.
    """
    whole = experiment.parent / "whole/torture" / optimizer
    killed = experiment.parent / "killed/torture" / optimizer
    command = [str(experiment), f"--run={optimizer}", "--resume"]
    command.append(f"--train.micro_batch_size={2 // ranks}")
    whole_command = [*command, f"--train.out_dir={whole.parents[1]}"]
    killed_command = [*command, f"--train.out_dir={killed.parents[1]}"]

    # The reference, never killed.
    start_attempt(whole_command, "nowhere", 1, 0, ranks)()

    kill_counts: Counter[str] = Counter()
    while sum(kill_counts.values()) < kills:
        point = rng.choice([*KILL_POINTS, "any time"])
        nth = rng.randint(1, 12 if point == "in a step" else 4)
        end = start_attempt(killed_command, point, nth, rng.randrange(ranks), ranks)
        after_s = rng.uniform(0.02, 0.25) if point == "any time" and ranks == 1 else None
        if end(after_s):
            kill_counts[point] += 1
        else:
            # Finished before the kill: start over, as there would be nothing left to kill.
            check_same(whole, killed)
            shutil.rmtree(killed)

        # Raises UserError for a torn checkpoint.
        for path in checkpoint.checkpoints(killed):
            checkpoint.load(path)

    start_attempt(killed_command, "nowhere", 1, 0, ranks)()
    check_same(whole, killed)

    points = ", ".join(f"{count} {point}" for point, count in kill_counts.most_common())
    return (
        f"{optimizer} on {ranks} rank(s): {kills} kills ({points}); "
        f"checkpoints torn: 0, steps lost or doubled: 0"
    )


def start_attempt(
    arguments: list[str], point: str, nth: int, rank: int, ranks: int
) -> Callable[..., bool]:
    """Start train.py, to be killed the nth time that `rank` reaches `point`.

    Returns a function that waits for its end, or on one process kills it after so many seconds, and
    returns whether it was killed.
    """
    if ranks == 2:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node=2", "--", __file__]
        command += ["--child", point, str(nth), str(rank), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return lambda _=None: process.wait() != 0

    # A fork takes milliseconds: this process has imported everything, and computed nothing.
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        run_until_killed(arguments, point, nth)
        os._exit(0)

    def end(after_s: float | None = None) -> bool:
        if after_s is not None:
            time.sleep(after_s)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
            raise UserError(
                f"an attempt ended with exit status {os.WEXITSTATUS(status)} "
                f"instead of a kill; see above"
            )
        return os.WIFSIGNALED(status)

    return end


def run_until_killed(arguments: list[str], point: str, nth: int) -> None:
    """Run train.py with these arguments, and kill it the nth time that it reaches `point`."""
    sys.argv = ["train.py", *arguments]
    if point in KILL_POINTS:
        KILL_POINTS[point](nth)
    run_main(train.main)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(
    module: Any, name: str, action: Callable[..., None] = lambda *_: kill_self()
) -> Callable[[int], None]:
    """Return a function that arranges for `action` to run before the nth call of module.name.

    The action gets the arguments of the call.
    """

    def arrange(nth: int) -> None:
        original = getattr(module, name)
        calls = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                action(*args)
            return original(*args, **kwargs)

        setattr(module, name, counted)

    return arrange


def write_half_a_checkpoint(state: Any, file: Any) -> None:
    buffer = io.BytesIO()
    torch.serialization.save(state, buffer)
    content = buffer.getvalue()
    file.write(content[: len(content) // 2])
    file.flush()
    kill_self()


def write_half_a_line(log: RunLog, records: list[dict[str, Any]]) -> None:
    text = "".join(map(to_line, records))
    log.file.write(text[: len(text) * 2 // 3])
    log.file.flush()
    kill_self()


KILL_POINTS: dict[str, Callable[[int], None]] = {
    "in a step": before(train, "get_batch"),
    "in a validation": before(batches, "validation_windows"),
    "in a checkpoint's bytes": before(checkpoint.torch, "save", write_half_a_checkpoint),
    "before a file gets its name": before(files.os, "replace"),
    "between a checkpoint and the removal of older ones": before(checkpoint, "checkpoints"),
    "in a metrics line": before(RunLog, "steps", write_half_a_line),
}


def check_same(whole: Path, killed: Path) -> None:
    """Raise UserError unless the killed run has the metrics and the last weights of the whole one.

    Every step must be there once, in order.
    """
    whole_records, killed_records = read_metrics(whole / METRICS), read_metrics(killed / METRICS)
    for key in ("loss", "val_loss", "grad_norm", "lr"):
        expected = [(record["step"], record[key]) for record in whole_records if key in record]
        found = [(record["step"], record[key]) for record in killed_records if key in record]
        if expected != found:
            difference = set(expected) ^ set(found)
            raise UserError(
                f"{killed}: {key} differs from the run that was not killed: {difference}"
            )
    steps = [record["step"] for record in killed_records if "loss" in record]
    if steps != list(range(1, STEPS + 1)):
        raise UserError(f"{killed}: metrics.jsonl does not have each step once, in order")

    whole_weights = checkpoint.load(checkpoint.path_of(whole, STEPS))["model"]
    killed_weights = checkpoint.load(checkpoint.path_of(killed, STEPS))["model"]
    for name, weight in whole_weights.items():
        if not torch.equal(weight, killed_weights[name]):
            raise UserError(
                f"{killed}: the last weights differ from those of the run that was not killed"
            )


def torture_prepare(pattern: str, folder: Path, rng: random.Random, kills: int = 20) -> None:
    """Kill prepare.py `kills` times, and compare with one clean pass every time that it finishes.

    Raises UserError if the content differs.
    """
    script = str(ROOT / "data/openwebtext/prepare.py")
    command = [sys.executable, script, "--files", pattern, "--out"]
    clean, killed = folder / "clean", folder / "killed"
    devnull = subprocess.DEVNULL

    started = time.monotonic()
    subprocess.run([*command, str(clean)], check=True, capture_output=True)
    clean_s = time.monotonic() - started

    n_killed, n_finished = 0, 0
    while True:
        process = subprocess.Popen([*command, str(killed)], stdout=devnull, stderr=devnull)
        try:
            process.wait(rng.uniform(0.2, 0.8) * clean_s if n_killed < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            n_killed += 1
        if process.wait() == 0:
            if (killed / "meta.json").read_text() != (clean / "meta.json").read_text():
                raise UserError(f"{killed}: ended with other content than one clean pass")
            n_finished += 1
            if n_killed == kills:
                break
            shutil.rmtree(killed)

    sha256 = json.loads((clean / "meta.json").read_text())["splits"]["train"]["sha256"]
    print(
        f"prepare.py: {kills} kills, came to its end {n_finished} times, "
        f"each time with sha256 {sha256} as one clean pass"
    )


if __name__ == "__main__":
    run_main(main)
