"""Downstream accuracy of exported models, by EleutherAI's lm-evaluation-harness: the paper's Figure 6 and more.

    python scripts/evaluate.py hf/adamw hf/sophia-g --out results/downstream
    torchrun --standalone --nproc_per_node=8 -- scripts/evaluate.py hf/adamw hf/sophia-g
    python scripts/evaluate.py hf/adamw --tasks=mine --include-path=my_tasks --draws=1 --limit=100

Each DIR is what export_hf.py writes, or any causal model of transformers. Without --tasks: BoolQ, CB, COPA and RTE of
SuperGLUE, 2-shot, with 5 draws of the examples shown, and HellaSwag and LAMBADA with none shown. Prints accuracies,
mean ± standard error over the draws / over the questions, and writes evaluate.md, .json and .png. Under torchrun the
ranks share out models, tasks and draws. Results are kept one by one in evaluate/, and an interrupted call goes on.
Needs requirements-hub.txt; the harness downloads its questions.
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

from analysis import plots as pictures
from runtime.cli import Parser, UserError, number, reason, run_main
from runtime.files import whole_file
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
    inputs: str  # a digest of the model's files and of the task files, by their sizes and times


@dataclass(frozen=True)
class Result:
    job: Job
    accuracy: float
    stderr: float | None  # over the questions, as the harness estimates it
    shots: int  # as shown: a task may have a number of its own
    metrics: dict[str, Any]  # all that the harness says


@dataclass(frozen=True)
class Accuracy:
    """Of a model in a task, with its standard errors."""

    mean: float
    draws: float | None  # over the draws of the examples
    questions: float | None  # over the questions, mean of the draws


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
    parser.add_argument("--include-path", metavar="DIR", type=Path, help="folder with task files (YAML) of your own")
    parser.add_argument(
        "--shots", metavar="N", type=number(int, 0, 100), default=2, help="examples shown before a question"
    )
    parser.add_argument("--draws", metavar="N", type=number(int, 1, 100), default=5, help="draws of the examples")
    parser.add_argument("--limit", metavar="N", type=number(int, 1), help="the first N questions alone, for a trial")
    parser.add_argument("--batch-size", metavar="N", type=number(int, 1), default=8, help="questions at once")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to write to (default: the first DIR)")
    arguments = parser.parse_args()
    for folder in filter(None, (arguments.out, arguments.include_path)):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; name a folder")
    if arguments.include_path and not arguments.include_path.exists():
        raise UserError(f"--include-path={arguments.include_path}: no such folder")
    if arguments.tasks is not None and not all(arguments.tasks.split(",")):
        raise UserError(f"--tasks={arguments.tasks}: has an empty name; write --tasks=A,B")
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
    tasks = list(arguments.include_path.rglob("*")) if arguments.include_path else []
    inputs = {}
    for model in arguments.models:
        own = [path for path in model.glob("*") if not path.name.startswith("evaluate")]  # which this script writes
        inputs[model] = digest([*own, *tasks])
    return [
        Job(str(model), task, n, draw, arguments.limit, inputs[model])
        for model, (task, n) in itertools.product(arguments.models, shots.items())
        for draw in range(arguments.draws if n else 1)  # with no examples there is nothing to draw
    ]


def digest(paths: list[Path]) -> str:
    """Changes where one of the files does, without reading them: a model's weights are gigabytes."""
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths) if path.is_file()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def out_of(arguments: argparse.Namespace) -> Path:
    return arguments.out or arguments.models[0]


def evaluate(arguments: argparse.Namespace, job: Job) -> Result:
    """The job's result, from its file in evaluate/ where an earlier call made it of the same model and task files."""
    name = hashlib.sha256(json.dumps(asdict(job)).encode()).hexdigest()[:16]
    path = out_of(arguments) / "evaluate" / f"{name}.json"
    if path.exists():
        with suppress(ValueError, KeyError, TypeError):  # damaged: made again
            saved = json.loads(path.read_text(encoding="utf-8"))
            result = Result(**saved | {"job": Job(**saved["job"])})
            print(f"{job.model}  {job.task}  draw {job.draw}: {result.accuracy:.4f} (from {path})", flush=True)
            return result
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
def task_manager(folder: Path | None) -> Any:
    """What finds the harness's tasks; it reads ten thousand files for that."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder else None)


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
    cells: dict[str, dict[str, Accuracy]] = {}  # {model: {task: …}}
    for (model, task), group in itertools.groupby(results, key=lambda result: (result.job.model, result.job.task)):
        cells.setdefault(model, {})[task] = over_draws(list(group))
    rows = [{"run": model} | {task: as_text(value) for task, value in tasks.items()} for model, tasks in cells.items()]
    table = f"{format_table(rows)}\n\n± standard error over the draws / over the questions"
    contents = {"md": table, "json": json.dumps([asdict(result) for result in results], indent=1, default=str)}
    for suffix, text in contents.items():
        with whole_file(out / f"evaluate.{suffix}") as file:
            file.write((text + "\n").encode())
    draw_bars(cells, out / "evaluate.png")
    print(table)
    print(f"wrote evaluate.md, .json and .png to {out}")


def over_draws(results: list[Result]) -> Accuracy:
    """The mean of a task's draws; an error is None where one draw, or one question, tells of none."""
    values = [result.accuracy for result in results]
    drawn = len(values) > 1 and results[0].shots > 0
    draws = statistics.stdev(values) / math.sqrt(len(values)) if drawn else None
    errors = [result.stderr for result in results if result.stderr is not None]
    return Accuracy(statistics.fmean(values), draws, statistics.fmean(errors) if errors else None)


def as_text(value: Accuracy) -> str:
    draws, questions = ("–" if error is None else f"{error:.4f}" for error in (value.draws, value.questions))
    return f"{value.mean:.4f} ± {draws} / {questions}"


def draw_bars(cells: dict[str, dict[str, Accuracy]], path: Path) -> None:
    plt = pictures.pyplot()
    tasks = list(next(iter(cells.values())))
    figure, panel = plt.subplots(figsize=(2 + 1.4 * len(tasks), 4), layout="constrained")
    width = 0.8 / len(cells)
    for index, (model, values) in enumerate(cells.items()):
        places = [place + (index - (len(cells) - 1) / 2) * width for place in range(len(tasks))]
        heights = [value.mean for value in values.values()]
        errors = [max(value.draws or 0, value.questions or 0) for value in values.values()]
        panel.bar(places, heights, width, yerr=errors, capsize=3, label=model)
    panel.set_xticks(range(len(tasks)), tasks)
    panel.set_ylabel("accuracy ± the larger standard error")
    panel.legend(frameon=False)
    pictures.save(figure, [path])


if __name__ == "__main__":
    run_main(main)
