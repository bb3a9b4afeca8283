"""Train GPT-2 with AdamW, Lion, Sophia-G, Sophia-H or another. Whatever is not the optimizer is shared by all of them.

    python train.py configs/quickstart.toml --run=sophia-g
    torchrun --standalone --nproc_per_node=8 -- train.py configs/gpt2_125m.toml --run=sophia-g
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 -- train.py …

Read it from top to bottom; functions stand in the order in which they are called. Here is a run from its first to its
last step: built or restored, logged, validated, saved. What a step does is in step.py.
"""

from __future__ import annotations

import gc
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.batches import validation_windows
from data.token_files import fingerprint, open_tokens, read_meta
from model import GPT, flops_per_token, summed_loss
from optimizers import build as optimizers
from runtime import checkpoint, hugging_face, metrics
from runtime import trackers as mirrors
from runtime.cli import UserError, reason, run_main
from runtime.config import Config
from runtime.distributed import Place, agree, catch_signals, find_place, leave, start_process_group
from runtime.experiment import parse_command_line
from runtime.files import locked
from runtime.plan import check_divisible, print_plan
from step import Run, autocast, make_step, to_device


@dataclass
class Progress:
    """What a checkpoint remembers beside the weights and the optimizer's state."""

    step: int = 0  # updates made
    seconds: float = 0.0  # spent in updates and estimates
    validated_step: int = -1
    val_loss: float = math.inf
    best_loss: float = math.inf  # of the validated checkpoints
    best_step: int = -1
    bad_steps: int = 0  # the last ones in a row whose loss or gradient was no number


def main() -> None:
    config, flags = parse_command_line(sys.argv[1:])
    place = find_place(config)
    check_divisible(config, place.world_size)
    if flags.dry_run:
        if place.rank == 0:
            print_plan(config, place.world_size, place.device.type)
        return
    mirrors.check_installed(config)
    folder, shape = Path(config.data.path), config.model
    tokens = {split: open_tokens(folder, split, shape.text_vocab_size, shape.block_size) for split in ("train", "val")}
    saved = checkpoint.open_run(config, flags.resume, tokens)
    if saved and saved["validated_step"] == config.train.max_steps:
        print(f"{config.run_dir}: finished already, {saved['step']} steps")
        return
    start_process_group(place)
    try:
        stopped_by = begin(config, place, tokens, saved)
        agree(0)  # a barrier: nobody leaves the group while another still needs it
    finally:
        gc.collect()  # what uses the process group has to go before it: left to the interpreter's end, it can abort
        if dist.is_initialized():
            dist.destroy_process_group()
    # The shell's own rule after a signal: whoever comes next must not take this for a finished run.
    leave(place, status=128 + stopped_by if stopped_by else 0)


def begin(config: Config, place: Place, tokens: dict[str, np.ndarray], saved: dict[str, Any] | None) -> int:
    """Build the run, or what the checkpoint `saved` holds of it, and train it; only rank 0 writes to its folder."""
    run = build_run(config, place, tokens)
    progress = restore(run, saved)
    if place.rank != 0:
        return train(run, progress, None)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with locked(config.run_dir):
        checkpoint.set_aside(config.run_dir, beyond=progress.step)
        data = {"data": read_meta(Path(config.data.path))}
        environment = metrics.environment(place.device, place.world_size) | data
        return train(run, progress, metrics.RunLog(config, environment, progress.step, progress.validated_step))


def train(run: Run, progress: Progress, log: metrics.RunLog | None) -> int:
    """The training loop: log, validate, save, step. Rank 0 has the log. Returns the signal that ended it, or 0."""
    config = run.config
    signals = catch_signals()
    saved_at = (progress.step, progress.validated_step)
    pending: list[dict[str, Any]] = []  # steps whose numbers are still on the device

    while True:
        stopping = agree(signals[0] if signals else 0)
        last = progress.step == config.train.max_steps
        saving = stopping or last or progress.step % config.train.checkpoint_interval == 0
        if pending and (saving or progress.step % config.train.log_interval == 0):
            write_steps(run, pending, progress, log)
            pending.clear()
        validating = (last or progress.step % config.train.eval_interval == 0) and not stopping
        if validating and progress.validated_step < progress.step:
            validate(run, progress, log)
        if saving and progress.step > 0 and (progress.step, progress.validated_step) != saved_at:
            if is_finite(run, progress):
                save(run, progress, log)
                saved_at = (progress.step, progress.validated_step)
            elif log:
                log.message(f"step {progress.step}: not saved, because the weights or the last loss are no numbers")
        if stopping or last:
            break
        pending.append(make_step(run, progress.step))
        progress.step += 1

    if log:
        if stopping:
            log.message(f"stopped by a signal after step {progress.step}; the same command with --resume continues")
        log.close()
    return stopping


def build_run(config: Config, place: Place, tokens: dict[str, np.ndarray]) -> Run:
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    torch.manual_seed(config.train.seed)
    # Initialised on the CPU: the same weights for every device.
    model = GPT(config.model, config.train.loss_chunk).to(place.device)
    forward: Any = torch.compile(model, dynamic=False) if config.train.compile else model
    parallel = forward
    if place.world_size > 1:
        # Around the compiled model, so that it is one graph; the buckets that are averaged are the gradients.
        devices = [place.device.index] if place.device.type == "cuda" else None
        parallel = DistributedDataParallel(forward, device_ids=devices, gradient_as_bucket_view=True)
    scaler = torch.amp.GradScaler(place.device.type, enabled=config.train.dtype == "float16")
    return Run(config, place, tokens, model, forward, parallel, optimizers.make_optimizer(config, model), scaler)


def restore(run: Run, saved: dict[str, Any] | None) -> Progress:
    if saved is None:
        if run.config.train.init_from:
            start_from(run, run.config.train.init_from)
        return Progress()
    try:
        load_states(run, saved)
        progress = Progress(**{key: saved[key] for key in asdict(Progress())})
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        newest = checkpoint.checkpoints(run.config.run_dir)[-1]
        raise UserError(f"{newest}: not a checkpoint of this run ({reason(error)}); remove it") from None
    saved.clear()  # or its copy of weights and states would stay in memory as long as main() runs
    return progress


def start_from(run: Run, source: str) -> None:
    """Weights in Hugging Face's format, which rank 0 reads."""
    if run.place.rank == 0:
        hugging_face.load_weights(run.model, source)
    if run.place.world_size > 1:
        for weight in run.model.state_dict().values():
            dist.broadcast(weight, src=0)


def load_states(run: Run, saved: dict[str, Any]) -> None:
    run.model.load_state_dict(saved["model"])
    optimizers.load_state(run.optimizer, run.model, saved["optimizer"])
    run.scaler.load_state_dict(saved["scaler"])


def write_steps(run: Run, pending: list[dict[str, Any]], progress: Progress, log: metrics.RunLog | None) -> None:
    """Fetch the numbers of the steps since the last time (the only wait for the device) and log them.

    Raises UserError after max_bad_steps in a row whose loss or gradient was no number.
    """
    losses, grad_norms = (torch.stack([step[key] for step in pending]).tolist() for key in ("loss", "grad_norm"))
    config = run.config
    tokens = config.train.batch_size * config.model.block_size
    records = []
    for step, loss, grad_norm in zip(pending, losses, grad_norms, strict=True):
        bad = not math.isfinite(loss + grad_norm)
        progress.bad_steps = progress.bad_steps + 1 if bad else 0
        started, estimated, ended = step["timestamps"]
        record = {"step": step["step"], "loss": loss, "lr": step["lr"], "grad_norm": grad_norm}
        record["clipped"] = 0 < config.train.grad_clip < grad_norm
        record["step_ms"] = metrics.milliseconds_between(estimated, ended)
        if estimated is not started:
            record["hessian_ms"] = metrics.milliseconds_between(started, estimated)
        if bad:
            record["skipped"] = True
        progress.seconds += (record["step_ms"] + record.get("hessian_ms", 0.0)) / 1000
        records.append(record | {"tokens": step["step"] * tokens, "seconds": progress.seconds})
    statistics = optimizers.sophia_statistics(run.optimizer) if config.optimizer.is_sophia else {}
    if log:
        flops = flops_per_token(config.model) * tokens if config.train.dtype != "float32" else None
        records[-1] |= metrics.throughput(records, tokens, flops, run.place.device, run.place.world_size)
        records[-1] |= statistics
        log.steps(records)
    if progress.bad_steps >= config.train.max_bad_steps:
        raise UserError(
            f"{config.run_dir}: no finite loss or gradient in {progress.bad_steps} steps up to {progress.step}; "
            f"none was applied, and no checkpoint has such weights. Begin again in another train.out_dir with a lower "
            f"optimizer.lr, a longer warm-up, float32, or (Sophia) a larger rho"
        )


@torch.no_grad()
def validate(run: Run, progress: Progress, log: metrics.RunLog | None) -> None:
    """Mean loss over the validation windows, the same for every run, shared out over the ranks."""
    config, place = run.config, run.place
    sums, counts = [torch.zeros((), device=place.device)], 0
    for x, y in validation_windows(
        run.tokens["val"],
        config.model,
        config.train.eval_windows,
        config.train.micro_batch_size,
        place.rank,
        place.world_size,
    ):
        with autocast(config, place.device):
            sums.append(run.forward(to_device(x, place.device), summed_loss, to_device(y, place.device)))
        counts += int((y >= 0).sum())
    total = torch.tensor([torch.stack(sums).cpu().double().sum(), counts], dtype=torch.float64)
    if place.world_size > 1:
        dist.all_reduce(total)
    progress.val_loss, progress.validated_step = float(total[0] / total[1]), progress.step
    if log:
        tokens = progress.step * config.train.batch_size * config.model.block_size
        at = {"step": progress.step, "tokens": tokens, "seconds": progress.seconds}
        log.validation(at | {"val_loss": progress.val_loss})


def is_finite(run: Run, progress: Progress) -> bool:
    """Whether the run is worth a checkpoint: one whose weights are no numbers must never replace a good one."""
    return progress.bad_steps == 0 and bool(torch.isfinite(nn.utils.get_total_norm(run.model.parameters())))


def save(run: Run, progress: Progress, log: metrics.RunLog | None) -> None:
    """Write a checkpoint, after the log of all that it contains is safe on the disk."""
    if progress.validated_step == progress.step and progress.val_loss < progress.best_loss:
        progress.best_loss, progress.best_step = progress.val_loss, progress.step
    optimizer_state = optimizers.gather_state(run.optimizer, run.model)
    if log:
        log.sync()
        state = {"config": run.config.model_dump(), "model": run.model.state_dict()}
        state["fingerprints"] = {split: fingerprint(tokens) for split, tokens in run.tokens.items()}
        state |= {"optimizer": optimizer_state, "scaler": run.scaler.state_dict()}
        state |= asdict(progress)
        checkpoint.save(run.config.run_dir, state, run.config.train.keep_checkpoints)


if __name__ == "__main__":
    run_main(main)
