"""What bench.py measures on CPUs only: the trainer, where a step's time goes, and other load."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import nanogpt_loop
from benchmarks.parts import SECONDS, Row, build, configure, medians, shape_of, stepper
from runtime.cost import flops_per_token
from runtime.run_folder import METRICS, ROOT, read_metrics
from train import update_hessian

# Operations of a step by what they are for. All that is not listed is "other".
PARTS = {
    "matrix products": ("mm", "addmm", "bmm"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "loss": (
        "_log_softmax",
        "_log_softmax_backward_data",
        "nll_loss_forward",
        "nll_loss_backward",
    ),
    "GELU": ("gelu", "gelu_backward"),
    "layer norms": ("native_layer_norm", "native_layer_norm_backward"),
    "casts and copies": ("copy_",),
    "optimizer": ("_fused_adamw_",),
}

# Ways to divide two cores: processes, and what they are started with.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PASSIVE = {"OMP_WAIT_POLICY": "passive"}
SETTINGS: dict[str, tuple[int, dict[str, str]]] = {
    "a thread per core": (1, {}),
    "a thread per core, OMP_WAIT_POLICY=passive": (1, PASSIVE),
    "one thread": (1, ONE_THREAD),
    "a process per core, one thread each": (os.cpu_count() or 1, ONE_THREAD),
}
BUSY = "while True: pass"


def cpu_trainer(size: str, data: Path, device: torch.device) -> Iterator[Row]:
    """Measure AdamW in both loops, eager and compiled. The reference is in fp32 on every CPU.

    train.py has the number format that "auto" chooses. What a step reaches in GFLOP/s is compared
    with a single large matrix product.
    """
    shape = shape_of(size)
    batch = 32 if size == "quickstart" else 1
    calls: dict[str, Callable[[], Any]] = {}
    for compiled in (False, True):
        kind = "compiled" if compiled else "eager"
        reference = nanogpt_loop.make_reference_step(shape, data, batch, batch, device, compiled)
        calls[f"reference, {kind}, fp32"] = reference
        keys: dict[str, Any] = {"train.batch_size": batch, "train.micro_batch_size": batch}
        keys |= {"train.dtype": "auto", "train.compile": compiled}
        config = configure(size, "adamw", data, device, keys)
        calls[f"train.py, {kind}, {config.train.dtype}"] = stepper(build(config, device))

    # Not in bfloat16 on a CPU without it, where the product takes minutes.
    products = {}
    for dtype in sorted({"float32", config.train.dtype}):
        matrix = torch.randn(2048, 2048, device=device, dtype=getattr(torch, dtype))
        products[f"2048³ product, {dtype}"] = partial(torch.mm, matrix, matrix)
    seconds = medians(calls | products, device, 4 * SECONDS)

    for name in products:
        yield Row("trainer", name, 2 * 2048**3 / seconds[name] / 1e9, "GFLOP/s")
    best = min(value for name, value in seconds.items() if name.startswith("reference"))
    for name in calls:
        rate = batch * shape.block_size / seconds[name]
        gigaflops = rate * flops_per_token(shape) / 1e9
        what, against = f"{size}: {name}, {gigaflops:.0f} GFLOP/s", "the better reference"
        goal = "≥ 1.0" if name.startswith("train.py") else ""
        yield Row("trainer", what, rate, "tokens/s", against, best / seconds[name], goal)


def step_profile(size: str, data: Path, device: torch.device) -> Iterator[Row]:
    """Measure what an eager step, and a Hutchinson estimate, spend their time on."""
    batch, estimated = (32, 2) if size == "quickstart" else (1, 1)
    keys: dict[str, Any] = {"train.batch_size": batch, "train.micro_batch_size": batch}
    keys |= {"train.dtype": "auto", "train.compile": False}
    sophia_h = keys | {"optimizer.hessian_batch_size": estimated}
    run = build(configure(size, "sophia-h", data, device, sophia_h), device)
    calls = {
        "step": stepper(build(configure(size, "adamw", data, device, keys), device)),
        f"Hutchinson estimate on {estimated} of {batch} sequences": lambda: update_hessian(run, 0),
    }
    for name, call in calls.items():
        parts = milliseconds_by_part(call)
        total = sum(parts.values())
        for part, milliseconds in parts.items():
            what = f"{size}: eager {name}: {part}"
            yield Row("profile", what, milliseconds, "ms", "the whole", milliseconds / total)


def milliseconds_by_part(call: Callable[[], Any], calls: int = 5) -> dict[str, float]:
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            call()

    part_of = {f"aten::{name}": part for part, names in PARTS.items() for name in names}
    totals = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profiler.key_averages():
        totals[part_of.get(event.key, "other")] += event.self_cpu_time_total / 1000 / calls
    return totals


def rates_under_load(data: Path) -> Iterator[Row]:
    """Measure train.py alone and beside one and two processes that keep a core busy each."""
    alone = None
    for busy in range(3):
        for name, (processes, environment) in SETTINGS.items():
            rate = trained_rate(data, processes, environment, busy)
            alone = alone or rate
            what = f"quickstart: {name}, beside {busy} busy processes"
            yield Row("load", what, rate, "tokens/s", "a thread per core, alone", rate / alone)


def trained_rate(data: Path, processes: int, environment: dict[str, str], busy: int) -> float:
    """Return the tokens/s of all processes that train together, without the first 20 steps."""
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/quickstart.toml")]
    command += ["--run=adamw", f"--data.path={data}", "--train.max_steps=60"]
    command += ["--train.warmup_steps=1", "--train.eval_windows=1", "--train.log_interval=60"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for _ in range(busy):
            other = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(other.kill)

        started = []
        for index in range(processes):
            out = f"--train.out_dir={folder}/{index}"
            started.append(
                subprocess.Popen(
                    [*command, out], env=os.environ | environment, stdout=subprocess.DEVNULL
                )
            )
        for process in started:
            process.wait()

        total = 0.0
        for index in range(processes):
            lines = read_metrics(Path(folder, str(index), "quickstart/adamw", METRICS))
            steps = [line for line in lines if "step_ms" in line]
            tokens = steps[1]["tokens"] - steps[0]["tokens"]
            total += 1000 * tokens / statistics.median(line["step_ms"] for line in steps[20:])
    return total
