"""What a run logs: metrics.jsonl, a progress bar or plain lines, and trackers.

metrics.jsonl has two kinds of lines. One per step: {"step", "loss", "lr", "grad_norm", "clipped",
"step_ms", …}, where `step` counts from 1. It has "hessian_ms" if the Hessian was estimated,
and "skipped" if the loss or the gradient was not finite (null) and the update was not applied. The
last line of a log interval also has the throughput and Sophia's statistics. And one per validation:
{"step", "val_loss"}. Both have "tokens" (seen so far) and "seconds" (spent in steps and estimates,
including compilation but not validation or checkpoints).
"""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from runtime.config import Config
from runtime.cost import flops_per_token
from runtime.files import naming, write_json, write_text
from runtime.run_folder import CONFIG, ENVIRONMENT, METRICS, read_metrics, to_line
from runtime.trackers import TensorBoardTracker, Tracker, WandbTracker

# Dense bf16 tensor-core peaks in TFLOP/s, from NVIDIA's data sheets, by a pattern of the whole
# name after "NVIDIA". Laptop, D and MIG variants, and cards not listed, get no MFU rather than a
# wrong one.
PEAK_TFLOPS = {
    r"B200": 2250.0,
    r"H200": 989.0,
    r"H100 80GB HBM3": 989.0,
    r"H100 NVL": 835.0,
    r"H100 PCIe": 756.0,
    r"A100-(SXM4|PCIE)-(40|80)GB|A100 80GB PCIe": 312.0,
    r"L40S": 362.0,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 3090": 71.0,
    r"RTX A6000": 154.8,
    r"RTX A5000": 111.1,
}


def peak_tflops(device: torch.device) -> float | None:
    """Return the device's bf16 peak in TFLOP/s, or None if it is not known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
        for pattern, peak in PEAK_TFLOPS.items():
            if re.fullmatch(pattern, name):
                return peak
    return None


def throughput(
    records: list[dict[str, Any]], config: Config, device: torch.device, world_size: int
) -> dict[str, float]:
    """Return a log interval's tokens/s, MFU where the peak is known, and this rank's peak memory.

    Tokens/s include the time of the estimates, MFU does not.
    """
    step_seconds = sum(record["step_ms"] for record in records) / 1000
    seconds = sum(_total_ms(record) for record in records) / 1000
    tokens = len(records) * config.tokens_per_step
    numbers = {"tokens_per_second": tokens / seconds}

    peak = peak_tflops(device)
    if peak and config.train.dtype != "float32":  # the peaks are those of 16-bit tensor cores
        flops = tokens * flops_per_token(config.model)
        numbers["mfu"] = flops / step_seconds / (peak * 1e12 * world_size)
    if device.type == "cuda":
        numbers["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return numbers


class RunLog:
    """Writes a run's numbers. Only rank 0 has one; create it with :meth:`open`."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        world_size: int,
        file: TextIO,
        trackers: list[Tracker],
        bar: tqdm,
    ) -> None:
        self.config = config
        self.device = device
        self.world_size = world_size
        self.file = file
        self.trackers = trackers
        self.bar = bar
        self.val_loss = math.nan  # the last one, for the bar

    @classmethod
    def open(
        cls,
        config: Config,
        device: torch.device,
        environment: dict[str, Any],
        step: int,
        validated_step: int,
    ) -> RunLog:
        """Write config.json and environment.json, and continue metrics.jsonl.

        Lines after the checkpoint's `step` or `validated_step` are dropped; they come again.
        """
        folder = config.run_dir
        write_json(folder / CONFIG, config.model_dump())
        write_json(folder / ENVIRONMENT, environment)

        path = folder / METRICS
        records = []
        for record in read_metrics(path) if path.exists() else []:
            if record["step"] <= (validated_step if "val_loss" in record else step):
                records.append(record)
        _warn_about_gaps(str(path), records, step)
        write_text(path, "".join(to_line(record) for record in records))

        trackers: list[Tracker] = []
        if config.wandb.mode != "disabled":
            trackers.append(WandbTracker(config, folder, environment, records))
        if config.train.tensorboard:
            trackers.append(TensorBoardTracker(folder, records))

        is_terminal = sys.stderr.isatty()
        bar = tqdm(
            total=config.train.max_steps,
            initial=step,
            unit="step",
            desc=config.run,
            disable=not is_terminal,
            bar_format="{desc} {n_fmt}/{total_fmt} {postfix}",
        )
        file = path.open("a", encoding="utf-8")
        return cls(config, device, environment["world_size"], file, trackers, bar)

    def steps(self, records: list[dict[str, Any]]) -> None:
        """Write a log interval, one record per step. Adds the throughput to the last record."""
        last = records[-1]
        last |= throughput(records, self.config, self.device, self.world_size)
        self._write(records)
        for tracker in self.trackers:
            for record in records:
                tracker.log(record)

        skipped = [str(record["step"]) for record in records if record.get("skipped")]
        if skipped:
            self.message(f"skipped steps with a non-finite loss or gradient: {', '.join(skipped)}")

        # A line, and on a terminal the bar below it.
        max_steps = self.config.train.max_steps
        seconds_per_step = sum(_total_ms(record) for record in records) / len(records) / 1000
        left = time_left((max_steps - last["step"]) * seconds_per_step)
        numbers = f"loss {last['loss']:.4f}  lr {last['lr']:.2e}"
        speed = f"{last['tokens_per_second']:,.0f} tokens/s  left {left}"
        self.message(f"step {last['step']}/{max_steps}  {numbers}  {speed}")
        memory = f"  {last['memory_gb']:.1f} GB" if "memory_gb" in last else ""
        self.bar.update(last["step"] - self.bar.n)
        self.bar.set_postfix_str(f"{numbers}  val {self.val_loss:.4f}  {speed}{memory}")

    def validation(self, step: int, seconds: float, val_loss: float) -> None:
        """Write the loss of a validation after `step` updates."""
        tokens = step * self.config.tokens_per_step
        record = {"step": step, "tokens": tokens, "seconds": seconds, "val_loss": val_loss}
        self._write([record])
        for tracker in self.trackers:
            tracker.log(record)
        self.val_loss = val_loss
        self.message(f"step {step}/{self.config.train.max_steps}  validation loss {val_loss:.4f}")

    def _write(self, records: list[dict[str, Any]]) -> None:
        with naming(Path(self.file.name)):
            self.file.writelines(to_line(record) for record in records)
            self.file.flush()

    def message(self, text: str) -> None:
        """Print a line without disturbing the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def sync(self) -> None:
        """Make sure that everything written so far is on the disk."""
        with naming(Path(self.file.name)):
            os.fsync(self.file.fileno())

    def close(self, exit_status: int) -> None:
        """Finish metrics.jsonl and the trackers, which may show the run's exit status."""
        self.sync()
        self.file.close()
        self.bar.close()
        for tracker in self.trackers:
            tracker.close(exit_status)


def _warn_about_gaps(path: str, records: list[dict[str, Any]], step: int) -> None:
    logged = {record["step"] for record in records if "loss" in record}
    missing = sorted(set(range(1, step + 1)) - logged)
    if missing:
        lost = f"{len(missing)} of the steps from {missing[0]} to {missing[-1]} are missing"
        print(f"warning: {path}: {lost}", file=sys.stderr)


def _total_ms(record: dict[str, Any]) -> float:
    return record["step_ms"] + record.get("hessian_ms", 0.0)


def time_left(seconds: float) -> str:
    """Return a duration as people read it, such as "1 d 02:03:04"."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock
