"""What bench.py measures: one function per part, which yields the rows of its table."""

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

from benchmarks import nanogpt_loop
from benchmarks.peak_memory import PeakMemory
from data.batches import read_windows, window_offsets
from model import GPT, ModelConfig, summed_loss
from optimizers.build import make_optimizer
from optimizers.lion import Lion
from runtime.cli import UserError
from runtime.config import Config
from runtime.cost import activation_bytes, flops_per_token, num_parameters
from runtime.distributed import Ranks, resolve_number_format
from runtime.experiment import as_text, load_experiment
from runtime.metrics import peak_tflops
from runtime.run_folder import ROOT
from sophia import SophiaG
from train import Run, build_run, to_device, train_step, update_hessian

SIZES = ("30m", "125m", "355m", "770m")
SECONDS = 2.0  # of measurement per competitor, on average
GPU_BATCH = 120  # sequences per step on a GPU, a quarter of the paper's: a second instead of four
USABLE = 0.95  # share of a card's memory that PyTorch can allocate
# Weights, gradients and two states in fp32, and the weights' bf16 copies.
BYTES_PER_PARAMETER = 18


@dataclass(frozen=True)
class Row:
    """One measured number. `ratio` is to what `against` names, `goal` what it should be."""

    part: str
    what: str
    value: float
    unit: str
    against: str = ""
    ratio: float | None = None
    goal: str = ""


# ---- Helpers -------------------------------------------------------------------------------------


def medians(
    functions: dict[str, Callable[[], Any]],
    device: torch.device,
    seconds: float = SECONDS,
    rounds: int = 5,
) -> dict[str, float]:
    """Return the median seconds of a call of each function, after two calls to warm up.

    They take turns, so that a machine whose speed drifts favours none, for at least `rounds`
    rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
        function()

    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or min(map(len, times.values())) < rounds:
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


def configure(
    size: str, run: str, data: Path, device: torch.device, keys: dict[str, Any]
) -> Config:
    """Return the config of a size, or of the quickstart, on the benchmark's data."""
    name = size if size == "quickstart" else f"gpt2_{size}"
    keys = {"data.path": str(data), "train.device": device.type} | keys
    text = {key: as_text(value) for key, value in keys.items()}
    config = load_experiment(ROOT / f"configs/{name}.toml", run, text)
    return resolve_number_format(config, device)


def shape_of(size: str) -> ModelConfig:
    return configure(size, "adamw", Path("data"), torch.device("cpu"), {}).model


def build(config: Config, device: torch.device, ranks: Ranks | None = None) -> Run:
    tokens: dict[str, np.ndarray] = {}
    for split in ("train", "val"):
        tokens[split] = np.memmap(Path(config.data.path) / f"{split}.bin", "<u2", "r")
    return build_run(config, ranks or Ranks(), device, tokens)


def stepper(run: Run) -> Callable[[], None]:
    """Return a function that makes the next step without an estimate."""
    interval = run.config.hessian_interval or 10**9
    step = 0

    def make_step() -> None:
        nonlocal step
        step += 1
        if step % interval == 0:
            step += 1
        train_step(run, step)

    return make_step


# ---- Optimizer -----------------------------------------------------------------------------------


def optimizer_steps(size: str, device: torch.device) -> Iterator[Row]:
    """Measure only the optimizers' steps, on fp32 parameters and with found_inf set as in training.

    Their memory traffic is compared with a copy's bandwidth.
    """
    with torch.device("meta"):
        shapes = [p.shape for p in GPT(shape_of(size)).parameters()]
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(0.02 * torch.randn(shape, device=device))
        p.grad = 1e-3 * torch.randn_like(p)
        params.append(p)
    n = sum(p.numel() for p in params)

    # Each optimizer with the bytes that it must move per parameter.
    sophia = SophiaG(params, fused=True)
    optimizers: dict[str, tuple[Any, int]] = {
        "AdamW, fused": (torch.optim.AdamW(params, fused=True), 28),
        "Lion, fused": (Lion(params, fused=True), 20),
        "Sophia-G, fused": (sophia, 24),
    }
    if size == "125m":  # for larger sizes the states of all would not fit on a card
        optimizers["Sophia-G, multi-tensor"] = (SophiaG(params, foreach=True), 24)
        optimizers["Sophia-G, per tensor"] = (SophiaG(params, foreach=False), 24)

    source = torch.randn(min(n, 250_000_000), device=device)
    target = torch.empty_like(source)
    found_inf = torch.zeros((), device=device)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    for name, (optimizer, _) in optimizers.items():
        optimizer.found_inf = found_inf
        calls[name] = optimizer.step
    calls["average"] = lambda: sophia.update_hessian_from_grad(480, found_inf)
    seconds = medians(calls, device, SECONDS / 2)

    bandwidth = 8 * source.numel() / seconds["copy"]
    yield Row("optimizer", f"{size}: copy", bandwidth / 1e9, "GB/s")
    goals = {"Lion, fused": "≤ 0.80", "Sophia-G, fused": "≤ 0.95"}
    if device.type == "cpu":
        goals = {"Lion, fused": "≤ 1.0", "Sophia-G, fused": "≤ 1.15"}
    for name, (_, moved) in optimizers.items():
        share = moved * n / seconds[name] / bandwidth
        what = f"{size}: {name} ({share:.0%} of the copy's bandwidth)"
        ratio = seconds[name] / seconds["AdamW, fused"]
        milliseconds = 1000 * seconds[name]
        goal = goals.get(name, "")
        yield Row("optimizer", what, milliseconds, "ms", "AdamW, fused", ratio, goal)

    share = 12 * n / seconds["average"] / bandwidth
    milliseconds = 1000 * seconds["average"]
    what = f"{size}: average of estimates"
    yield Row("optimizer", what, milliseconds, "ms", "copy's bandwidth", share, "≥ 0.8")


# ---- Trainer -------------------------------------------------------------------------------------


def gpu_trainer(
    size: str, micros: list[int] | None, data: Path, device: torch.device
) -> Iterator[Row]:
    """Measure tokens/s, MFU and peak memory, and derive what would fit smaller cards.

    The competitors run one after the other, because each one's memory is measured.
    """
    shape = shape_of(size)
    flops, peak = flops_per_token(shape), peak_tflops(device)
    best: dict[str, float] = {}
    memories: dict[str, dict[int, int]] = {}
    chunks = {"reference": None, "train.py": 0, "train.py, loss_chunk 8192": 8192}
    for name, chunk in chunks.items():
        memories[name] = {}
        for micro in micros or [largest_micro_batch(shape, device)]:
            measured = rate_and_memory(size, chunk, micro, data, device)
            if measured is None:
                print(f"{size}: {name}, micro-batch {micro}: out of memory", file=sys.stderr)
                continue
            rate, memory = measured
            best[name] = max(best.get(name, 0), rate)
            memories[name][micro] = memory

            mfu = f"{rate * flops / peak / 1e12:.1%}" if peak else "unknown"
            what = f"{size}: {name}, micro-batch {micro}, {memory / 1e9:.1f} GB, MFU {mfu}"
            ratio = rate / best["reference"] if "reference" in best else None
            goal = "≥ 1.0" if name == "train.py" else ""
            yield Row("trainer", what, rate, "tokens/s", "reference", ratio, goal)
    yield from largest_that_fit(size, memories)


def largest_that_fit(size: str, memories: dict[str, dict[int, int]]) -> Iterator[Row]:
    """Derive the largest micro-batches for smaller cards from the memory of two or more.

    Args:
        size: of the model.
        memories: peak bytes, by competitor and micro-batch.
    """
    reference: dict[int, float] = {}
    for name, points in memories.items():
        if len(points) < 2:
            continue
        smaller, larger = min(points), max(points)
        per_sequence = (points[larger] - points[smaller]) / (larger - smaller)
        constant = points[smaller] - smaller * per_sequence
        for budget in (24, 40):
            fit = max((USABLE * 1e9 * budget - constant) // per_sequence, 0)
            if name == "reference":
                reference[budget] = fit
            ratio = fit / reference[budget] if reference.get(budget) else None
            goal = "≥ 1.15" if "chunk" in name and size == "125m" else ""
            what = f"{size}: {name} in {budget} GB"
            yield Row("memory", what, fit, "sequences", "reference", ratio, goal)


def rate_and_memory(
    size: str, chunk: int | None, micro: int, data: Path, device: torch.device
) -> tuple[float, int] | None:
    """Return tokens/s and peak bytes of train.py, or None if it does not fit.

    Args:
        size: of the model.
        chunk: train.loss_chunk; None measures the reference loop instead.
        micro: sequences per micro-batch.
        data: folder with token files.
        device: a GPU.
    """
    # In a function of its own, so that what the last measurement left can be freed.
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    shape = shape_of(size)
    try:
        if chunk is None:
            step = nanogpt_loop.make_reference_step(
                shape, data, GPU_BATCH, micro, device, compiled=True
            )
        else:
            keys = {
                "train.batch_size": GPU_BATCH,
                "train.micro_batch_size": micro,
                "train.loss_chunk": chunk,
            }
            step = stepper(build(configure(size, "adamw", data, device, keys), device))
        seconds = medians({"step": step}, device)["step"]
    except torch.OutOfMemoryError:
        return None
    return GPU_BATCH * shape.block_size / seconds, torch.cuda.max_memory_allocated()


def largest_micro_batch(shape: ModelConfig, device: torch.device) -> int:
    """Return the largest divisor of GPU_BATCH that should fit in two thirds of the memory."""
    _, total = torch.cuda.mem_get_info(device)
    room = 2 / 3 * total - BYTES_PER_PARAMETER * num_parameters(shape)
    fit = max(int(room / activation_bytes(shape, "bfloat16", True, 1)), 1)
    return max(micro for micro in range(1, min(fit, GPU_BATCH) + 1) if GPU_BATCH % micro == 0)


# ---- Estimates, data parallelism, memory ---------------------------------------------------------


def estimates(size: str, run_name: str, data: Path, device: torch.device) -> Iterator[Row]:
    """Measure T(step) without an estimate, T(Hessian), and what one in ten steps adds.

    Gauss-Newton-Bartlett uses half of the batch (240 of 480), Hutchinson a fifteenth (32 of 480).
    """
    batch = micro = 30
    if device.type == "cuda":
        batch, micro = GPU_BATCH, largest_micro_batch(shape_of(size), device)
    sequences = batch // 2 if run_name == "sophia-g" else batch // 15
    keys = {
        "train.batch_size": batch,
        "train.micro_batch_size": micro,
        "train.compile": True,
        "optimizer.hessian_batch_size": sequences,
    }
    run = build(configure(size, run_name, data, device, keys), device)
    calls = {"step": stepper(run), "Hessian": lambda: update_hessian(run, 0)}
    seconds = medians(calls, device, 2 * SECONDS)

    added = seconds["Hessian"] / 10 / seconds["step"]
    goal = "≤ 0.035 (H100: 0.045)" if device.type == "cuda" else "≤ 0.03"
    if run_name == "sophia-g":
        goal = "≤ 0.053"
    what = f"{size}: {run_name}, {sequences} of {batch} sequences"
    milliseconds = {name: 1000 * value for name, value in seconds.items()}
    yield Row("estimates", f"{what}, T(step)", milliseconds["step"], "ms")
    name = f"{what}, T(Hessian)"
    yield Row("estimates", name, milliseconds["Hessian"], "ms", "10 steps", added, goal)


def ddp_order(data: Path, ranks: Ranks, device: torch.device) -> Iterator[Row]:
    """Measure a step of all ranks with DDP around the compiled model, and compiled around DDP."""
    size = "125m" if device.type == "cuda" else "quickstart"
    keys = {
        "train.batch_size": 32 * ranks.world_size,
        "train.micro_batch_size": 32,
        "train.compile": True,
    }
    run = build(configure(size, "adamw", data, device, keys), device, ranks)

    model = GPT(run.config.model).to(device)
    other = DistributedDataParallel(model, gradient_as_bucket_view=True)
    compiled: Any = torch.compile(other, dynamic=False)
    optimizer = make_optimizer(run.config, model)
    other_run = replace(run, model=model, parallel=compiled, optimizer=optimizer)

    calls = {
        "DDP(compile(model)), as in train.py": stepper(run),
        "compile(DDP(model))": stepper(other_run),
    }
    # A fixed number of rounds, because the ranks must make the same calls.
    seconds = medians(calls, device, seconds=0, rounds=40)
    for name, value in seconds.items():
        ratio = value / seconds["compile(DDP(model))"]
        what = f"{size} on {ranks.world_size} ranks: {name}"
        yield Row("ddp", what, 1000 * value, "ms", "the other", ratio)


def counted_memory(size: str) -> Iterator[Row]:
    """Derive the largest micro-batches from the tensors that eager mode keeps alive in bf16.

    They are counted on tensors without storage; nothing is computed.
    """
    shape = shape_of(size)
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
                model = make()
                x = torch.zeros(sequences, shape.block_size, dtype=torch.int64)
                labels = (x,) if name == "reference" else (summed_loss, x)
                with PeakMemory() as memory, torch.autocast("cpu", torch.bfloat16):
                    model(x, *labels).backward()
            peaks.append(memory.peak)

        per_sequence = peaks[1] - peaks[0]
        constant = peaks[0] - 3 * per_sequence
        for budget in (24, 40):
            # Weights and two states exist before; gradients and bf16 copies are counted.
            room = USABLE * 1e9 * budget - 12 * n - constant
            fits[name, budget] = max(room // per_sequence, 0)
            what = f"{size}: {name} in {budget} GB, eager, {per_sequence / 1e9:.2f} GB per sequence"
            fit, reference = fits[name, budget], fits["reference", budget]
            goal = "≥ 1.5" if "chunk" in name else ""
            ratio = fit / reference if reference else None
            yield Row("memory", what, fit, "sequences", "reference", ratio, goal)


# ---- Data and start ------------------------------------------------------------------------------


def data_loading(data: Path, device: torch.device) -> Iterator[Row]:
    """Measure the time to read a batch (offsets, windows, copy) against the step that uses it."""
    size = "125m" if device.type == "cuda" else "quickstart"
    keys = {
        "train.batch_size": 32,
        "train.micro_batch_size": 32,
        "train.compile": device.type == "cuda",
    }
    run = build(configure(size, "adamw", data, device, keys), device)
    shape, tokens = run.config.model, run.tokens["train"]

    def read() -> None:
        offsets = window_offsets(1, 2, len(tokens), shape.block_size, 32)
        for tensor in read_windows(tokens, offsets, shape.block_size, shape.vocab_size):
            to_device(tensor, device)

    seconds = medians({"read": read, "step": stepper(run)}, device)
    ratio = seconds["read"] / seconds["step"]
    what = f"{size}: reading 32 sequences"
    yield Row("data", what, 1000 * seconds["read"], "ms", "a step", ratio, "< 0.005")


def start(data: Path) -> Iterator[Row]:
    """Measure train.py from the command to its end, with one eager step and files in the cache."""
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/quickstart.toml")]
    command += ["--run=sophia-g", f"--data.path={data}", "--train.max_steps=1"]
    command += ["--train.warmup_steps=0", "--train.eval_windows=1"]
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(3):
            out = f"--train.out_dir={folder}/{index}"
            times.append(time_command([*command, out]))
    seconds = statistics.median(times)
    what = "train.py, one step, a checkpoint and the end"
    yield Row("start", what, seconds, "s", "8 s", seconds / 8, "≤ 1.0")


def prepare(pattern: str) -> Iterator[Row]:
    """Measure prepare.py with one process and with one per core against nanogpt_prepare.py."""
    paths = sorted(glob.glob(pattern))
    cores = str(os.cpu_count())
    ours = [str(ROOT / "data/openwebtext/prepare.py"), "--files", pattern, "--out"]
    theirs = str(ROOT / "benchmarks/nanogpt_prepare.py")
    reference = f"datasets.map, {cores} processes"

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        commands = {
            "prepare.py, 1 process": [*ours, str(out), "--workers=1"],
            f"prepare.py, {cores} processes": [*ours, str(out), f"--workers={cores}"],
            reference: [theirs, str(out), cores, *paths],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        sizes = {}
        for name in [*commands] * 3:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            seconds[name].append(time_command([sys.executable, *commands[name]]))
            sizes[name] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            if name != reference:
                meta = json.loads((out / "meta.json").read_text())

    tokens = sum(split["tokens"] for split in meta["splits"].values())
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        what = f"{name}, {tokens / 1e6:.1f}M tokens, {sizes[name] / 1e6:.0f} MB of files"
        goal = "≥ 2.5" if name == f"prepare.py, {cores} processes" else ""
        yield Row("prepare", what, rate, "tokens/s", "datasets.map", rate / rates[reference], goal)


def time_command(command: list[str]) -> float:
    """Return the seconds that a command takes.

    Raises:
        UserError: if it fails.
    """
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command[1]} exited with {done.returncode}: {done.stderr.strip()[-200:]}")
    return time.perf_counter() - started
