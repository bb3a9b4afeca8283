"""Downstream accuracy of exported models, by EleutherAI's lm-evaluation-harness: the paper's Figure 6 and more.

    python scripts/evaluate.py hf/adamw hf/sophia-g --out results/downstream
    torchrun --standalone --nproc_per_node=8 -- scripts/evaluate.py hf/adamw hf/sophia-g
    python scripts/evaluate.py hf/adamw --tasks=mine --include-path=my_tasks --draws=1 --limit=100

Each DIR is what export_hf.py writes, or any causal model of transformers. Without --tasks: BoolQ, CB, COPA and RTE of
SuperGLUE, 2-shot, with 5 draws of the examples shown, and HellaSwag and LAMBADA with none shown. Prints accuracies,
mean ± standard error over the draws (of one draw: the harness's own over the questions), and writes evaluate.md, .json
and .png. Under torchrun the ranks share out models, tasks and draws. Needs requirements-hub.txt; the harness downloads
its questions.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from errors import UserError, number, reason, run_main
from files import whole_file
from scripts import pictures
from scripts.compare import format_table

FEW_SHOT = ("boolq", "cb", "copa", "sglue_rte")  # Figure 6 of the paper
ZERO_SHOT = ("hellaswag", "lambada_openai")
METRIC = {"hellaswag": "acc_norm"}  # as it is usually given; of the others acc


@dataclass(frozen=True)
class Job:
    """One call of the harness."""

    model: str
    task: str
    shots: int
    draw: int


@dataclass(frozen=True)
class Result:
    job: Job
    accuracy: float
    stderr: float  # over the questions, as the harness estimates it
    metrics: dict[str, Any]  # all that it says


def main() -> None:
    arguments = parse_arguments()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    jobs = make_jobs(arguments)
    results = gather([evaluate(arguments, job) for job in jobs[rank::world_size]], world_size)
    if rank == 0:
        report(sorted(results, key=lambda result: jobs.index(result.job)), arguments.out or arguments.models[0])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="DIR", nargs="+", type=Path, help="folders in Hugging Face's format")
    parser.add_argument("--tasks", metavar="A,B", help="tasks of the harness, in place of those above")
    parser.add_argument("--include-path", metavar="DIR", help="folder with task files (YAML) of your own")
    parser.add_argument("--shots", metavar="N", type=number(int, 0, 100), default=2, help="examples (default: 2)")
    parser.add_argument(
        "--draws", metavar="N", type=number(int, 1, 100), default=5, help="of the examples (default: 5)"
    )
    parser.add_argument("--limit", metavar="N", type=number(int, 1), help="the first N questions alone, for a trial")
    parser.add_argument("--batch-size", metavar="N", type=number(int, 1), default=8, help="questions (default: 8)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to write to (default: the first DIR)")
    arguments = parser.parse_args()
    for folder in arguments.models:
        if not (folder / "config.json").exists():
            raise UserError(f"{folder}: no model of transformers; make one with scripts/export_hf.py")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("lm_eval is missing: python -m pip install -r requirements-hub.txt") from None
    return arguments


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    few = arguments.tasks.split(",") if arguments.tasks else list(FEW_SHOT)
    shots = dict.fromkeys(few, arguments.shots) | ({} if arguments.tasks else dict.fromkeys(ZERO_SHOT, 0))
    return [
        Job(str(model), task, n, draw)
        for model, (task, n) in itertools.product(arguments.models, shots.items())
        for draw in range(arguments.draws if n else 1)  # with no examples there is nothing to draw
    ]


def evaluate(arguments: argparse.Namespace, job: Job) -> Result:
    from lm_eval import simple_evaluate

    with alone():
        try:
            found = simple_evaluate(
                load(job.model, arguments.batch_size),
                tasks=[job.task],
                num_fewshot=job.shots,
                limit=arguments.limit,
                fewshot_random_seed=job.draw,
                task_manager=task_manager(arguments.include_path),
                log_samples=False,
            )
        except Exception as error:  # a task's download, its file, its name: the harness has no error of its own
            raise UserError(f"task {job.task}: the harness could not run it ({reason(error)})") from None
    metrics = found["results"][job.task]
    name = f"{METRIC.get(job.task, 'acc')},none"
    if name not in metrics:
        raise UserError(f"task {job.task}: has no {name.split(',')[0]}, only {', '.join(metrics)}")
    stderr = metrics.get(name.replace(",", "_stderr,"), math.nan)
    return Result(job, metrics[name], stderr, metrics)


@functools.cache
def task_manager(folder: str | None) -> Any:
    """What finds the harness's tasks; it reads ten thousand files for that."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


@functools.lru_cache(maxsize=1)
def load(model: str, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    with alone():
        return HFLM(model, device=f"cuda:{rank}" if torch.cuda.is_available() else "cpu", batch_size=batch_size)


@contextmanager
def alone() -> Iterator[None]:
    """Hide torchrun's variables: the harness would share out the questions of each task, and on GPUs alone."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def gather(results: list[Result], world_size: int) -> list[Result]:
    """All ranks' results, on every rank."""
    if world_size == 1:
        return results
    dist.init_process_group("gloo")
    parts: list[list[Result]] = [[] for _ in range(world_size)]
    dist.all_gather_object(parts, results)
    dist.destroy_process_group()
    return [result for part in parts for result in part]


def report(results: list[Result], out: Path) -> None:
    cells: dict[str, dict[str, tuple[float, float]]] = {}  # {model: {task: (accuracy, standard error)}}
    for (model, task), group in itertools.groupby(results, key=lambda result: (result.job.model, result.job.task)):
        cells.setdefault(model, {})[task] = over_draws(list(group))
    rows = [{"run": m} | {task: f"{a:.4f} ± {e:.4f}" for task, (a, e) in tasks.items()} for m, tasks in cells.items()]
    out.mkdir(parents=True, exist_ok=True)
    table = format_table(rows)
    contents = {"md": table, "json": json.dumps([asdict(result) for result in results], indent=1, default=str)}
    for suffix, text in contents.items():
        with whole_file(out / f"evaluate.{suffix}") as file:
            file.write((text + "\n").encode())
    draw_bars(cells, out / "evaluate.png")
    print(table)
    print(f"wrote evaluate.md, .json and .png to {out}")


def over_draws(results: list[Result]) -> tuple[float, float]:
    """Mean accuracy and its standard error."""
    values = [result.accuracy for result in results]
    if len(values) == 1:
        return values[0], results[0].stderr
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def draw_bars(cells: dict[str, dict[str, tuple[float, float]]], path: Path) -> None:
    plt = pictures.pyplot()
    tasks = list(next(iter(cells.values())))
    figure, panel = plt.subplots(figsize=(2 + 1.4 * len(tasks), 4), layout="constrained")
    width = 0.8 / len(cells)
    for index, (model, values) in enumerate(cells.items()):
        places = [place + (index - (len(cells) - 1) / 2) * width for place in range(len(tasks))]
        heights, errors = zip(*values.values(), strict=True)
        panel.bar(places, heights, width, yerr=errors, capsize=3, label=model)
    panel.set_xticks(range(len(tasks)), tasks)
    panel.set_ylabel("accuracy")
    panel.legend(frameon=False)
    pictures.save(figure, [path])


if __name__ == "__main__":
    run_main(main)
