"""Run the runs of an experiment file, one after the other: all of them, over seeds and horizons, or a sweep.

    python scripts/run.py configs/gpt2_30m.toml --scale=cpu --seeds=3 --horizons=1,2
    python scripts/run.py configs/gpt2_30m.toml --scale=cpu --sweep         # every combination in the grids
    python scripts/run.py configs/gpt2_30m.toml --scale=cpu --sweep=axes    # one key at a time
    python scripts/run.py configs/gpt2_125m.toml --seeds=3 --gpus=8 --print=slurm > jobs.sh

What is finished is skipped, what was broken off is continued, so the same command goes on where it was stopped. A run
goes to out/EXPERIMENT[-SCALE]/NAME; its NAME says what differs from the file: adamw,seed=1338 or adamw,lr=0.001.
Every further --section.key=value goes to train.py.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.runs import read_run
from runtime.checkpoint import refuse_other_run
from runtime.cli import Parser, UserError, number, run_main
from runtime.config import KEYS, Config, value_of
from runtime.experiment import PAPER, load_experiment, parse_command_line, read_grid, run_names

ROOT = Path(__file__).resolve().parents[1]
# How train.py ends after a signal to stop, by itself or at once: then the user wants all of it to stop.
STOPPED = {128 + s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)} | {-signal.SIGINT, -signal.SIGTERM}
SLURM = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --requeue
# One task of the array is one run; requeued, it goes on. Add --partition, --account and --time as your cluster asks.
runs=(
{runs}
)
eval "${{runs[$SLURM_ARRAY_TASK_ID]}}"
"""


@dataclass(frozen=True)
class Trial:
    """One call of train.py."""

    table: str  # the run of the file
    name: str  # of its folder
    overrides: dict[str, str]  # dotted key → text
    config: Config


def main() -> None:
    arguments, extra = parse_arguments()
    trials = make_trials(arguments, extra)
    if arguments.print:
        print_commands(arguments, trials)
        return
    failed = run_all(arguments, trials)
    if arguments.sweep:
        print(sweep_report(arguments, trials))
        failed = []  # a learning rate that fails is a result
    else:
        print(f"compare them:  python scripts/compare.py {shlex.quote(str(trials[0].config.run_dir.parent))}")
    if failed:
        raise UserError(f"{len(failed)} of {len(trials)} runs failed: {', '.join(failed)}; see their messages above")


def parse_arguments() -> tuple[argparse.Namespace, dict[str, str]]:
    parser = Parser(__doc__)
    whole = number(int, 1, 10_000)
    parser.add_argument("experiment", metavar="EXPERIMENT.toml", type=Path, help="a file of configs/")
    parser.add_argument("--scale", metavar="NAME", default=PAPER, help="cpu, gpu or paper (default)")
    parser.add_argument("--runs", metavar="A,B", help="these runs of the file alone (default: all)")
    parser.add_argument("--seeds", metavar="N", type=whole, default=1, help="each run with N seeds")
    parser.add_argument("--horizons", metavar="F,F", default="1", help="each run with max_steps times F")
    parser.add_argument(
        "--sweep",
        nargs="?",
        const="product",
        choices=("product", "axes"),
        help="the runs' grids: every combination, or one key at a time",
    )
    parser.add_argument("--gpus", metavar="N", type=whole, default=1, help="ranks a run, by torchrun")
    parser.add_argument("--jobs", metavar="N", type=whole, default=1, help="runs at once, for small ones on a CPU")
    parser.add_argument("--print", choices=("torchrun", "slurm"), help="print the commands instead of running them")
    arguments, rest = parser.parse_known_args()
    if wrong := [text for text in rest if not text.startswith("--") or "=" not in text]:
        raise UserError(f"unknown argument {wrong[0]}; see run.py --help, and write --section.key=value for train.py")
    extra = {key: value for text in rest for key, _, value in [text.removeprefix("--").partition("=")]}
    if not extra.keys() <= KEYS.keys():
        parse_command_line([str(arguments.experiment), *rest])  # names the nearest key, where there is one
        raise UserError(f"unknown argument {rest[0]}; see run.py --help")
    return arguments, extra


def make_trials(arguments: argparse.Namespace, extra: dict[str, str]) -> list[Trial]:
    """All calls of train.py that were asked for, without those that would repeat another."""
    known = run_names(arguments.experiment, arguments.scale)
    names = known if arguments.runs is None else arguments.runs.split(",")
    if wrong := [name for name in names if name not in known]:
        raise UserError(f"{arguments.experiment}: no run named {wrong[0]!r}; there are: {', '.join(known)}")
    trials: dict[str, Trial] = {}
    for name in names:
        base = load_experiment(arguments.experiment, name, extra, arguments.scale)
        points = grid_points(arguments, name, base) if arguments.sweep else [{}]
        for point, factor, seed in itertools.product(points, factors(arguments.horizons), range(arguments.seeds)):
            varied = dict(point)
            if (steps := round(base.train.max_steps * factor)) != base.train.max_steps:
                varied["train.max_steps"] = str(steps)
            if seed:
                varied["train.seed"] = str(base.train.seed + seed)
            variation = ",".join([name, *(f"{key.split('.')[1]}={value}" for key, value in varied.items())])
            config = load_experiment(arguments.experiment, name, extra | varied, arguments.scale)
            config = config.model_copy(update={"run": variation})
            trials.setdefault(variation, Trial(name, variation, extra | varied, config))
    if not trials:
        raise UserError(f"{arguments.experiment}: no run of it has a grid; add e.g. [runs.{names[0]}.grid]")
    return list(trials.values())


def factors(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < 1e6 for value in values):
        raise UserError(f"--horizons={text}: must be numbers greater than 0, such as 0.5,1,2")
    return values


def grid_points(arguments: argparse.Namespace, name: str, base: Config) -> list[dict[str, str]]:
    """The points of a run's grid, each with a value for all of the grid's keys."""
    grid = read_grid(arguments.experiment, name, arguments.scale)
    if not grid:
        return []
    if arguments.sweep == "product":
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    centre = {key: as_text(value_of(base.model_dump(), key)) for key in grid}
    return [centre] + [centre | {key: v} for key, values in grid.items() for v in values if v != centre[key]]


def as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def command(arguments: argparse.Namespace, trial: Trial) -> list[str]:
    """The call of train.py, by torchrun where several ranks are asked for."""
    call = ["train.py", str(arguments.experiment), f"--run={trial.table}"]
    call += [f"--scale={arguments.scale}"] if arguments.scale != PAPER else []
    call += [f"--name={trial.name}"] if trial.name != trial.table else []
    call += ["--resume", *(f"--{key}={value}" for key, value in trial.overrides.items())]
    if arguments.gpus == 1 and arguments.print != "torchrun":
        return ["python", *call]
    return ["torchrun", "--standalone", f"--nproc_per_node={arguments.gpus}", "--", *call]


def print_commands(arguments: argparse.Namespace, trials: list[Trial]) -> None:
    lines = [shlex.join(command(arguments, trial)) for trial in trials]
    if arguments.print == "torchrun":
        print("\n".join(lines))
        return
    name = trials[0].config.experiment
    runs = "\n".join(f"  {shlex.quote(line)}" for line in lines)
    print(SLURM.format(name=name, last=len(lines) - 1, gpus=arguments.gpus, runs=runs), end="")


def run_all(arguments: argparse.Namespace, trials: list[Trial]) -> list[str]:
    """Run what is not finished, `jobs` at once. Returns the names of the runs that failed."""
    waiting = [trial for trial in trials if not is_finished(trial)]
    print(f"{len(trials)} runs, {len(trials) - len(waiting)} of them finished already", flush=True)
    started, failed = time.monotonic(), []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = [(trial, pool.submit(run_one, arguments, trial)) for trial in waiting]
        try:
            for done, (trial, result) in enumerate(results, start=1):
                status = result.result()
                if status in STOPPED:
                    raise KeyboardInterrupt
                failed += [trial.name] if status else []
                minutes = (time.monotonic() - started) / 60
                print(f"{done}/{len(waiting)}  {trial.name}  {outcome(trial)}  {minutes:.1f} minutes", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)
    return failed


def run_one(arguments: argparse.Namespace, trial: Trial) -> int:
    """One call of train.py: its output is shown where it is the only one, else only if it fails."""
    call = command(arguments, trial)
    call[:1] = [sys.executable] if call[0] == "python" else [sys.executable, "-m", "torch.distributed.run"]
    call[call.index("train.py")] = str(ROOT / "train.py")
    if arguments.jobs == 1:
        print(f"== {trial.name}", flush=True)
        return subprocess.run(call).returncode
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // arguments.jobs))}
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        print(f"{trial.name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr, flush=True)
    return done.returncode


def is_finished(trial: Trial) -> bool:
    """Whether the run is there, to its last step. Raises UserError where its folder holds another run."""
    folder = trial.config.run_dir
    run = read_run(folder) if (folder / "metrics.jsonl").exists() else None
    if run is None:
        return False
    refuse_other_run(trial.config, run.config)
    if trial.config.data.path != run.config["data"]["path"]:
        raise UserError(
            f"{folder}: was trained on {run.config['data']['path']}, not on {trial.config.data.path}; "
            f"choose another --train.out_dir"
        )
    return run.is_finished


def outcome(trial: Trial) -> str:
    loss = final_loss(trial)
    return "failed" if loss == math.inf else f"validation loss {loss:.4f}"


def final_loss(trial: Trial) -> float:
    """Infinite of a run that did not come to its end, or that ended with no number."""
    folder = trial.config.run_dir
    run = read_run(folder) if (folder / "metrics.jsonl").exists() else None
    return run.final_loss if run and run.is_finished and math.isfinite(run.final_loss) else math.inf


def sweep_report(arguments: argparse.Namespace, trials: list[Trial]) -> str:
    """The points of each run's grid, means over seeds, the best marked with *; a warning where that lies on an edge.

    Points that differ in more than the optimizer (another horizon, say) are ranked among themselves.
    """
    points: dict[str, list[Trial]] = {}  # name without the seed → a trial a seed
    for trial in trials:
        name = ",".join(part for part in trial.name.split(",") if not part.startswith("seed="))
        points.setdefault(name, []).append(trial)
    losses = {name: statistics.fmean(map(final_loss, seeds)) for name, seeds in points.items()}
    rivals: dict[str, list[str]] = {}
    for name, (trial, *_) in points.items():
        tuned = read_grid(arguments.experiment, trial.table, arguments.scale).keys()
        tree = trial.config.model_dump()
        shared = [value_of(tree, key) for key in KEYS if not key.startswith("optimizer.") and key not in tuned]
        rivals.setdefault(f"{trial.table} {shared}", []).append(name)
    lines = []
    for names in rivals.values():
        best = min(names, key=lambda name: losses[name])
        finite = losses[best] < math.inf
        for name in names:
            lines.append(
                f"{'*' if finite and name == best else ' '} {losses[name]:.4f}  {name}".replace(" inf ", " failed ")
            )
        lines += edge_warnings(arguments, points[best][0]) if finite else []
    return "\n".join(lines)


def edge_warnings(arguments: argparse.Namespace, best: Trial) -> list[str]:
    """An optimum at the end of a numeric axis may lie beyond it."""
    lines = []
    for key, values in read_grid(arguments.experiment, best.table, arguments.scale).items():
        value = value_of(best.config.model_dump(), key)
        try:
            numbers = sorted({float(v) for v in values})
        except ValueError:
            continue
        if len(numbers) > 1 and not numbers[0] < float(str(value)) < numbers[-1]:
            lines.append(f"warning: the best {best.table} has {key} = {value}, the edge of its grid; widen it")
    return lines


if __name__ == "__main__":
    run_main(main)
