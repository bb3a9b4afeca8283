"""Measure how fast each part is, in one process, always as a ratio to something well known.

    python benchmarks/bench.py                                 # minutes on two CPU cores or one GPU
    python benchmarks/bench.py --parts trainer --sizes 355m    # only a part of it
    python benchmarks/bench.py --parts prepare --files 'books/*.parquet'
    torchrun --standalone --nproc_per_node=2 -- benchmarks/bench.py --parts ddp

Parts: optimizer (steps of AdamW, Lion, Sophia; the average of estimates), estimates (T(step),
T(Hessian)), data, start, memory (counted, without a GPU), trainer (tokens/s and, on a GPU, memory,
against nanogpt_loop.py), profile and load (on a CPU: where a step's time goes, and train.py beside
other processes), prepare (with --files), ddp (under torchrun). Competitors take turns (except for
the trainer on a GPU), and the median counts. Prints a table; --json FILE also writes
device, versions, commit and all numbers. What was not measured is listed as such.
"""

from __future__ import annotations

import argparse
import glob
import shutil
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

from benchmarks.cpu_parts import cpu_trainer, rates_under_load, step_profile
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
    start,
)
from runtime import distributed
from runtime.cli import Parser, UserError, number, reason, run_main
from runtime.distributed import Ranks
from runtime.experiment import load_experiment
from runtime.files import write_json
from runtime.run_folder import ROOT, describe_environment

PARTS = (
    "optimizer",
    "estimates",
    "data",
    "start",
    "memory",
    "trainer",
    "profile",
    "load",
    "prepare",
    "ddp",
)


def main() -> None:
    arguments = make_parser().parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    keys = {"train.device": kind, "train.compile": "true"}
    config = load_experiment(ROOT / "configs/quickstart.toml", "adamw", keys)
    ranks, device = Ranks.from_environment(), distributed.find_device(config.train)
    distributed.check_device(config.train, device)
    check(arguments, ranks)
    distributed.start_process_group(ranks)
    torch.set_float32_matmul_precision("high")

    rows, left_out = [], []
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for name, measurement in measurements(arguments, ranks, device, data):
            if measurement is None or time.monotonic() > deadline:
                left_out.append(name)
                continue
            print(f"… {name}", file=sys.stderr, flush=True)
            torch._dynamo.reset()  # its limit on recompilations is per process
            try:
                rows += list(measurement())
            except Exception as error:  # keep what was measured before
                left_out.append(f"{name} ({type(error).__name__}: {reason(error)})")
    if ranks.rank == 0:
        report(rows, left_out, ranks, device, arguments.json)
    distributed.exit_process(ranks, 0)


def check(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Refuse what would only fail after minutes of measuring."""
    if ranks.world_size > 1 and list(arguments.parts) != ["ddp"]:
        raise UserError("under torchrun there is only one part: add --parts ddp")
    for micro in arguments.micro or []:
        if GPU_BATCH % micro:
            raise UserError(f"--micro {micro}: does not divide the {GPU_BATCH} sequences of a step")
    if "prepare" in arguments.parts and arguments.files and not glob.glob(arguments.files):
        raise UserError(f"--files {arguments.files!r}: no file matches")
    if arguments.json and arguments.json.is_dir():
        raise UserError(f"--json={arguments.json}: is a folder; name a file")


def measurements(
    arguments: argparse.Namespace, ranks: Ranks, device: torch.device, data: Path
) -> Iterator[tuple[str, Callable[[], Iterator[Row]] | None]]:
    """Yield (name, function that measures), with None for what cannot be measured here."""
    is_cuda = device.type == "cuda"
    sizes = arguments.sizes or (["125m", "355m", "770m"] if is_cuda else ["125m"])
    for part in arguments.parts:
        if part == "optimizer":
            for size in sizes:
                yield f"optimizer {size}", partial(optimizer_steps, size, device)
        elif part == "trainer" and not is_cuda:
            for size in arguments.sizes or ["quickstart", "30m"]:
                yield f"trainer {size}", partial(cpu_trainer, size, data, device)
        elif part == "profile" and not is_cuda:
            for size in arguments.sizes or ["quickstart", "30m"]:
                yield f"profile {size}", partial(step_profile, size, data, device)
        elif part == "load" and not is_cuda:
            yield "load", partial(rates_under_load, data)
        elif part == "trainer":
            for size in sizes:
                yield f"trainer {size}", partial(gpu_trainer, size, arguments.micro, data, device)
        elif part == "estimates":
            for size in (arguments.sizes or ["125m"]) if is_cuda else ["quickstart"]:
                for run in ("sophia-g", "sophia-h"):
                    yield f"estimates {size} {run}", partial(estimates, size, run, data, device)
        elif part == "memory" and not is_cuda:
            for size in sizes:
                yield f"memory {size}", partial(counted_memory, size)
        elif part == "data":
            yield "data", partial(data_loading, data, device)
        elif part == "start":
            yield "start", partial(start, data)
        elif part == "prepare" and arguments.files:
            yield "prepare", partial(prepare, arguments.files)
        elif part == "prepare":
            yield "prepare (needs --files)", None
        elif part == "ddp" and ranks.world_size > 1:
            yield "ddp", partial(ddp_order, data, ranks, device)
        elif part == "ddp":
            yield "ddp (needs torchrun)", None


def make_data(folder: Path) -> Path:
    """Write random tokens that fit the quickstart's vocabulary."""
    for split, count in (("train", 4_000_000), ("val", 100_000)):
        tokens = np.random.default_rng(0).integers(1023, size=count)
        tokens.astype("<u2").tofile(folder / f"{split}.bin")
    return folder


def report(
    rows: list[Row], left_out: list[str], ranks: Ranks, device: torch.device, path: Path | None
) -> None:
    """Print the table, and write it to a JSON file if one is named."""
    facts = describe_environment(device, ranks.world_size)
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True)
        facts["driver"] = driver.stdout.strip()

    changes = ", with uncommitted changes" if facts["uncommitted_changes"] else ""
    print(f"{facts['device']}; torch {facts['torch']}; commit {facts['commit']}{changes}\n")
    print("| part | what | value | ratio to | ratio | goal |")
    print("| --- | --- | ---: | --- | ---: | --- |")
    for row in rows:
        ratio = f"{row.ratio:.3f}" if row.ratio is not None else ""
        value = f"{row.value:,.4g} {row.unit}"
        print(f"| {row.part} | {row.what} | {value} | {row.against} | {ratio} | {row.goal} |")
    for name in left_out:
        print(f"not run: {name}")

    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, facts | {"rows": [asdict(row) for row in rows], "not_run": left_out})
        print(f"\nwrote {path}")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    parts = f"of {', '.join(PARTS)} (default: all)"
    add("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=parts)
    sizes = f"of {', '.join(SIZES)} (default: 125m; on a GPU also 355m and 770m)"
    add("--sizes", nargs="+", choices=SIZES, metavar="SIZE", help=sizes)
    micro = "micro-batches on a GPU, sequences (default: one that fits)"
    add("--micro", nargs="+", type=number(int, 1), metavar="N", help=micro)
    minutes = "start no new measurement after N minutes"
    add("--minutes", type=number(float, 0.1), default=8, metavar="N", help=minutes)
    add("--files", metavar="GLOB", help="parquet files for the part prepare")
    add("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    return parser


if __name__ == "__main__":
    run_main(main)
