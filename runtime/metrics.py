"""What a run writes about itself: metrics.jsonl always, wandb and TensorBoard if asked, a bar or plain lines.

metrics.jsonl has two kinds of lines. After update number `step`: {"step", "loss", "lr", "grad_norm", "clipped",
"step_ms", …}, with "hessian_ms" where an estimate was made, "skipped" where loss or gradient was no number (null) and
the step not applied, and throughput and Sophia's statistics on the last line of a log interval. After validation:
{"step", "val_loss"}. Both have "tokens" (seen so far) and "seconds" (spent in steps and estimates, compilation
included; validation and checkpoints are not).
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.token_files import read_meta
from runtime.cli import UserError
from runtime.config import Config
from runtime.files import whole_file
from runtime.trackers import finish_wandb, for_wandb, start_tensorboard, start_wandb, succeeds, write_scalars

# Dense bf16 tensor-core peaks in TFLOP/s, from NVIDIA's data sheets; the first name that the device's contains counts.
# A device that is not listed gets no MFU rather than a wrong one.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "RTX A6000": 154.8,
    "RTX A5000": 111.1,
    "RTX 3090": 71.0,
}


def peak_tflops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def timestamp(device: torch.device) -> Any:
    """A mark in the device's stream of work, for `milliseconds_between`; on CUDA setting one does not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds_between(start: Any, end: Any) -> float:
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def throughput(
    records: list[dict[str, Any]], tokens: int, flops: float | None, device: torch.device, world_size: int
) -> dict[str, float]:
    """Of a log interval: tokens/s with the estimates counted in, MFU of the plain steps, peak memory of this rank.

    `tokens` and `flops` are those of a step over all ranks; flops is None where the peaks do not apply (fp32).
    """
    step_seconds = sum(r["step_ms"] for r in records) / 1000
    seconds = sum(_all_ms(r) for r in records) / 1000
    numbers = {"tokens_per_second": len(records) * tokens / seconds}
    peak = peak_tflops(device)
    if peak and flops:
        numbers["mfu"] = len(records) * flops / step_seconds / (peak * 1e12 * world_size)
    if device.type == "cuda":
        numbers["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return numbers


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What a reader needs to repeat the run: commit, versions, device, command."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
    return {
        "commit": commit or None,
        "uncommitted_changes": bool(changed),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": name,
        "world_size": world_size,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def read_environment(folder: Path) -> dict[str, Any]:
    """A run's environment.json, or {} where there is none. Raises UserError for a damaged one."""
    path = folder / "environment.json"
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(read, dict) or not isinstance(read.get("data", {}), dict):
            raise ValueError("no object")
        return read
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged; remove it, what it says is lost, the run is not") from None


def data_meta(checkpoint: Path, config: Config) -> dict[str, Any]:
    """What the data's meta.json said when the run was trained, else what it says now; {} where there is none.

    `checkpoint` is a run's folder, or a file in it.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return read_environment(folder).get("data") or read_meta(Path(config.data.path))


def tokenizer_name(checkpoint: Path, config: Config) -> str:
    """Of the data that the run was trained on; raises UserError where that cannot be."""
    meta = data_meta(checkpoint, config)
    name, size = meta.get("tokenizer", "gpt2"), meta.get("vocab_size", 50257)
    if size != config.model.text_vocab_size:
        raise UserError(
            f"{checkpoint}: was trained on {config.model.text_vocab_size} tokens, and no environment.json or "
            f"{config.data.path}/meta.json says which; put one of them back"
        )
    return name


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, null as NaN. A damaged line (torn, when its process was killed) is left out."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = {key: math.nan if value is None else value for key, value in json.loads(line).items()}
            numeric = all(isinstance(value, int | float) for value in record.values())
            if not numeric or not isinstance(record["step"], int) or not {"tokens", "seconds"} <= record.keys():
                raise ValueError("not a line of ours")
            records.append(record)
        except (ValueError, KeyError, AttributeError, RecursionError):
            print(f"warning: {path}, line {number}: damaged, left out", file=sys.stderr)
    return records


def to_line(record: dict[str, Any]) -> str:
    """One line of metrics.jsonl. JSON has no NaN and no infinity: they become null."""
    return (
        json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}) + "\n"
    )


class RunLog:
    """The one place that a run's numbers go through, on rank 0."""

    def __init__(self, config: Config, environment: dict[str, Any], step: int, validated_step: int) -> None:
        """Open the run's folder; lines beyond the checkpoint's `step` or `validated_step` are dropped."""
        run_dir = config.run_dir
        resolved = config.model_dump()
        for name, content in {"config.json": resolved, "environment.json": environment}.items():
            with whole_file(run_dir / name) as file:
                file.write((json.dumps(content, indent=2) + "\n").encode())
        path = run_dir / "metrics.jsonl"
        kept = read_metrics(path) if path.exists() else []
        kept = [r for r in kept if r["step"] <= (validated_step if "val_loss" in r else step)]
        if missing := sorted(set(range(1, step + 1)) - {r["step"] for r in kept if "loss" in r}):
            lost = f"{len(missing)} of the steps from {missing[0]} to {missing[-1]} are lost"
            print(f"warning: {path}: {lost}", file=sys.stderr)
        with whole_file(path) as file:
            file.write("".join(map(to_line, kept)).encode())
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self.max_steps = config.train.max_steps
        self.path, self.config = path, config
        self.wandb = start_wandb(config, run_dir, resolved | {"environment": environment}, kept)
        self.tensorboard = start_tensorboard(config, kept)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=self.max_steps, initial=step, unit="step", desc=config.run, disable=not terminal)

    def steps(self, records: list[dict[str, Any]]) -> None:
        """Write one log interval, a record a step; the last one goes to wandb and to the console too."""
        self.file.writelines(to_line(r) for r in records)
        self.file.flush()
        last = records[-1]
        self._mirror(last)
        if skipped := [r["step"] for r in records if r.get("skipped")]:
            self.message(f"steps skipped, because their loss or gradient was no number: {', '.join(map(str, skipped))}")
        self.bar.update(last["step"] - self.bar.n)
        self.bar.set_postfix_str(f"loss {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s")
        if self.bar.disable:
            left = (self.max_steps - last["step"]) * sum(_all_ms(r) for r in records) / len(records) / 1000
            print(
                f"step {last['step']}/{self.max_steps}  loss {last['loss']:.4f}  lr {last['lr']:.2e}  "
                f"{last['tokens_per_second']:,.0f} tokens/s  left {time_left(left)}",
                flush=True,
            )

    def validation(self, record: dict[str, Any]) -> None:
        self.file.write(to_line(record))
        self.file.flush()
        self._mirror(record)
        self.message(f"step {record['step']}/{self.max_steps}  validation loss {record['val_loss']:.4f}")

    def _mirror(self, record: dict[str, Any]) -> None:
        self._with_wandb(lambda run: run.log(for_wandb(self.config, record), step=record["step"]))
        if self.tensorboard:
            write_scalars(self.tensorboard, record)

    def _with_wandb(self, call: Callable[[Any], None]) -> None:
        """Call with wandb's run, if there is one. Where that fails, training goes on without it."""
        if self.wandb and not succeeds(lambda: call(self.wandb)):
            self.wandb = None

    def message(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()
        self.bar.close()
        self._with_wandb(lambda run: finish_wandb(run, read_metrics(self.path)))
        if self.tensorboard:
            self.tensorboard.close()


def _all_ms(record: dict[str, Any]) -> float:
    return record["step_ms"] + record.get("hessian_ms", 0.0)


def time_left(seconds: float) -> str:
    """1 d 02:03:04 as a person reads it."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock
