"""Downstream accuracy of exported models, by EleutherAI's lm-evaluation-harness: the paper's Figure 6 and more.

    python scripts/evaluate.py hf/adamw hf/sophia-g --out results/downstream
    torchrun --standalone --nproc_per_node=8 -- scripts/evaluate.py hf/adamw hf/sophia-g
    python scripts/evaluate.py hf/adamw --tasks=mine --include-path=my_tasks --draws=1 --limit=100

Each DIR is what export_hf.py writes, or any causal model of transformers. Without --tasks: BoolQ, CB, COPA and RTE of
SuperGLUE, 2-shot, with 5 draws of the examples shown, and HellaSwag and LAMBADA with none shown. Prints accuracies,
mean ± standard error over the draws (of one draw: the harness's own over the questions), and writes evaluate.md, .json
and .png. Under torchrun the ranks share out models, tasks and draws. Results are kept one by one in evaluate/, and an
interrupted call goes on. Needs requirements-hub.txt; the harness downloads its questions.
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
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from errors import Parser, UserError, number, reason, run_main
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
    limit: int | None


@dataclass(frozen=True)
class Result:
    job: Job
    accuracy: float
    stderr: float | None  # over the questions, as the harness estimates it
    shots: int  # as shown: a task may have a number of its own
    metrics: dict[str, Any]  # all that the harness says


def main() -> None:
    arguments = parse_arguments()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    jobs = make_jobs(arguments)
    done, problem = [], None
    try:
        done = [evaluate(arguments, job) for job in jobs[rank::world_size]]
    except UserError as error:
        problem = str(error)
    results, problems = gather(done, problem, world_size)
    if rank == 0 and problems:
        raise UserError(problems[0])
    if rank == 0:
        report(sorted(results, key=lambda result: jobs.index(result.job)), out_of(arguments))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("models", metavar="DIR", nargs="+", type=Path, help="folders in Hugging Face's format")
    parser.add_argument("--tasks", metavar="A,B", help="tasks of the harness, in place of those above")
    parser.add_argument("--include-path", metavar="DIR", help="folder with task files (YAML) of your own")
    parser.add_argument(
        "--shots", metavar="N", type=number(int, 0, 100), default=2, help="examples shown before a question"
    )
    parser.add_argument("--draws", metavar="N", type=number(int, 1, 100), default=5, help="draws of the examples")
    parser.add_argument("--limit", metavar="N", type=number(int, 1), help="the first N questions alone, for a trial")
    parser.add_argument("--batch-size", metavar="N", type=number(int, 1), default=8, help="questions at once")
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
        Job(str(model), task, n, draw, arguments.limit)
        for model, (task, n) in itertools.product(arguments.models, shots.items())
        for draw in range(arguments.draws if n else 1)  # with no examples there is nothing to draw
    ]


def out_of(arguments: argparse.Namespace) -> Path:
    return arguments.out or arguments.models[0]


def evaluate(arguments: argparse.Namespace, job: Job) -> Result:
    """The job's result, from its file in evaluate/ where an earlier call came that far with the same model."""
    name = "-".join(f"{value}" for value in asdict(job).values()).replace("/", "_")
    path = out_of(arguments) / "evaluate" / f"{name}.json"
    if path.exists() and path.stat().st_mtime > Path(job.model, "config.json").stat().st_mtime:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return Result(**saved | {"job": Job(**saved["job"])})
    result = call_harness(arguments, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(json.dumps(asdict(result), default=str).encode())
    print(f"{job.model}  {job.task}  draw {job.draw}: {result.accuracy:.4f}", flush=True)
    return result


def call_harness(arguments: argparse.Namespace, job: Job) -> Result:
    from lm_eval import simple_evaluate

    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    with alone():
        model = load(job.model, device, arguments.batch_size)
        try:
            found = simple_evaluate(
                model,
                tasks=[job.task],
                num_fewshot=job.shots,
                limit=job.limit,
                fewshot_random_seed=job.draw,
                task_manager=task_manager(arguments.include_path),
                bootstrap_iters=10,  # accuracy's error has a formula; other metrics' is not asked for
                log_samples=False,
            )
        except torch.OutOfMemoryError:
            raise UserError(f"{job.model}: out of memory in {job.task}; lower --batch-size") from None
        except Exception as error:  # a task's download, its file, its name: the harness has no error of its own
            raise UserError(f"task {job.task}: the harness could not run it ({reason(error)})") from None
    if job.task not in found["results"]:
        raise UserError(f"task {job.task}: is a group; name its tasks: {','.join(found['results'])}")
    metrics = found["results"][job.task]
    name = f"{METRIC.get(job.task, 'acc')},none"
    if name not in metrics:
        raise UserError(f"task {job.task}: has no {name.split(',')[0]}, only {', '.join(metrics)}")
    stderr = metrics.get(name.replace(",", "_stderr,"))  # "N/A" of a single question
    shots = found["n-shot"][job.task]
    return Result(job, metrics[name], stderr if isinstance(stderr, float) else None, shots, metrics)


@functools.cache
def task_manager(folder: str | None) -> Any:
    """What finds the harness's tasks; it reads ten thousand files for that."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


@functools.lru_cache(maxsize=1)
def load(model: str, device: str, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        return HFLM(model, device=device, batch_size=batch_size)
    except Exception as error:  # whatever transformers finds wrong with the folder
        raise UserError(f"{model}: cannot be loaded as a causal model ({reason(error)})") from None


@contextmanager
def alone() -> Iterator[None]:
    """Hide torchrun's variables: the harness would share out the questions of each task, and on GPUs alone."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def gather(done: list[Result], problem: str | None, world_size: int) -> tuple[list[Result], list[str]]:
    """All ranks' results and problems, on every rank; ranks wait here for those with longer tasks."""
    parts: list[Any] = [(done, problem)]
    if world_size > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        parts = [None] * world_size
        dist.all_gather_object(parts, (done, problem))
        dist.destroy_process_group()
    return [result for results, _ in parts for result in results], [text for _, text in parts if text]


def report(results: list[Result], out: Path) -> None:
    cells: dict[str, dict[str, tuple[float, float]]] = {}  # {model: {task: (accuracy, standard error)}}
    for (model, task), group in itertools.groupby(results, key=lambda result: (result.job.model, result.job.task)):
        cells.setdefault(model, {})[task] = over_draws(list(group))
    rows = [{"run": m} | {task: f"{a:.4f} ± {e:.4f}" for task, (a, e) in tasks.items()} for m, tasks in cells.items()]
    table = format_table(rows)
    contents = {"md": table, "json": json.dumps([asdict(result) for result in results], indent=1, default=str)}
    for suffix, text in contents.items():
        with whole_file(out / f"evaluate.{suffix}") as file:
            file.write((text + "\n").encode())
    draw_bars(cells, out / "evaluate.png")
    print(table)
    print(f"wrote evaluate.md, .json and .png to {out}")


def over_draws(results: list[Result]) -> tuple[float, float]:
    """Mean accuracy and its standard error: over the draws; where nothing was drawn, over the questions."""
    values = [result.accuracy for result in results]
    if len(values) == 1 or results[0].shots == 0:
        error = results[0].stderr
        return values[0], math.nan if error is None else error
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def draw_bars(cells: dict[str, dict[str, tuple[float, float]]], path: Path) -> None:
    plt = pictures.pyplot()
    tasks = list(next(iter(cells.values())))
    figure, panel = plt.subplots(figsize=(2 + 1.4 * len(tasks), 4), layout="constrained")
    width = 0.8 / len(cells)
    for index, (model, values) in enumerate(cells.items()):
        places = [place + (index - (len(cells) - 1) / 2) * width for place in range(len(tasks))]
        heights, errors = zip(*values.values(), strict=True)
        panel.bar(places, heights, width, yerr=[0 if math.isnan(e) else e for e in errors], capsize=3, label=model)
    panel.set_xticks(range(len(tasks)), tasks)
    panel.set_ylabel("accuracy")
    panel.legend(frameon=False)
    pictures.save(figure, [path])


if __name__ == "__main__":
    run_main(main)
