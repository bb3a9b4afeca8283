"""Measure downstream accuracy of exported models with EleutherAI's lm-evaluation-harness.

    python scripts/evaluate.py hf/adamw hf/sophia-g --out results/downstream
    torchrun --standalone --nproc_per_node=8 -- scripts/evaluate.py hf/adamw hf/sophia-g
    python scripts/evaluate.py hf/adamw --tasks=mine --include-path=my_tasks --draws=1 --limit=100

Each DIR is what export_hf.py writes, or any causal model of transformers. The default tasks are
those of the paper's Figure 6 (BoolQ, CB, COPA and RTE of SuperGLUE, 2-shot, with 5 draws of the
examples), and HellaSwag and LAMBADA zero-shot. Prints accuracies, mean ± standard error over the
draws / over the questions, and writes evaluate.md, .json and .png. Under torchrun, models, tasks
and draws are divided among the ranks. Results are stored one by one in evaluate/, so an interrupted
call can be repeated. Needs requirements-hub.txt; the harness downloads its questions.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from analysis import plots
from analysis.report import format_table
from runtime.cli import Parser, UserError, number, reason, run_main
from runtime.distributed import Ranks
from runtime.files import write_text

FEW_SHOT = ("boolq", "cb", "copa", "sglue_rte")  # Figure 6 of the paper
ZERO_SHOT = ("hellaswag", "lambada_openai")
METRIC = {"hellaswag": "acc_norm"}  # as usually reported; acc for the others


@dataclass(frozen=True)
class Job:
    """One call of the harness."""

    model: str
    task: str
    shots: int
    draw: int
    limit: int | None
    inputs: str  # a digest of the sizes and times of the model's files and the task files


@dataclass(frozen=True)
class Result:
    """What the harness has measured."""

    job: Job
    accuracy: float
    stderr: float | None  # over the questions, as the harness estimates it
    shots: int  # as used: a task may have a number of its own
    metrics: dict[str, Any]  # everything that the harness reports


@dataclass(frozen=True)
class Accuracy:
    """A model's accuracy in a task, with its standard errors."""

    mean: float
    draws: float | None  # over the draws of the examples
    questions: float | None  # over the questions, the mean of the draws


def main() -> None:
    arguments = parse_arguments()
    ranks = Ranks.from_environment()
    jobs = make_jobs(arguments)
    done, problem = [], None
    try:
        for job in jobs[ranks.rank :: ranks.world_size]:
            done.append(evaluate(arguments, job))
    except UserError as error:
        problem = str(error)

    results, problems = gather(done, problem, ranks)
    if ranks.rank == 0:
        if problems:
            raise UserError(problems[0])
        results.sort(key=lambda result: jobs.index(result.job))
        report(results, output_folder(arguments))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    shots, few = number(int, 0, 100), number(int, 1, 100)
    add("models", metavar="DIR", nargs="+", type=Path, help="folders in Hugging Face's format")
    add("--tasks", metavar="A,B", help="tasks of the harness, instead of those above")
    add("--include-path", metavar="DIR", type=Path, help="folder with your own task files (YAML)")
    add("--shots", metavar="N", type=shots, default=2, help="examples shown before a question")
    add("--draws", metavar="N", type=few, default=5, help="draws of the examples")
    add("--limit", metavar="N", type=number(int, 1), help="use only the first N questions")
    add("--batch-size", metavar="N", type=number(int, 1), default=8, help="questions at once")
    add("--out", metavar="DIR", type=Path, help="folder to write to (default: the first DIR)")
    arguments = parser.parse_args()

    for folder in (arguments.out, arguments.include_path):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; name a folder")
    if arguments.include_path and not arguments.include_path.exists():
        raise UserError(f"--include-path={arguments.include_path}: no such folder")
    if arguments.tasks is not None and not all(arguments.tasks.split(",")):
        raise UserError(f"--tasks={arguments.tasks}: has an empty name; write --tasks=A,B")
    for folder in arguments.models:
        if not (folder / "config.json").exists():
            raise UserError(f"{folder}: not a model; make one with scripts/export_hf.py")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            "lm_eval is missing: python -m pip install -r requirements-hub.txt"
        ) from error
    return arguments


def output_folder(arguments: argparse.Namespace) -> Path:
    return arguments.out or arguments.models[0]


# ---- Jobs ----------------------------------------------------------------------------------------


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Return every model with every task and draw."""
    shots = dict.fromkeys(FEW_SHOT, arguments.shots) | dict.fromkeys(ZERO_SHOT, 0)
    if arguments.tasks:
        shots = dict.fromkeys(arguments.tasks.split(","), arguments.shots)

    task_files = list(arguments.include_path.rglob("*")) if arguments.include_path else []
    jobs = []
    for model in arguments.models:
        # This script's own output may lie in the model's folder.
        files = [path for path in model.glob("*") if not path.name.startswith("evaluate")]
        inputs = digest([*files, *task_files])
        for task, n in shots.items():
            draws = arguments.draws if n else 1  # without examples there is nothing to draw
            for draw in range(draws):
                jobs.append(Job(str(model), task, n, draw, arguments.limit, inputs))
    return jobs


def digest(paths: list[Path]) -> str:
    """Return a hash that changes with the files, without reading them: weights are gigabytes."""
    facts = []
    for path in sorted(paths):
        if path.is_file():
            facts.append((str(path), path.stat().st_size, path.stat().st_mtime_ns))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def evaluate(arguments: argparse.Namespace, job: Job) -> Result:
    """Return the job's result, stored by an earlier call with the same files or measured now."""
    name = hashlib.sha256(json.dumps(asdict(job)).encode()).hexdigest()[:16]
    path = output_folder(arguments) / "evaluate" / f"{name}.json"
    if path.exists():
        with suppress(ValueError, KeyError, TypeError):  # a damaged file is measured again
            saved = json.loads(path.read_text(encoding="utf-8"))
            result = Result(**saved | {"job": Job(**saved["job"])})
            accuracy = f"{result.accuracy:.4f} (from {path})"
            print(f"{job.model}  {job.task}  draw {job.draw}: {accuracy}", flush=True)
            return result

    result = call_harness(arguments, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(result), default=str))
    print(f"{job.model}  {job.task}  draw {job.draw}: {result.accuracy:.4f}", flush=True)
    return result


# ---- The harness ---------------------------------------------------------------------------------


def call_harness(arguments: argparse.Namespace, job: Job) -> Result:
    """Measure one job.

    Raises:
        UserError: if the harness cannot run it.
    """
    from lm_eval import simple_evaluate

    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    with single_process():
        model = load(job.model, device, arguments.batch_size)
        try:
            found = simple_evaluate(
                model,
                tasks=[job.task],
                num_fewshot=job.shots,
                limit=job.limit,
                fewshot_random_seed=job.draw,
                task_manager=task_manager(arguments.include_path),
                bootstrap_iters=10,  # accuracy's error has a formula; the others are not used
                log_samples=False,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{job.model}: out of memory in {job.task}; lower --batch-size"
            ) from error
        except Exception as error:  # a task's download, file or name: no error class of its own
            raise UserError(
                f"task {job.task}: the harness could not run it ({reason(error)})"
            ) from error

    if job.task not in found["results"]:
        raise UserError(
            f"task {job.task}: is a group; name its tasks: {','.join(found['results'])}"
        )
    metrics = found["results"][job.task]
    name = f"{METRIC.get(job.task, 'acc')},none"
    if name not in metrics:
        wanted, there = name.split(",")[0], ", ".join(metrics)
        raise UserError(f"task {job.task}: has no {wanted}, only {there}")
    stderr = metrics.get(name.replace(",", "_stderr,"))  # "N/A" for a single question
    shots = found["n-shot"][job.task]
    return Result(job, metrics[name], stderr if isinstance(stderr, float) else None, shots, metrics)


@functools.cache
def task_manager(folder: Path | None) -> Any:
    """Return the harness's index of tasks, for which it reads ten thousand files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder else None)


@functools.lru_cache(maxsize=1)
def load(model: str, device: str, batch_size: int) -> Any:
    """Return the harness's wrapper of a model; the last one stays loaded."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        return HFLM(model, device=device, batch_size=batch_size)
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{model}: cannot be loaded as a causal model ({reason(error)})") from error


@contextmanager
def single_process() -> Iterator[None]:
    """Hide torchrun's variables; otherwise the harness would divide each task's questions."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def gather(done: list[Result], problem: str | None, ranks: Ranks) -> tuple[list[Result], list[str]]:
    """Return all ranks' results and problems. Ranks with shorter tasks wait here."""
    parts: list[Any] = [(done, problem)]
    if ranks.world_size > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        parts = [None] * ranks.world_size
        dist.all_gather_object(parts, (done, problem))
        dist.destroy_process_group()

    results: list[Result] = []
    problems: list[str] = []
    for part, text in parts:
        results += part
        if text:
            problems.append(text)
    return results, problems


# ---- Report --------------------------------------------------------------------------------------


def report(results: list[Result], out: Path) -> None:
    """Print the table, and write it with a bar chart and all numbers."""
    cells: dict[str, dict[str, Accuracy]] = {}  # model → task → accuracy
    for (model, task), group in itertools.groupby(results, key=model_and_task):
        cells.setdefault(model, {})[task] = over_draws(list(group))
    rows = []
    for model, tasks in cells.items():
        rows.append({"run": model} | {task: as_text(value) for task, value in tasks.items()})
    table = f"{format_table(rows)}\n\n± standard error over the draws / over the questions"

    content = json.dumps([asdict(result) for result in results], indent=1, default=str)
    write_text(out / "evaluate.md", table + "\n")
    write_text(out / "evaluate.json", content + "\n")
    draw_bars(cells, out / "evaluate.png")
    print(table)
    print(f"wrote evaluate.md, .json and .png to {out}")


def model_and_task(result: Result) -> tuple[str, str]:
    return result.job.model, result.job.task


def over_draws(results: list[Result]) -> Accuracy:
    """Return the mean over a task's draws; an error is None if it cannot be estimated."""
    values = [result.accuracy for result in results]
    errors = [result.stderr for result in results if result.stderr is not None]
    draws = None
    if len(values) > 1 and results[0].shots > 0:
        draws = statistics.stdev(values) / math.sqrt(len(values))
    return Accuracy(statistics.fmean(values), draws, statistics.fmean(errors) if errors else None)


def as_text(value: Accuracy) -> str:
    draws = "–" if value.draws is None else f"{value.draws:.4f}"
    questions = "–" if value.questions is None else f"{value.questions:.4f}"
    return f"{value.mean:.4f} ± {draws} / {questions}"


def draw_bars(cells: dict[str, dict[str, Accuracy]], path: Path) -> None:
    plt = plots.pyplot()
    tasks = list(next(iter(cells.values())))
    figure, panel = plt.subplots(figsize=(2 + 1.4 * len(tasks), 4), layout="constrained")
    width = 0.8 / len(cells)
    for index, (model, values) in enumerate(cells.items()):
        offset = (index - (len(cells) - 1) / 2) * width
        positions = [position + offset for position in range(len(tasks))]
        heights = [value.mean for value in values.values()]
        errors = [max(value.draws or 0, value.questions or 0) for value in values.values()]
        panel.bar(positions, heights, width, yerr=errors, capsize=3, label=model)
    panel.set_xticks(range(len(tasks)), tasks)
    panel.set_ylabel("accuracy ± the larger standard error")
    panel.legend(frameon=False)
    plots.save(figure, [path])


if __name__ == "__main__":
    run_main(main)
