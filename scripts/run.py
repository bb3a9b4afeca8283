"""Run the runs of an experiment file: all of them, over seeds and horizons, or a sweep.

    python scripts/run.py configs/cpu/gpt2_30m.toml --seeds=3 --horizons=1,2
    python scripts/run.py configs/cpu/gpt2_30m.toml --sweep         # all combinations in the grids
    python scripts/run.py configs/cpu/gpt2_30m.toml --sweep=axes    # one key at a time
    python scripts/run.py configs/gpt2_125m.toml --seeds=3 --gpus=8 --print=slurm > jobs.sh

Finished runs are skipped and interrupted ones continued, so run the same command again after an
interruption. A run goes to out/EXPERIMENT/NAME, and its NAME says how it differs from the file:
adamw,seed=1338 or adamw,lr=0.001. Any --section.key=value is passed on to train.py.
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
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.runs import StoredRun, read_run
from runtime.arguments import parse_command_line
from runtime.checkpoint import check_same_config
from runtime.cli import Parser, UserError, number, run_main
from runtime.config import KEYS, Config, value_of
from runtime.experiment import as_text, load_experiment, read_grid, run_names
from runtime.run_folder import METRICS, ROOT

# How train.py exits after a signal. Then the user wants everything to stop.
STOPPED = {-signal.SIGINT, -signal.SIGTERM}
STOPPED |= {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

SLURM = """#!/usr/bin/env bash
# Each task of the array is one run. It saves on scancel and before its time limit, is requeued and
# continues. Submit it from the repository's root, with --partition, --account, --time and the like.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1{gpus}
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
runs=(
{runs}
)
eval "set -- ${{runs[$SLURM_ARRAY_TASK_ID]}}"
source scripts/slurm.sh
"""


@dataclass(frozen=True)
class Trial:
    """One call of train.py."""

    table: str  # the run's table in the file
    name: str  # the run's folder
    overrides: dict[str, str]  # dotted key → text
    config: Config


def main() -> None:
    arguments, overrides = parse_arguments()
    trials = make_trials(arguments, overrides)
    if arguments.print:
        print_commands(arguments, trials)
        return

    failed = run_all(arguments, trials)
    if arguments.sweep:
        print(sweep_report(arguments, trials))
        return  # a learning rate that fails is a result
    folder = trials[0].config.run_dir.parent
    print(f"compare them:  python scripts/compare.py {shlex.quote(str(folder))}")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(trials)} runs failed: {', '.join(failed)}; "
            f"see their messages above"
        )


def parse_arguments() -> tuple[argparse.Namespace, dict[str, str]]:
    """Return this script's arguments, and the overrides {dotted key: text} for train.py."""
    parser = Parser(__doc__)
    add = parser.add_argument
    whole = number(int, 1, 10_000)
    add("experiment", metavar="EXPERIMENT.toml", type=Path, help="an experiment file, see configs/")
    add("--runs", metavar="A,B", help="only these runs of the file (default: all)")
    add("--seeds", metavar="N", type=whole, default=1, help="seeds per run")
    add("--horizons", metavar="F,F", default="1", help="factors of max_steps to run with")
    add(
        "--sweep",
        nargs="?",
        const="product",
        choices=("product", "axes"),
        help="the runs' grids: every combination, or one key at a time",
    )
    add("--gpus", metavar="N", type=whole, default=1, help="ranks per run, with torchrun")
    add("--jobs", metavar="N", type=whole, default=1, help="runs at once, for small ones on a CPU")
    add("--print", choices=("torchrun", "slurm"), help="print the commands, do not run them")
    arguments, rest = parser.parse_known_args()

    overrides = {}
    for text in rest:
        key, equals, value = text.removeprefix("--").partition("=")
        if not text.startswith("--") or not equals:
            raise UserError(
                f"unknown argument {text}; see run.py --help, and write --section.key=value "
                f"for train.py"
            )
        overrides[key] = value
    if not overrides.keys() <= KEYS.keys():
        parse_command_line([str(arguments.experiment), *rest])  # names the nearest key, if any
        raise UserError(f"unknown argument {rest[0]}; see run.py --help")
    return arguments, overrides


# ---- What to run ---------------------------------------------------------------------------------


def make_trials(arguments: argparse.Namespace, overrides: dict[str, str]) -> list[Trial]:
    """Return all calls of train.py that were asked for, each of them once."""
    known = run_names(arguments.experiment)
    names = known if arguments.runs is None else arguments.runs.split(",")
    for name in names:
        if name not in known:
            raise UserError(
                f"{arguments.experiment}: no run named {name!r}; there are: {', '.join(known)}"
            )

    trials: dict[str, Trial] = {}
    factors = parse_factors(arguments.horizons)
    for name in names:
        base = load_experiment(arguments.experiment, name, overrides)
        points = grid_points(arguments, name, base) if arguments.sweep else [{}]
        for point, factor, seed in itertools.product(points, factors, range(arguments.seeds)):
            varied = dict(point)
            steps = round(base.train.max_steps * factor)
            if steps != base.train.max_steps:
                varied["train.max_steps"] = str(steps)
            if seed:
                varied["train.seed"] = str(base.train.seed + seed)

            changes = [f"{key.split('.')[1]}={value}" for key, value in varied.items()]
            run = ",".join([name, *changes])
            config = load_experiment(arguments.experiment, name, overrides | varied)
            config = config.model_copy(update={"run": run})
            trials.setdefault(run, Trial(name, run, overrides | varied, config))
    if not trials:
        raise UserError(
            f"{arguments.experiment}: none of its runs has a grid; add e.g. [runs.{names[0]}.grid]"
        )
    return list(trials.values())


def parse_factors(text: str) -> list[float]:
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        factors = []
    if not factors or not all(0 < factor < 1e6 for factor in factors):
        raise UserError(f"--horizons={text}: must be numbers greater than 0, such as 0.5,1,2")
    return factors


def grid_points(arguments: argparse.Namespace, name: str, base: Config) -> list[dict[str, str]]:
    """Return the points of a run's grid, each with a value for all keys of the grid."""
    grid = read_grid(arguments.experiment, name)
    if not grid:
        return []
    if arguments.sweep == "product":
        products = itertools.product(*grid.values())
        return [dict(zip(grid, values, strict=True)) for values in products]

    centre = {key: as_text(value_of(base.model_dump(), key)) for key in grid}
    points = [centre]
    for key, values in grid.items():
        points += [centre | {key: value} for value in values if value != centre[key]]
    return points


# ---- Running -------------------------------------------------------------------------------------


def train_arguments(arguments: argparse.Namespace, trial: Trial) -> list[str]:
    """Return the arguments of train.py for a trial."""
    own = [str(arguments.experiment), f"--run={trial.table}"]
    if trial.name != trial.table:
        own.append(f"--name={trial.name}")
    return [*own, *(f"--{key}={value}" for key, value in trial.overrides.items())]


def torchrun_options(arguments: argparse.Namespace) -> list[str]:
    return ["--standalone", f"--nproc_per_node={arguments.gpus}", "--"]


def print_commands(arguments: argparse.Namespace, trials: list[Trial]) -> None:
    """Print one command per trial, or an array job of them."""
    if arguments.print == "torchrun":
        for trial in trials:
            command = ["torchrun", *torchrun_options(arguments), "train.py"]
            print(shlex.join([*command, *train_arguments(arguments, trial), "--resume"]))
        return

    config = trials[0].config
    on_gpus = "" if config.train.device == "cpu" else f"\n#SBATCH --gpus-per-node={arguments.gpus}"
    runs = []
    for trial in trials:
        runs.append("  " + shlex.quote(shlex.join(train_arguments(arguments, trial))))
    text = SLURM.format(
        name=config.experiment, last=len(trials) - 1, gpus=on_gpus, runs="\n".join(runs)
    )
    print(text, end="")


def run_all(arguments: argparse.Namespace, trials: list[Trial]) -> list[str]:
    """Run what is not finished, `jobs` at once. Returns the names of the runs that failed."""
    waiting = [trial for trial in trials if not is_finished(trial)]
    print(f"{len(trials)} runs, {len(trials) - len(waiting)} of them finished already", flush=True)

    processes: list[subprocess.Popen] = []

    def stop(*_: object) -> NoReturn:
        """Pass SIGTERM on, which reaches only this process. The terminal sends Ctrl-C to all."""
        for process in processes:
            process.terminate()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    started, failed = time.monotonic(), []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(run_one, arguments, trial, processes) for trial in waiting]
        try:
            for done, (trial, future) in enumerate(zip(waiting, futures, strict=True), start=1):
                status = future.result()
                if status in STOPPED:
                    raise KeyboardInterrupt
                if status:
                    failed.append(trial.name)
                loss = final_loss(trial)
                outcome = "failed" if math.isinf(loss) else f"validation loss {loss:.4f}"
                minutes = (time.monotonic() - started) / 60
                progress = f"{done}/{len(waiting)}"
                print(f"{progress}  {trial.name}  {outcome}  {minutes:.1f} minutes", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)
            print("stopped; run the same command again to continue", file=sys.stderr)
            sys.exit(130)
    return failed


def run_one(arguments: argparse.Namespace, trial: Trial, processes: list[subprocess.Popen]) -> int:
    """Call train.py. With several jobs, show only validations and the last line of a failure."""
    launcher = [sys.executable]
    if arguments.gpus > 1:
        launcher += [str(ROOT / "scripts/torchrun.py"), *torchrun_options(arguments)]
    command = [*launcher, str(ROOT / "train.py"), *train_arguments(arguments, trial), "--resume"]
    # Threads that do not spin while they wait leave their core to other processes. It costs a tenth
    # on an idle machine, and a busy one is faster: see "Other load" in docs/performance.md.
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
    if arguments.jobs == 1:
        print(f"== {trial.name}", flush=True)
        processes.append(subprocess.Popen(command, env=environment))
        return processes[-1].wait()

    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    processes.append(process)
    assert process.stdout is not None
    last = "no message"
    for line in process.stdout:
        last = line.strip() or last
        if "validation loss" in line:
            print(f"{trial.name}: {last}", flush=True)
    status = process.wait()
    if status:
        print(f"{trial.name}: {last}", file=sys.stderr, flush=True)
    return status


# ---- Results -------------------------------------------------------------------------------------


def stored_run(trial: Trial) -> StoredRun | None:
    folder = trial.config.run_dir
    return read_run(folder) if (folder / METRICS).exists() else None


def is_finished(trial: Trial) -> bool:
    """Return whether the run has reached its last step.

    Raises:
        UserError: if its folder contains another run.
    """
    run = stored_run(trial)
    if run is None:
        return False
    check_same_config(trial.config, run.config)
    if trial.config.data.path != run.config["data"]["path"]:
        raise UserError(
            f"{trial.config.run_dir}: was trained on {run.config['data']['path']}, not on "
            f"{trial.config.data.path}; choose another --train.out_dir"
        )
    return run.is_finished


def final_loss(trial: Trial) -> float:
    """Return the last validation loss, or infinity if the run is not finished or diverged."""
    run = stored_run(trial)
    if run is None or not run.is_finished or run.is_diverged:
        return math.inf
    return run.final_loss


def sweep_report(arguments: argparse.Namespace, trials: list[Trial]) -> str:
    """Return the points of each run's grid with their mean losses over seeds.

    The best is marked with *, and a warning follows if it lies on an edge of its grid. Points that
    differ in more than the optimizer and the grid, such as their horizon, are ranked separately.
    """
    points: dict[str, list[Trial]] = {}  # name without the seed → one trial per seed
    for trial in trials:
        parts = [part for part in trial.name.split(",") if not part.startswith("seed=")]
        points.setdefault(",".join(parts), []).append(trial)
    losses = {name: statistics.fmean(map(final_loss, seeds)) for name, seeds in points.items()}

    rivals: dict[str, list[str]] = {}  # what has to be equal → names
    for name, (trial, *_) in points.items():
        tuned = read_grid(arguments.experiment, trial.table).keys()
        shared = [trial.table]
        for key in KEYS:
            if not key.startswith("optimizer.") and key not in tuned:
                shared.append(str(value_of(trial.config.model_dump(), key)))
        rivals.setdefault(str(shared), []).append(name)

    lines = []
    for names in rivals.values():
        best = min(names, key=lambda name: losses[name])
        for name in names:
            is_finite = math.isfinite(losses[name])
            loss = f"{losses[name]:.4f}" if is_finite else "failed"
            lines.append(f"{'*' if name == best and is_finite else ' '} {loss}  {name}")
        if math.isfinite(losses[best]):
            lines += edge_warnings(arguments, points[best][0])
    return "\n".join(lines)


def edge_warnings(arguments: argparse.Namespace, best: Trial) -> list[str]:
    """Return a warning for each numeric axis on whose end the best point lies."""
    lines = []
    for key, values in read_grid(arguments.experiment, best.table).items():
        value = value_of(best.config.model_dump(), key)
        try:
            numbers = sorted({float(text) for text in values})
        except ValueError:
            continue
        if len(numbers) > 1 and not numbers[0] < float(str(value)) < numbers[-1]:
            lines.append(
                f"warning: the best {best.table} has {key} = {value}, "
                f"the edge of its grid; widen it"
            )
    return lines


if __name__ == "__main__":
    run_main(main)
