"""Train GPT-2 with AdamW, Lion, Sophia-G, Sophia-H or another. Whatever is not the optimizer is shared by all of them.

    python train.py configs/quickstart.toml --run=sophia-g
    torchrun --standalone --nproc_per_node=8 -- train.py configs/gpt2_125m.toml --run=sophia-g
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 -- train.py …

Read it from top to bottom; functions stand in the order in which they are called. Step number 1, 2, … is the update
made from batch 0, 1, …; a batch, and all randomness beside it, is a function of (seed, step), see data/batches.py.
"""

from __future__ import annotations

import functools
import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import hugging_face
import metrics
import mirrors
import optimizers
from config import Config
from data.batches import (
    label_uniforms,
    mask_tokens,
    masked_positions,
    probe_seed,
    rank_slices,
    read_windows,
    validation_windows,
    window_offsets,
)
from data.token_files import fingerprint, open_tokens, read_meta
from errors import UserError, reason, run_main
from experiment import parse_command_line
from files import locked
from model import GPT, flops_per_token, summed_loss
from place import Place, agree, catch_signals, find_place, leave, start_process_group
from plan import check_divisible, hessian_micro_batch_size, print_plan
from sophia import hutchinson_estimate, sample_labels


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: Config
    place: Place
    tokens: dict[str, np.ndarray]  # "train" and "val"
    model: GPT
    forward: nn.Module  # the model, compiled where asked; the same parameters
    parallel: nn.Module  # forward, averaging gradients over the ranks where there are several
    optimizer: Any  # torch's Optimizer, or several together (optimizers.py)
    scaler: torch.amp.GradScaler


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


def make_step(run: Run, step: int) -> dict[str, Any]:
    """One update, from batch number `step`. Nothing waits for the device (but fp16's scaler, Muon and SOAP must)."""
    config, place, optimizer = run.config, run.place, run.optimizer
    lr = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr

    estimated = started = metrics.timestamp(place.device)
    if config.optimizer.hessian_interval and step % config.optimizer.hessian_interval == 0:
        update_hessian(run, step)
        estimated = metrics.timestamp(place.device)

    size, micro_size = config.train.batch_size, config.train.micro_batch_size
    batches = read_batch(run, step, size, micro_size)
    loss = accumulate_gradient(run, summed_loss, batches, size // micro_size)
    if place.world_size > 1:
        dist.all_reduce(loss)
        loss /= place.world_size
    run.scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.train.grad_clip or math.inf)
    if not run.scaler.is_enabled():
        # A step whose loss or gradient is no number changes nothing; the device knows, and nobody waits to be told.
        optimizers.local(optimizer).found_inf = is_no_number(loss + grad_norm)
    run.scaler.step(optimizer)
    run.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    timestamps = (started, estimated, metrics.timestamp(place.device))
    return {"step": step + 1, "lr": lr, "loss": loss, "grad_norm": grad_norm, "timestamps": timestamps}


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up to the peak, then a cosine down to final_lr_ratio × peak at max_steps. `step` counts from 0."""
    peak, floor = config.optimizer.lr, config.train.final_lr_ratio
    warmup, total = config.train.warmup_steps, config.train.max_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)  # not 0 in the first step, which would be wasted
    decayed = (step - warmup) / max(total - warmup, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * decayed)))


def read_batch(run: Run, step: int, size: int, micro_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's inputs and targets, (B, T) a micro-batch, of the first `size` sequences of a step's batch."""
    config, place, tokens = run.config, run.place, run.tokens["train"]
    shape, seed = config.model, config.train.seed
    offsets = window_offsets(seed, step, len(tokens), shape.block_size, config.train.batch_size)
    for rows in rank_slices(size, micro_size, place.rank, place.world_size):
        x, y = read_windows(tokens, offsets[rows], shape.block_size, shape.text_vocab_size)
        if not shape.causal:
            x, y = mask_tokens(x, masked_positions(seed, step, size, shape)[rows], shape.mask_token)
        yield to_device(x, place.device), to_device(y, place.device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting: out of pinned memory the copy runs beside the computation."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    if config.train.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, config.train.dtype))


def accumulate_gradient(
    run: Run, criterion: Callable[[Tensor, Tensor], Tensor], batches: Iterator[tuple[Tensor, Tensor]], count: int
) -> Tensor:
    """Put into .grad the gradient of the criterion's mean over the tokens of the `count` micro-batches of all ranks.

    Returns this rank's mean of the criterion, still on the device. With fp16 the gradient carries the scaler's factor.
    """
    mine = count // run.place.world_size
    losses = []
    for index, (x, labels) in enumerate(batches, start=1):
        if isinstance(run.parallel, DistributedDataParallel):
            # Read in forward: the ranks exchange gradients in the last backward alone.
            run.parallel.require_backward_grad_sync = index == mine
        with autocast(run.config, run.place.device):
            loss = run.parallel(x, criterion, labels) / (len(x) * run.config.model.labels_per_sequence)
        run.scaler.scale(loss / mine).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def update_hessian(run: Run, step: int) -> None:
    """Estimate the Hessian's diagonal on the first hessian_batch_size sequences of the step's batch, at its weights.

    An estimate that is no number, or overflowed in fp16, is left out: in the average it would stay for ever. All ranks
    have the same estimate, so all decide the same; and it is decided on the device, nobody waits for it.
    """
    size = run.config.optimizer.hessian_batch_size
    assert size is not None  # the schema demands it
    micro_size = hessian_micro_batch_size(run.config, run.place.world_size)
    batches = read_batch(run, step, size, micro_size)
    estimate = update_by_hutchinson if run.config.optimizer.hessian_estimator == "hutchinson" else update_by_gradient
    estimate(run, batches, step, size, micro_size)


def update_by_gradient(
    run: Run, batches: Iterator[tuple[Tensor, Tensor]], step: int, size: int, micro_size: int
) -> None:
    """n ĝ²: Gauss-Newton-Bartlett, its labels drawn from the model; or the empirical Fisher, with the text's own."""
    config, place = run.config, run.place
    criterion: Callable[[Tensor, Tensor], Tensor] = summed_loss
    if config.optimizer.hessian_estimator == "gnb":
        uniforms = torch.from_numpy(label_uniforms(config.train.seed, step, size, config.model.block_size))
        rows = rank_slices(size, micro_size, place.rank, place.world_size)
        drawn = (to_device(uniforms[r], place.device) for r in rows)
        # Where there is no target no label is drawn, for which a number below 0 stands.
        batches = ((x, u.masked_fill(y < 0, -1)) for (x, y), u in zip(batches, drawn, strict=True))
        criterion = summed_sampled_loss
    accumulate_gradient(run, criterion, batches, size // micro_size)
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    if run.scaler.is_enabled():
        torch._foreach_div_(grads, run.scaler.get_scale())
    n_labels = size * config.model.labels_per_sequence
    found_inf = is_no_number(n_labels * nn.utils.get_total_norm(grads).square())
    optimizers.local(run.optimizer).update_hessian_from_grad(n_labels, found_inf)
    run.optimizer.zero_grad(set_to_none=True)


def update_by_hutchinson(
    run: Run, batches: Iterator[tuple[Tensor, Tensor]], step: int, size: int, micro_size: int
) -> None:
    optimizer = optimizers.local(run.optimizer)
    estimates = hutchinson(run, batches, size // micro_size, step)
    norm = nn.utils.get_total_norm(list(estimates.values()))
    mine = {p: estimates[p] for group in optimizer.param_groups for p in group["params"]}
    optimizer.update_hessian(mine, found_inf=is_no_number(norm))


def summed_sampled_loss(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The loss of labels drawn from the model by `uniforms`; where one is below 0 the token is left out."""
    labels = sample_labels(logits.detach(), uniforms)
    return summed_loss(logits, labels.masked_fill(uniforms < 0, -1))


def is_no_number(value: Tensor) -> Tensor:
    """1.0 where it is NaN or infinite, else 0.0, still on the device: what the optimizers take as `found_inf`."""
    return (~torch.isfinite(value)).float()


def hutchinson(run: Run, batches: Iterator[tuple[Tensor, Tensor]], count: int, step: int) -> dict[Tensor, Tensor]:
    """Hutchinson's estimate over the `count` micro-batches of all ranks together, with one probe for all of them."""
    config, device = run.config, run.place.device
    named = dict(run.model.named_parameters())
    params = {name: p.detach() for name, p in named.items()}
    generator = torch.Generator(device).manual_seed(probe_seed(config.train.seed, step))
    # Gaussian as in Sophia's Algorithm 1, or of signs alone as in AdaHessian.
    draw = random_signs if config.optimizer.name == "adahessian" else torch.randn
    probes = {name: draw(p.shape, generator=generator, device=device) for name, p in params.items()}
    # float16 is too narrow for second derivatives, and no scaler knows them: then in float32.
    context = nullcontext() if config.train.dtype == "float16" else autocast(config, device)
    estimate = compiled(hutchinson_micro_batch) if config.train.compile else hutchinson_micro_batch
    totals = [torch.zeros_like(p) for p in params.values()]
    for x, y in batches:
        with context:
            torch._foreach_add_(totals, list(estimate(run.model, params, probes, x, y).values()), alpha=1 / count)
    if run.place.world_size > 1:
        for total in totals:
            dist.all_reduce(total)
    return dict(zip(named.values(), totals, strict=True))


def hutchinson_micro_batch(
    model: GPT, params: dict[str, Tensor], probes: dict[str, Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """u ⊙ Hu of one micro-batch; attention in plain operations, because the fused kernels have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return hutchinson_estimate(
            lambda p: summed_loss(functional_call(model, p, (x,)), y) / (len(x) * model.config.labels_per_sequence),
            params,
            probes,
        )


def random_signs(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(2, shape, generator=generator, device=device).float() * 2 - 1


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


if __name__ == "__main__":
    run_main(main)
