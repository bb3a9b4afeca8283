"""Measure how fast each part is, side by side in one process, always as a ratio to something well known.

    python benchmarks/bench.py                                    # a few minutes on two CPU cores, under ten on one GPU
    python benchmarks/bench.py --parts trainer --sizes 355m       # a part of it
    python benchmarks/bench.py --parts prepare --files 'books/*.parquet'
    torchrun --standalone --nproc_per_node=2 -- benchmarks/bench.py --parts ddp

Parts: optimizer (a step of AdamW, Lion, Sophia; the average of estimates), estimates (T(step), T(Hessian)), data,
start, memory (counted, without a GPU), trainer (tokens/s and, on a GPU, memory, against the loop in
nanogpt_loop.py), prepare (with --files), ddp (under torchrun). Competitors take turns (but for the trainer on a
GPU), so that a machine whose speed drifts does not favour one; the median counts. A table goes to the screen, and
device, versions, commit and all numbers to a JSON file. What was not measured is named, not guessed.
"""

from __future__ import annotations

import argparse
import glob
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.parts import (
    GPU_BATCH,
    SIZES,
    Row,
    counted_memory,
    data_loading,
    ddp_order,
    estimates,
    gpu_trainer,
    optimizer_steps,
    prepare,
    quickstart_trainer,
    start,
)
from runtime import metrics
from runtime.cli import Parser, UserError, number, reason, run_main
from runtime.distributed import Place, find_place, leave, start_process_group
from runtime.experiment import load_experiment

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    arguments = _parser().parse_args()
    cuda = torch.cuda.is_available()
    device = {"train.device": "cuda" if cuda else "cpu", "train.compile": "true"}
    place = find_place(load_experiment(ROOT / "configs/quickstart.toml", "adamw", device))
    check(arguments, place)
    start_process_group(place)
    torch.set_float32_matmul_precision("high")
    sizes = arguments.sizes or (["125m", "355m", "770m"] if cuda else ["125m"])
    deadline = time.monotonic() + 60 * arguments.minutes
    rows, left_out = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for name, measurement in measurements(arguments, place, sizes, data):
            if measurement is None or time.monotonic() > deadline:
                left_out.append(name)
                continue
            print(f"… {name}", file=sys.stderr, flush=True)
            torch._dynamo.reset()  # each measurement compiles its own shapes, and the compiler counts them
            try:
                rows += list(measurement())
            except Exception as error:  # what was measured before must not be lost
                left_out.append(f"{name} ({type(error).__name__}: {reason(error)})")
    if place.rank == 0:
        report(rows, left_out, place, arguments.json)
    leave(place, 0)


def check(arguments: argparse.Namespace, place: Place) -> None:
    """Refuse what would fail only after minutes of measuring."""
    if place.world_size > 1 and arguments.parts != ["ddp"]:
        raise UserError("under torchrun there is one part: add --parts ddp")
    if wrong := [micro for micro in arguments.micro or [] if GPU_BATCH % micro]:
        raise UserError(f"--micro {wrong[0]}: does not divide the {GPU_BATCH} sequences of a step")
    if "prepare" in arguments.parts and arguments.files:
        if not glob.glob(arguments.files):
            raise UserError(f"--files {arguments.files!r}: no file matches")
        if subprocess.run(
            [arguments.datasets_python, "-c", "import datasets, tiktoken"], capture_output=True
        ).returncode:
            raise UserError(f"{arguments.datasets_python} lacks datasets or tiktoken; name one by --datasets-python")
    if arguments.json and arguments.json.is_dir():
        raise UserError(f"--json={arguments.json}: is a folder; name a file")


def measurements(
    arguments: argparse.Namespace, place: Place, sizes: list[str], data: Path
) -> Iterator[tuple[str, Callable[[], Iterator[Row]] | None]]:
    """(name, function that measures) for all that the command line asks for; None where it cannot be done here."""
    device = place.device
    cuda = device.type == "cuda"
    for part in arguments.parts:
        if part == "optimizer":
            for size in sizes:
                yield f"optimizer {size}", partial(optimizer_steps, size, device)
        elif part == "trainer" and not cuda:
            yield "trainer quickstart", partial(quickstart_trainer, data, device)
        elif part == "trainer":
            for size in sizes:
                yield f"trainer {size}", partial(gpu_trainer, size, arguments.micro, data, device)
        elif part == "estimates":
            for size in arguments.sizes or ["125m"] if cuda else ["quickstart"]:
                for run in ("sophia-g", "sophia-h"):
                    yield f"estimates {size} {run}", partial(estimates, size, run, data, device)
        elif part == "memory" and not cuda:
            for size in sizes:
                yield f"memory {size}", partial(counted_memory, size)
        elif part == "data":
            yield "data", partial(data_loading, data, device)
        elif part == "start":
            yield "start", partial(start, data)
        elif part == "prepare":
            ready = partial(prepare, arguments.files, arguments.datasets_python) if arguments.files else None
            yield "prepare" if ready else "prepare (needs --files)", ready
        elif part == "ddp":
            several = place.world_size > 1
            yield "ddp" if several else "ddp (needs torchrun)", partial(ddp_order, data, place) if several else None


def make_data(folder: Path) -> Path:
    """Random tokens, which cost as much as any others; below 257, for the quickstart's vocabulary too."""
    for split, count in (("train", 4_000_000), ("val", 100_000)):
        np.random.default_rng(0).integers(257, size=count).astype("<u2").tofile(folder / f"{split}.bin")
    return folder


def report(rows: list[Row], left_out: list[str], place: Place, path: Path | None) -> None:
    facts = metrics.environment(place.device, place.world_size)
    if place.device.type == "cuda":
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        facts["driver"] = driver.stdout.strip()
    changed = ", with uncommitted changes" if facts["uncommitted_changes"] else ""
    print(f"{facts['device']}; torch {facts['torch']}; commit {facts['commit']}{changed}\n")
    print("| part | what | value | ratio to | ratio | goal |\n| --- | --- | ---: | --- | ---: | --- |")
    for row in rows:
        ratio = f"{row.ratio:.3f}" if row.ratio is not None else ""
        print(f"| {row.part} | {row.what} | {row.value:,.4g} {row.unit} | {row.against} | {ratio} | {row.goal} |")
    for name in left_out:
        print(f"not run: {name}")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = facts | {"rows": [asdict(row) for row in rows], "not_run": left_out}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\nwrote {path}")


def _parser() -> argparse.ArgumentParser:
    parts = ["optimizer", "estimates", "data", "start", "memory", "trainer", "prepare", "ddp"]
    parser = Parser(__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=parts, default=parts, metavar="PART", help=f"of {', '.join(parts)} (default: all)"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SIZES,
        metavar="SIZE",
        help=f"of {', '.join(SIZES)} (default: 125m; on a GPU 355m and 770m too)",
    )
    parser.add_argument(
        "--micro",
        nargs="+",
        type=number(int, 1),
        metavar="N",
        help="micro-batches on a GPU, sequences (default: one that fits)",
    )
    parser.add_argument(
        "--minutes", type=number(float, 0.1), default=8, metavar="N", help="begin nothing new after N minutes"
    )
    parser.add_argument("--files", metavar="GLOB", help="parquet files for the part prepare; without, it is left out")
    parser.add_argument(
        "--datasets-python",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter that has `datasets` (default: this one)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    return parser


if __name__ == "__main__":
    run_main(main)
