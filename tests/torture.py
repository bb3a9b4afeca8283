"""Kill training at random, again and again, and check that nothing is lost: the promise of a resume, under real faults.

    python tests/torture.py                         # 50 kills of each optimizer on one process
    python tests/torture.py --ranks 2 --kills 10    # one of torchrun's two ranks is killed
    python tests/torture.py --prepare 'DIR/*.txt'   # prepare.py killed 20 times on .parquet, .jsonl or .txt files

Each life of a run is the same command with --resume, and ends in a SIGKILL: after a random time, or at a random one of
the places below (inside a checkpoint's bytes, in a validation, in the middle of a metrics line, …). In the end every
step must be in metrics.jsonl once, in order, with the loss of a run that was never killed, bit for bit; no checkpoint
file may ever be torn. The exit status is 0 if so.
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

import step
import train
from runtime import checkpoint, files, metrics
from runtime.cli import Parser, UserError, number, run_main

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
    parser.add_argument("--kills", type=number(int, 1), default=50, metavar="N", help="kills of each optimizer")
    parser.add_argument("--ranks", type=number(int, 1, 2), default=1, metavar="N", help="1, or 2 under torchrun")
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS, metavar="NAME", help="(default: all four)"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="seed of the kills")
    parser.add_argument("--prepare", metavar="FILES", help="kill prepare.py on these files instead")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        place, nth, rank, *train_arguments = arguments.child
        live(train_arguments, place if os.environ.get("RANK", "0") == rank else "nowhere", int(nth))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.prepare:
            if not glob.glob(arguments.prepare, recursive=True):
                raise UserError(f"--prepare {arguments.prepare!r}: no file matches (quote the pattern for the shell)")
            torture_prepare(arguments.prepare, Path(folder), random.Random(arguments.seed))
            return
        experiment = make_experiment(Path(folder))
        for optimizer in arguments.optimizers:
            rng = random.Random(arguments.seed)
            print(torture(experiment, optimizer, arguments.kills, arguments.ranks, rng), flush=True)


def make_experiment(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 20_000), ("val", 300)):
        rng.integers(61, size=count).astype("<u2").tofile(folder / f"{split}.bin")
    path = folder / "torture.toml"
    path.write_text(EXPERIMENT.format(root=ROOT, steps=STEPS, folder=folder))
    return path


def torture(experiment: Path, optimizer: str, kills: int, ranks: int, rng: random.Random) -> str:
    """Kill the run `kills` times, starting it anew after each, then let it end. Returns a summary; raises UserError."""
    whole, killed = (experiment.parent / name / "torture" / optimizer for name in ("whole", "killed"))
    command = [str(experiment), f"--run={optimizer}", "--resume", f"--train.micro_batch_size={2 // ranks}"]
    to_whole, to_killed = ([*command, f"--train.out_dir={folder.parents[1]}"] for folder in (whole, killed))
    start_life(to_whole, "nowhere", 1, 0, ranks)()
    deaths: Counter[str] = Counter()
    while sum(deaths.values()) < kills:
        place = rng.choice([*PLACES, "any time"])
        nth = rng.randint(1, 12 if place == "in a step" else 4)
        life = start_life(to_killed, place, nth, rng.randrange(ranks), ranks)
        if life(rng.uniform(0.02, 0.25) if place == "any time" and ranks == 1 else None):
            deaths[place] += 1
        else:  # it came to its end before the kill: from the beginning again, or all later kills would hit nothing
            check_same(whole, killed)
            shutil.rmtree(killed)
        for path in checkpoint.checkpoints(killed):
            checkpoint.load(path)  # raises UserError for a torn one
    start_life(to_killed, "nowhere", 1, 0, ranks)()
    check_same(whole, killed)
    places = ", ".join(f"{count} {place}" for place, count in deaths.most_common())
    return f"{optimizer} on {ranks} rank(s): {kills} kills ({places}); checkpoints torn: 0, steps lost or doubled: 0"


def start_life(arguments: list[str], place: str, nth: int, rank: int, ranks: int) -> Callable[..., bool]:
    """Begin one life. The function returned waits for its end, or kills it after so many seconds; was it killed?"""
    if ranks == 2:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
        command += [__file__, "--child", place, str(nth), str(rank), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return lambda _=None: process.wait() != 0
    child = os.fork()  # this process has imported everything, and computed nothing: a life costs milliseconds
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        live(arguments, place, nth)
        os._exit(0)

    def end(after_s: float | None = None) -> bool:
        if after_s is not None:
            time.sleep(after_s)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
            raise UserError(f"a life ended with exit status {os.WEXITSTATUS(status)} instead of a kill; see above")
        return os.WIFSIGNALED(status)

    return end


def live(arguments: list[str], place: str, nth: int) -> None:
    """train.py with these arguments, killed at the `nth` time that it comes to `place`."""
    sys.argv = ["train.py", *arguments]
    if place in PLACES:
        PLACES[place](nth)
    run_main(train.main)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(module: Any, name: str, action: Callable[..., None] = lambda *_: die()) -> Callable[[int], None]:
    """Arrange that `action` comes before the nth call of module.name, with the call's arguments."""

    def arrange(nth: int) -> None:
        original, calls = getattr(module, name), Counter[str]()

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls["made"] += 1
            if calls["made"] == nth:
                action(*args)
            return original(*args, **kwargs)

        setattr(module, name, counted)

    return arrange


def write_half_a_checkpoint(state: Any, file: Any) -> None:
    whole = io.BytesIO()
    torch.serialization.save(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    die()


def write_half_a_line(log: metrics.RunLog, records: list[dict[str, Any]]) -> None:
    text = "".join(map(metrics.to_line, records))
    log.file.write(text[: len(text) * 2 // 3])
    log.file.flush()
    die()


PLACES: dict[str, Callable[[int], None]] = {
    "in a step": before(step, "accumulate_gradient"),
    "in a validation": before(train, "validation_windows"),
    "in a checkpoint's bytes": before(checkpoint.torch, "save", write_half_a_checkpoint),
    "before a file gets its name": before(files.os, "replace"),
    "between a checkpoint and the removal of older ones": before(checkpoint, "checkpoints"),
    "in a metrics line": before(metrics.RunLog, "steps", write_half_a_line),
}


def check_same(whole: Path, killed: Path) -> None:
    """Raise UserError unless both runs' numbers and last weights are the same, each step once and in order."""
    one, other = (metrics.read_metrics(folder / "metrics.jsonl") for folder in (whole, killed))
    for key in ("loss", "val_loss", "grad_norm", "lr"):
        expected, found = ([(r["step"], r[key]) for r in lines if key in r] for lines in (one, other))
        if expected != found:
            raise UserError(f"{killed}: {key} differs from the run that was not killed: {set(expected) ^ set(found)}")
    if [r["step"] for r in other if "loss" in r] != list(range(1, STEPS + 1)):
        raise UserError(f"{killed}: metrics.jsonl does not have each step once, in order")
    expected, found = (checkpoint.load(checkpoint.path_of(folder, STEPS))["model"] for folder in (whole, killed))
    if not all(torch.equal(weight, found[name]) for name, weight in expected.items()):
        raise UserError(f"{killed}: the last weights differ from those of the run that was not killed")


def torture_prepare(pattern: str, folder: Path, rng: random.Random, kills: int = 20) -> None:
    """Kill prepare.py `kills` times after random times; whenever it comes to its end, compare with one clean pass."""
    command = [sys.executable, str(ROOT / "data/openwebtext/prepare.py"), "--files", pattern, "--out"]
    clean, killed = folder / "clean", folder / "killed"
    started = time.monotonic()
    subprocess.run([*command, str(clean)], check=True, capture_output=True)
    clean_s = time.monotonic() - started
    done, ends = 0, 0
    while True:
        process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.2, 0.8) * clean_s if done < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            done += 1
        if process.wait() == 0:
            if (killed / "meta.json").read_text() != (clean / "meta.json").read_text():
                raise UserError(f"{killed}: ended with other content than one clean pass")
            ends += 1
            if done == kills:
                break
            shutil.rmtree(killed)
    sha256 = json.loads((clean / "meta.json").read_text())["splits"]["train"]["sha256"]
    print(f"prepare.py: {kills} kills, came to its end {ends} times, each time with sha256 {sha256} as one clean pass")


if __name__ == "__main__":
    run_main(main)
