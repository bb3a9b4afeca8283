"""What bench.py measures: a function a part, each yields the rows of its table."""

from __future__ import annotations

import gc
import glob
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import train
from benchmarks import nanogpt_loop
from benchmarks.nanogpt_loop import make_reference_step
from benchmarks.peak_memory import PeakMemory
from data.batches import read_windows, window_offsets
from model import GPT, activation_bytes, flops_per_token, num_parameters, summed_loss
from optimizers.build import make_optimizer
from optimizers.lion import Lion
from runtime import metrics
from runtime.cli import UserError
from runtime.config import Config, ModelConfig
from runtime.distributed import Place
from runtime.experiment import load_experiment
from sophia import SophiaG
from step import Run, make_step, to_device, update_hessian

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("30m", "125m", "355m", "770m")
SECONDS = 2.0  # of measurement for each competitor, on average
GPU_BATCH = 120  # sequences a step on a GPU: a quarter of the paper's, so that a step takes a second and not four


@dataclass(frozen=True)
class Row:
    """One measured number; `ratio` is to what `against` names, and `goal` what the ratio should come to."""

    part: str
    what: str
    value: float
    unit: str
    against: str = ""
    ratio: float | None = None
    goal: str = ""


def medians(
    functions: dict[str, Callable[[], Any]], device: torch.device, seconds: float = SECONDS, rounds: int = 5
) -> dict[str, float]:
    """Median seconds of a call of each, after two to warm up; they take turns, at least so many rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
        function()
    ended = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < ended or min(map(len, times.values())) < rounds:
        for name, function in functions.items():
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def shape_of(size: str) -> ModelConfig:
    name = size if size == "quickstart" else f"gpt2_{size}"
    return load_experiment(ROOT / f"configs/{name}.toml", "adamw").model


def optimizer_steps(size: str, device: torch.device) -> Iterator[Row]:
    """A step alone, fp32 parameters and states, found_inf set as train.py sets it; and the bytes it must move."""
    with torch.device("meta"):
        shapes = [p.shape for p in GPT(shape_of(size)).parameters()]
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    n = sum(p.numel() for p in params)
    source = torch.randn(min(n, 250_000_000), device=device)
    target = torch.empty_like(source)
    sophia = SophiaG(params, fused=True)
    found_inf = torch.zeros((), device=device)
    optimizers: dict[str, tuple[Any, int]] = {
        "AdamW, fused": (torch.optim.AdamW(params, fused=True), 28),
        "Lion, fused": (Lion(params, fused=True), 20),
        "Sophia-G, fused": (sophia, 24),
    }
    if size == "125m":  # the larger ones' states would not all fit a card at once
        optimizers["Sophia-G, multi-tensor"] = (SophiaG(params, foreach=True), 24)
        optimizers["Sophia-G, per tensor"] = (SophiaG(params, foreach=False), 24)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    for name, (optimizer, _) in optimizers.items():
        optimizer.found_inf = found_inf
        calls[name] = optimizer.step
    calls["average of estimates, fused"] = lambda: sophia.update_hessian_from_grad(480, found_inf)
    seconds = medians(calls, device, SECONDS / 2)
    bandwidth = 8 * source.numel() / seconds["copy"]
    cpu = device.type == "cpu"
    goals = {"Lion, fused": "≤ 1.0" if cpu else "≤ 0.80", "Sophia-G, fused": "≤ 1.15" if cpu else "≤ 0.95"}
    yield Row("optimizer", f"{size}: copy", bandwidth / 1e9, "GB/s")
    for name, (_, moved) in optimizers.items():
        share = moved * n / seconds[name] / bandwidth
        ratio = seconds[name] / seconds["AdamW, fused"]
        what = f"{size}: {name} ({share:.0%} of the copy's bandwidth)"
        yield Row("optimizer", what, 1000 * seconds[name], "ms", "AdamW, fused", ratio, goals.get(name, ""))
    average = seconds["average of estimates, fused"]
    share = 12 * n / average / bandwidth
    yield Row("optimizer", f"{size}: average of estimates", 1000 * average, "ms", "copy's bandwidth", share, "≥ 0.8")


def configure(size: str, run: str, data: Path, device: torch.device, **overrides: Any) -> Config:
    name = size if size == "quickstart" else f"gpt2_{size}"
    keys = {"data.path": str(data), "train.device": device.type} | {
        k.replace("__", "."): v for k, v in overrides.items()
    }
    text = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in keys.items()}
    return load_experiment(ROOT / f"configs/{name}.toml", run, text)


def build(config: Config, place: Place) -> Run:
    folder = Path(config.data.path)
    tokens: dict[str, np.ndarray] = {s: np.memmap(folder / f"{s}.bin", "<u2", "r") for s in ("train", "val")}
    return train.build_run(config, place, tokens)


def stepper(run: Run) -> Callable[[], None]:
    """A function that makes the next step that has no estimate in it."""
    state = {"step": 0}

    def step() -> None:
        state["step"] += 1 + ((state["step"] + 1) % (run.config.optimizer.hessian_interval or 10**9) == 0)
        make_step(run, state["step"])

    return step


def quickstart_trainer(data: Path, device: torch.device) -> Iterator[Row]:
    """AdamW in both loops, fp32, the quickstart's model and batch."""
    shape = shape_of("quickstart")
    calls = {}
    for compiled in (False, True):
        kind = "compiled" if compiled else "eager"
        calls[f"reference, {kind}"] = make_reference_step(shape, data, 32, 32, device, compiled)
        run = build(configure("quickstart", "adamw", data, device, train__compile=compiled), Place(0, 1, device))
        calls[f"train.py, {kind}"] = stepper(run)
    seconds = medians(calls, device, 4 * SECONDS)
    best = min(seconds[name] for name in calls if name.startswith("reference"))
    for name, value in seconds.items():
        rate = 32 * shape.block_size / value
        goal = "≥ 1.0" if name.startswith("train.py") else ""
        yield Row("trainer", f"quickstart: {name}", rate, "tokens/s", "the better reference", best / value, goal)


def gpu_trainer(size: str, micros: list[int] | None, data: Path, device: torch.device) -> Iterator[Row]:
    """Tokens/s, MFU and peak memory; by the last, the largest micro-batch that would fit smaller cards.

    Each alone and one after the other, since each one's memory is measured.
    """
    shape = shape_of(size)
    flops, peak = flops_per_token(shape), metrics.peak_tflops(device)
    best: dict[str, float] = {}
    fits: dict[tuple[str, int], float] = {}
    for name, chunk in (("reference", None), ("train.py", 0), ("train.py, loss_chunk 8192", 8192)):
        for micro in micros or [largest_micro_batch(shape, device)]:
            measured = rate_and_memory(size, chunk, micro, data, device)
            if measured is None:
                print(f"{size}: {name}, micro-batch {micro}: out of memory", file=sys.stderr)
                continue
            rate, memory = measured
            best[name] = max(best.get(name, 0), rate)
            # Beside weights, gradients, two states, the weights' bf16 copies and the logits of a chunk.
            fixed = 18 * num_parameters(shape) + 12 * (chunk or 0) * shape.vocab_size
            for budget in (24, 40):
                fits[name, budget] = (0.95e9 * budget - fixed) // ((memory - fixed) / micro)
            mfu = f"{rate * flops / peak / 1e12:.1%}" if peak else "unknown"
            what = f"{size}: {name}, micro-batch {micro}, {memory / 1e9:.1f} GB, MFU {mfu}"
            ratio = rate / best["reference"] if "reference" in best else None
            yield Row("trainer", what, rate, "tokens/s", "reference", ratio, "≥ 1.15" if name == "train.py" else "")
    for (name, budget), fit in fits.items():
        reference = fits.get(("reference", budget))
        goal = "≥ 1.5" if "chunk" in name else ""
        what = f"{size}: {name} in {budget} GB"
        yield Row("memory", what, fit, "sequences", "reference", fit / reference if reference else None, goal)


def rate_and_memory(
    size: str, chunk: int | None, micro: int, data: Path, device: torch.device
) -> tuple[float, int] | None:
    """Tokens/s and peak bytes of train.py with that loss_chunk (None: the reference loop); None if it does not fit."""
    shape = shape_of(size)
    torch._dynamo.reset()
    gc.collect()  # what the last one left; in a function of its own, so that an out-of-memory error leaves nothing
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        if chunk is None:
            step = make_reference_step(shape, data, GPU_BATCH, micro, device, compiled=True)
        else:
            keys = {"train.batch_size": GPU_BATCH, "train.micro_batch_size": micro, "train.loss_chunk": chunk}
            step = stepper(build(configure(size, "adamw", data, device, **keys), Place(0, 1, device)))
        seconds = medians({"step": step}, device)["step"]
    except torch.OutOfMemoryError:
        return None
    return GPU_BATCH * shape.block_size / seconds, torch.cuda.max_memory_allocated()


def largest_micro_batch(shape: ModelConfig, device: torch.device) -> int:
    """The largest divisor of GPU_BATCH that the rule of thumb lets fit two thirds of the device's memory."""
    room = 2 / 3 * torch.cuda.mem_get_info(device)[1] - 18 * num_parameters(shape)
    fit = max(int(room / activation_bytes(shape, "bfloat16", 1)), 1)
    return max(micro for micro in range(1, min(fit, GPU_BATCH) + 1) if GPU_BATCH % micro == 0)


def estimates(size: str, run_name: str, data: Path, device: torch.device) -> Iterator[Row]:
    """T(step) without an estimate, T(Hessian), and what one in ten steps adds to the mean of them.

    Gauss-Newton-Bartlett on half of the batch (240 of 480), Hutchinson on a fifteenth (32 of 480). On a CPU with the
    quickstart's model, compiled.
    """
    batch = GPU_BATCH if device.type == "cuda" else 30
    sequences = batch // 2 if run_name == "sophia-g" else batch // 15
    keys = {"train.batch_size": batch, "train.compile": True, "optimizer.hessian_batch_size": sequences}
    keys["train.micro_batch_size"] = largest_micro_batch(shape_of(size), device) if device.type == "cuda" else batch
    run = build(configure(size, run_name, data, device, **keys), Place(0, 1, device))
    seconds = medians({"step": stepper(run), "Hessian": lambda: update_hessian(run, 0)}, device, 2 * SECONDS)
    added = seconds["Hessian"] / 10 / seconds["step"]
    goal = "≤ 0.053" if run_name == "sophia-g" else "≤ 0.03"
    what = f"{size}: {run_name}, {sequences} of {batch} sequences"
    yield Row("estimates", f"{what}, T(step)", 1000 * seconds["step"], "ms")
    yield Row("estimates", f"{what}, T(Hessian)", 1000 * seconds["Hessian"], "ms", "10 steps", added, goal)


def ddp_order(data: Path, place: Place) -> Iterator[Row]:
    """A step of all ranks with DistributedDataParallel around the compiled model, and compiled around it."""
    size = "125m" if place.device.type == "cuda" else "quickstart"
    batch = 32 * place.world_size
    keys = {"train.batch_size": batch, "train.micro_batch_size": 32, "train.compile": True}
    run = build(configure(size, "adamw", data, place.device, **keys), place)
    other = DistributedDataParallel(GPT(run.config.model).to(place.device), gradient_as_bucket_view=True)
    optimizer = make_optimizer(run.config, other.module)
    compiled: Any = torch.compile(other, dynamic=False)
    other_run = replace(run, model=other.module, parallel=compiled, optimizer=optimizer)
    calls = {"DDP(compile(model)), as train.py does": stepper(run), "compile(DDP(model))": stepper(other_run)}
    seconds = medians(calls, place.device, seconds=0, rounds=40)  # a number of rounds: ranks must agree on it
    for name, value in seconds.items():
        ratio = value / seconds["compile(DDP(model))"]
        yield Row("ddp", f"{size} on {place.world_size} ranks: {name}", 1000 * value, "ms", "the other", ratio)


def counted_memory(size: str) -> Iterator[Row]:
    """Largest micro-batches by the tensors that eager mode keeps alive with a bf16 autocast; nothing is computed."""
    shape = shape_of(size)
    tokens = shape.block_size
    n = num_parameters(shape)
    models: dict[str, Callable[[], Any]] = {
        "reference": lambda: nanogpt_loop.Model(shape),
        "train.py": lambda: GPT(shape),
        "train.py, loss_chunk 2048": lambda: GPT(shape, loss_chunk=2048),
    }
    fits: dict[tuple[str, int], float] = {}
    for name, make in models.items():
        peaks = []
        for sequences in (3, 4):
            with FakeTensorMode(allow_non_fake_inputs=True):
                model, x = make(), torch.zeros(sequences, tokens, dtype=torch.int64)
                labels = (x,) if name == "reference" else (summed_loss, x)
                with PeakMemory() as memory, torch.autocast("cpu", torch.bfloat16):
                    model(x, *labels).backward()
            peaks.append(memory.peak)
        slope = peaks[1] - peaks[0]
        for budget in (24, 40):
            # Weights and two states, which exist before; gradients and bf16 copies are among the counted.
            fit = fits[name, budget] = (0.95e9 * budget - 12 * n - (peaks[0] - 3 * slope)) // slope
            what = f"{size}: {name} in {budget} GB, eager, {slope / 1e9:.2f} GB a sequence"
            goal = "≥ 1.5" if "chunk" in name else ""
            yield Row("memory", what, fit, "sequences", "reference", fit / fits["reference", budget], goal)


def data_loading(data: Path, device: torch.device) -> Iterator[Row]:
    """The host's time for a batch of sequences: offsets, windows, copy; against the step that uses them."""
    size = "125m" if device.type == "cuda" else "quickstart"
    keys = {"train.batch_size": 32, "train.micro_batch_size": 32, "train.compile": device.type == "cuda"}
    run = build(configure(size, "adamw", data, device, **keys), Place(0, 1, device))
    shape, tokens = run.config.model, run.tokens["train"]

    def read() -> None:
        offsets = window_offsets(1, 2, len(tokens), shape.block_size, 32)
        for tensor in read_windows(tokens, offsets, shape.block_size, shape.vocab_size):
            to_device(tensor, device)

    seconds = medians({"read": read, "step": stepper(run)}, device)
    ratio = seconds["read"] / seconds["step"]
    yield Row("data", f"{size}: reading 32 sequences", 1000 * seconds["read"], "ms", "a step", ratio, "< 0.005")


def start(data: Path) -> Iterator[Row]:
    """From the command to the end of the first step: a process of its own, eager, files in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/quickstart.toml"), "--run=sophia-g"]
        command += [f"--data.path={data}", "--train.max_steps=1", "--train.warmup_steps=0", "--train.eval_windows=1"]
        times = []
        for index in range(3):
            started = time.perf_counter()
            done = subprocess.run([*command, f"--train.out_dir={folder}/{index}"], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"train.py ended with {done.returncode}: {done.stderr.strip()[-200:]}")
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    yield Row("start", "train.py, one step, a checkpoint and the end", seconds, "s", "8 s", seconds / 8, "≤ 1.0")


def prepare(pattern: str, datasets_python: str) -> Iterator[Row]:
    """prepare.py against nanogpt_prepare.py, from the command to its end, both with a process a core; and files."""
    paths = sorted(glob.glob(pattern))
    cores = str(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        commands = {
            ours: [sys.executable, str(ROOT / "data/openwebtext/prepare.py"), "--files", pattern, "--out", str(ours)],
            theirs: [datasets_python, str(ROOT / "benchmarks/nanogpt_prepare.py"), str(theirs), cores, *paths],
        }
        seconds: dict[Path, list[float]] = {ours: [], theirs: []}
        for out in [ours, theirs] * 3:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            started = time.perf_counter()
            done = subprocess.run(commands[out], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{commands[out][1]} ended with {done.returncode}: {done.stderr.strip()[-200:]}")
            seconds[out].append(time.perf_counter() - started)
        splits = json.loads((ours / "meta.json").read_text())["splits"].values()
        size = {out: sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) for out in seconds}
    tokens = sum(split["tokens"] for split in splits)
    rates = {out: tokens / statistics.median(times) for out, times in seconds.items()}
    for name, out in (("prepare.py", ours), ("datasets.map", theirs)):
        what = f"{name}, {cores} processes, {tokens / 1e6:.1f}M tokens, {size[out] / 1e6:.0f} MB of files"
        goal = "≥ 2.5" if out == ours else ""
        yield Row("prepare", what, rates[out], "tokens/s", "datasets.map", rates[out] / rates[theirs], goal)
