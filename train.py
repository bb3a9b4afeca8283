"""Train GPT-2 with AdamW, Lion, Sophia or another optimizer; everything else is shared.

    python train.py configs/quickstart.toml --run=sophia-g
    torchrun --standalone --nproc_per_node=8 -- train.py configs/gpt2_125m.toml --run=sophia-g

Read it from top to bottom: main, the loop, one step, Sophia's estimate, validation, logging,
checkpoints. Batch number 0, 1, … makes update number 1, 2, …, and is a function of (seed, step);
see data/batches.py.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from data import batches
from data.token_files import fingerprints, open_tokens, read_meta
from model import GPT, summed_loss
from optimizers import state
from optimizers.adahessian import random_signs
from optimizers.build import check_optimizer, make_optimizer
from runtime import checkpoint, distributed, hugging_face, plan, trackers
from runtime.arguments import parse_command_line
from runtime.cli import UserError, reason, run_main
from runtime.config import Config
from runtime.distributed import Ranks
from runtime.files import locked
from runtime.metrics import RunLog
from runtime.run_folder import ROOT, describe_environment
from sophia import Sophia, hutchinson_estimate, sampled_label_loss

MicroBatches = Iterator[tuple[Tensor, Tensor]]  # inputs and targets (or uniforms), each (B, T)
Records = list[dict[str, Any]]  # one per step
summed_sampled_loss = functools.partial(sampled_label_loss, reduction="sum")

# ---- Main ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: Config
    ranks: Ranks
    device: torch.device
    tokens: dict[str, np.ndarray]  # "train" and "val"
    model: GPT
    forward: nn.Module  # the model, compiled if asked; shares its parameters
    parallel: nn.Module  # forward, averaging gradients over the ranks if there are several
    optimizer: Any  # with an Optimizer's methods; may be sharded over the ranks (ZeRO-1)
    scaler: torch.amp.GradScaler  # enabled for float16 only
    hessian_micro_batch_size: int


@dataclass
class Progress:
    """What changes, besides weights and optimizer state. All of it is stored in checkpoints."""

    step: int = 0  # batches used; a skipped update counts too
    seconds: float = 0.0  # spent in updates and estimates
    validated_step: int = -1  # not even before the first update
    val_loss: float = math.inf
    best_loss: float = math.inf  # of the validated checkpoints
    best_step: int = -1
    bad_steps: int = 0  # consecutive steps, up to now, whose loss or gradient was not finite


def main() -> None:
    ranks = Ranks.from_environment()
    distributed.start_process_group(ranks)
    try:
        stop_signal = prepare_and_train(ranks)
        distributed.barrier()  # no rank may leave the group while another still needs it
    finally:
        gc.collect()  # objects that use the process group must be freed before it is destroyed
        if dist.is_initialized():
            dist.destroy_process_group()

    # The shell's convention for a signal: a stopped run must not look like a finished one.
    distributed.exit_process(ranks, status=128 + stop_signal if stop_signal else 0)


def prepare_and_train(ranks: Ranks) -> int:
    """Check everything that can be checked before any GPU time is spent, then train.

    Returns the number of the signal that stopped the run, or 0.
    """
    with distributed.errors_on_all_ranks():
        config, flags = parse_command_line(sys.argv[1:])
        check_optimizer(config)
        device = distributed.find_device(config.train)
        plan.check_divisible(config, ranks.world_size)
    if distributed.max_over_ranks(flags.dry_run):
        if ranks.rank == 0:
            config = distributed.resolve_number_format(config, device)
            distributed.check_device(config.train, device)
            if (config.data_folder / "train.bin").exists():
                open_splits(config)  # for its checks
            if flags.branch_from:
                checkpoint.find_branch(config, flags.branch_from)
            plan.print_plan(config, ranks, device, start="nothing is trained (--dry-run)")
        return 0

    with distributed.errors_on_all_ranks():
        trackers.check_installed(config)
        tokens = open_splits(config)
        digests = fingerprints(tokens)
    found = checkpoint.find_on_all_ranks(config, flags.resume, flags.branch_from, digests)

    with distributed.errors_on_all_ranks():
        stored = found[1]["config"] if found else None
        config = distributed.resolve_number_format(config, device, stored)
        distributed.check_device(config.train, device)
        plan.check_memory(config, ranks, device)
        plan.check_disk(config)
    start = (found[1]["step"], found[1]["validated_step"]) if found else (0, -1)
    distributed.check_same_on_all_ranks(config, device, digests, start)
    if start[1] == config.train.max_steps:
        if ranks.rank == 0:
            print(f"{config.run_dir}: finished already, {start[0]} steps")
        return 0
    try:
        return restore_and_train(build_run(config, ranks, device, tokens), found)
    except torch.OutOfMemoryError as error:
        raise UserError(plan.describe_out_of_memory(config, ranks, device)) from error


def open_splits(config: Config) -> dict[str, np.ndarray]:
    folder, model = config.data_folder, config.model
    tokens = {}
    for split in ("train", "val"):
        tokens[split] = open_tokens(folder, split, model.text_vocab_size, model.block_size)
    return tokens


def build_run(
    config: Config, ranks: Ranks, device: torch.device, tokens: dict[str, np.ndarray]
) -> Run:
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    distributed.set_deterministic(config.train.deterministic)
    torch.manual_seed(config.train.seed)

    # Initialize on the CPU, so that every device starts from the same weights.
    model = GPT(config.model, config.train.loss_chunk).to(device)
    forward: Any = torch.compile(model, dynamic=False) if config.train.compile else model
    parallel = forward
    if ranks.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        parallel = DistributedDataParallel(forward, device_ids=ids, gradient_as_bucket_view=True)

    with distributed.errors_on_all_ranks():
        optimizer = make_optimizer(config, model)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.dtype == "float16")
    micro = plan.hessian_micro_batch_size(config, ranks.world_size)
    run = Run(config, ranks, device, tokens, model, forward, parallel, optimizer, scaler, micro)
    if ranks.world_size > 1:
        lay_out_gradients(run)
    return run


def lay_out_gradients(run: Run) -> None:
    """Make two backward passes that are not used, after which DDP's memory stays as it is.

    The gradients of DistributedDataParallel are views of its buckets. Before the second backward
    pass it allocates the buckets again, in the order in which the gradients arrived. The first ones
    can be freed here, because nothing needs the gradients yet. And a resumed run gets the buckets
    of the run that it continues, and so adds up gradients in the same order.
    """
    config = run.config
    size = (config.train.micro_batch_size, config.model.block_size)
    tokens = torch.zeros(size, dtype=torch.int64, device=run.device)
    for _ in range(2):
        run.optimizer.zero_grad(set_to_none=True)
        gc.collect()  # frees the first buckets, which reference cycles keep
        # One tensor passed as both inputs would be compiled as a separate graph.
        micro_batch = (tokens, tokens.clone())
        accumulate_gradient(run, summed_loss, iter([micro_batch]), run.ranks.world_size)
    zero_gradient(run)


def restore_and_train(run: Run, found: checkpoint.Found | None) -> int:
    """Continue from the checkpoint, if one was found, or from the weights of train.init_from.

    Returns what `train` returns.
    """
    config = run.config
    if found is None and config.train.init_from:
        hugging_face.load_weights_on_all_ranks(run.model, config.train.init_from)
    with ExitStack() as resources:
        with distributed.errors_on_all_ranks():
            progress = restore(run, found)
            log = None
            if run.ranks.rank == 0:  # only rank 0 writes to the run's folder
                config.run_dir.mkdir(parents=True, exist_ok=True)
                resources.enter_context(locked(config.run_dir))
                log = open_log(run, progress, found)
        return train(run, progress, log)


def open_log(run: Run, progress: Progress, found: checkpoint.Found | None) -> RunLog:
    config, device = run.config, run.device
    start = f"after step {progress.step}, from {found[0]}" if found else "at step 0"
    plan.print_plan(config, run.ranks, device, start)

    checkpoint.quarantine(config.run_dir, after=progress.step)
    environment = describe_environment(device, run.ranks.world_size)
    environment["data"] = read_meta(config.data_folder)
    environment["branched_from"] = checkpoint.inherit_metrics(config, found, progress.step)
    return RunLog.open(config, device, environment, progress.step, progress.validated_step)


# ---- The loop ------------------------------------------------------------------------------------


def train(run: Run, progress: Progress, log: RunLog | None) -> int:
    """Log, validate, save and step until the schedule ends or a signal arrives.

    Only rank 0 has a log. Returns the number of the signal that stopped it, or 0.
    """
    options = run.config.train
    signals = distributed.catch_signals()
    saved_step = progress.step  # of the newest checkpoint
    pending: Records = []  # steps whose numbers are still on the device

    while True:
        step = progress.step
        stop_signal = distributed.max_over_ranks(signals[0] if signals else 0)
        ending = stop_signal != 0 or step == options.max_steps
        saving = ending or step % options.checkpoint_interval == 0
        validating = step == options.max_steps or step % options.eval_interval == 0
        validating = validating and stop_signal == 0 and progress.validated_step < step

        if pending and (saving or validating or step % options.log_interval == 0):
            log_steps(run, pending, progress, log)
            pending.clear()

        # Save first: a run that is killed while it validates loses nothing, and validates again.
        if saving and step > saved_step:
            if is_finite(run, progress):
                save(run, progress, log)
                saved_step = step
            elif log:
                log.message(f"step {step}: not saved, weights, loss or gradient are not finite")
        if validating:  # also before the first update
            validate(run, progress, log)
            if 0 < step == saved_step and progress.val_loss < progress.best_loss:
                progress.best_loss, progress.best_step = progress.val_loss, step
            if ending and step == saved_step:
                save(run, progress, log)  # once more, as the checkpoint of a finished run

        if ending:
            break
        pending.append(train_step(run, step))
        progress.step += 1

    if log:
        if stop_signal:
            log.message(f"stopped by a signal after step {step}; continue with --resume")
        else:
            log.message(f"finished; results are in {run.config.run_dir}")
            script = os.path.relpath(ROOT / "scripts/compare.py")
            log.message(f"compare runs: python {script} {run.config.run_dir.parent}")
        if not stop_signal:
            distributed.release_signals()  # nothing is left to save, and a tracker may take minutes
        log.close(exit_status=128 + stop_signal if stop_signal else 0)
    return stop_signal


# ---- One step ------------------------------------------------------------------------------------


def train_step(run: Run, step: int) -> dict[str, Any]:
    """Make one update from batch number `step`.

    Returns the record of update number `step` + 1, with loss and gradient norm still on the device.
    Only float16's scaler, SOAP's first step and imported optimizers that cannot skip a step need a
    host sync.
    """
    config, optimizer, world_size = run.config, run.optimizer, run.ranks.world_size
    lr = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)

    # Estimate the Hessian before the step, at the current weights (Algorithm 3).
    times = [timestamp(run.device)]
    if config.hessian_interval and step % config.hessian_interval == 0:
        update_hessian(run, step)
        times.append(timestamp(run.device))

    # The gradient of the mean loss over all micro-batches and ranks.
    batch_size, micro_size = config.train.batch_size, config.train.micro_batch_size
    micro_batches = get_batch(run, step, batch_size, micro_size)
    loss = accumulate_gradient(run, summed_loss, micro_batches, batch_size // micro_size)
    if world_size > 1:
        dist.all_reduce(loss)
        loss /= world_size
    run.scaler.unscale_(optimizer)
    max_norm = config.train.grad_clip or math.inf
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), max_norm)

    # Skip the update if the loss or gradient is not finite: skip_if sets `found_inf`, with which
    # the optimizer's step changes nothing. Decided on the device: no host sync. With float16 the
    # scaler skips by itself.
    if not run.scaler.is_enabled():
        state.skip_if(optimizer, state.not_finite(loss + grad_norm))
    run.scaler.step(optimizer)
    run.scaler.update()
    zero_gradient(run)

    times.append(timestamp(run.device))
    return {"step": step + 1, "lr": lr, "loss": loss, "grad_norm": grad_norm, "times": times}


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of batch number `step`.

    Linear warm-up to the peak, then decay to final_lr_ratio × peak at max_steps: as a cosine,
    linearly, or linearly after a stable phase (wsd).
    """
    options, peak = config.train, config.optimizer.lr
    warmup = options.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)  # not 0 in the first step, which would be wasted

    start = options.decay_start
    decayed = max(step - start, 0) / (options.max_steps - start)
    remaining = 1 - decayed
    if options.schedule == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * decayed))
    return peak * (options.final_lr_ratio + (1 - options.final_lr_ratio) * remaining)


def get_batch(run: Run, step: int, size: int, micro_size: int) -> MicroBatches:
    """Yield this rank's share of the first `size` sequences of a step's batch.

    Each micro-batch is read while the device works on the one before.
    """
    model, seed, tokens = run.config.model, run.config.train.seed, run.tokens["train"]
    T, vocab_size = model.block_size, model.text_vocab_size
    offsets = batches.window_offsets(seed, step, len(tokens), T, size)
    masked = None if model.causal else batches.masked_positions(seed, step, size, model)
    for rows in batches.rank_slices(size, micro_size, run.ranks):
        x, y = batches.read_windows(tokens, offsets[rows], T, vocab_size)
        if masked is not None:
            x, y = batches.mask_tokens(x, masked[rows], model.mask_token)
        yield to_device(x, run.device), to_device(y, run.device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device. From pinned memory, the host does not wait for the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    if config.train.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, config.train.dtype))


def accumulate_gradient(
    run: Run, criterion: Callable[..., Tensor], micro_batches: MicroBatches, count: int
) -> Tensor:
    """Put the gradient of the criterion's mean over all tokens into .grad, and return the mean.

    `criterion(logits, targets)` is a sum over tokens, `count` the number of micro-batches of all
    ranks together. The gradient is averaged over all ranks; with float16 it is still multiplied by
    the scaler's factor. The mean is this rank's own, still on the device.
    """
    own = count // run.ranks.world_size
    losses = []
    for index, (x, targets) in enumerate(micro_batches, start=1):
        if isinstance(run.parallel, DistributedDataParallel):
            # Exchange gradients in the last backward pass only; DDP reads this in forward.
            run.parallel.require_backward_grad_sync = index == own
        with autocast(run.config, run.device):
            n_labels = len(x) * run.config.model.labels_per_sequence
            loss = run.parallel(x, criterion, targets) / n_labels
        # The mean over this rank's micro-batches; DDP averages over the ranks.
        run.scaler.scale(loss / own).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def zero_gradient(run: Run) -> None:
    """Drop the gradient, or under DDP set it to zero.

    DDP's gradients are views of its buckets. Autograd would allocate new ones beside the buckets.
    """
    run.optimizer.zero_grad(set_to_none=not isinstance(run.parallel, DistributedDataParallel))


def timestamp(device: torch.device) -> Any:
    """Return a point in time. On CUDA: an event, recorded without a host sync."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


# ---- Sophia's estimate of the Hessian's diagonal -------------------------------------------------


def update_hessian(run: Run, step: int) -> None:
    """Estimate the Hessian on the first hessian_batch_size sequences of the step's batch.

    An estimate that is not finite is dropped, because it would stay in the moving average forever.
    All ranks have the same estimate and so decide alike, on the device: no host sync.
    """
    size, micro_size = run.config.hessian_batch_size, run.hessian_micro_batch_size
    micro_batches = get_batch(run, step, size, micro_size)
    if run.config.optimizer.hessian_estimator == "hutchinson":
        update_by_hutchinson(run, micro_batches, step)
    else:
        update_by_gradient(run, micro_batches, step)


def update_by_gradient(run: Run, micro_batches: MicroBatches, step: int) -> None:
    """Use n ĝ ⊙ ĝ: Gauss-Newton-Bartlett with sampled labels, or the empirical Fisher."""
    config, size = run.config, run.config.hessian_batch_size
    criterion: Callable[..., Tensor] = summed_loss
    if config.optimizer.hessian_estimator == "gnb":
        criterion = summed_sampled_loss
        micro_batches = replace_targets_by_uniforms(run, micro_batches, step)
    accumulate_gradient(run, criterion, micro_batches, size // run.hessian_micro_batch_size)

    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    if run.scaler.is_enabled():  # unscale_ can be called once per update, and the step needs it
        torch._foreach_div_(grads, run.scaler.get_scale())
    n_labels = size * config.model.labels_per_sequence
    found_inf = state.not_finite(n_labels * nn.utils.get_total_norm(grads).square())
    state.local_shard(run.optimizer).update_hessian_from_grad(n_labels, found_inf)
    zero_gradient(run)


def replace_targets_by_uniforms(run: Run, micro_batches: MicroBatches, step: int) -> MicroBatches:
    """Yield the inputs with uniform numbers that decide which labels are sampled; -1 for none."""
    config, size = run.config, run.config.hessian_batch_size
    uniforms = batches.label_uniforms(config.train.seed, step, size, config.model.block_size)
    slices = batches.rank_slices(size, run.hessian_micro_batch_size, run.ranks)  # as in get_batch
    for (x, y), rows in zip(micro_batches, slices, strict=True):
        u = to_device(torch.from_numpy(uniforms[rows]), run.device)
        yield x, u.masked_fill(y < 0, -1)  # a token without a target gets no label


def update_by_hutchinson(run: Run, micro_batches: MicroBatches, step: int) -> None:
    """Use u ⊙ Hu, averaged over all micro-batches and ranks."""
    estimates = hutchinson(run, micro_batches, step)
    found_inf = state.not_finite(nn.utils.get_total_norm(list(estimates.values())))
    optimizer = state.local_shard(run.optimizer)
    mine = {p: estimates[p] for group in optimizer.param_groups for p in group["params"]}
    optimizer.update_hessian(mine, found_inf)


def hutchinson(run: Run, micro_batches: MicroBatches, step: int) -> dict[Tensor, Tensor]:
    """Return {parameter: Hutchinson's estimate}, with the same probe for all micro-batches."""
    config, device = run.config, run.device
    named = dict(run.model.named_parameters())
    params = {name: p.detach() for name, p in named.items()}

    # Gaussian probes as in Sophia's Algorithm 1, or random signs as in AdaHessian.
    generator = torch.Generator(device).manual_seed(batches.probe_seed(config.train.seed, step))
    draw = random_signs if config.optimizer.name == "adahessian" else torch.randn
    probes = {name: draw(p.shape, generator=generator, device=device) for name, p in params.items()}

    # float16 is too narrow for second derivatives, and the scaler does not cover them: fp32 then.
    context = nullcontext() if config.train.dtype == "float16" else autocast(config, device)
    estimate = compiled(hutchinson_micro_batch) if config.train.compile else hutchinson_micro_batch
    weight = run.hessian_micro_batch_size / config.hessian_batch_size
    totals = [torch.zeros_like(p) for p in params.values()]
    for x, y in micro_batches:
        with context:
            estimates = estimate(run.model, params, probes, x, y)
            torch._foreach_add_(totals, list(estimates.values()), alpha=weight)

    if run.ranks.world_size > 1:
        for total in totals:
            dist.all_reduce(total)
    return dict(zip(named.values(), totals, strict=True))


def hutchinson_micro_batch(
    model: GPT, params: dict[str, Tensor], probes: dict[str, Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Return u ⊙ Hu for one micro-batch."""
    n_labels = len(x) * model.config.labels_per_sequence

    def loss(p: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, p, (x,))
        return summed_loss(logits, y) / n_labels

    with sdpa_kernel(SDPBackend.MATH):  # fused attention kernels have no second derivative
        return hutchinson_estimate(loss, params, probes)


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


# ---- Validation ----------------------------------------------------------------------------------


@torch.no_grad()
def validate(run: Run, progress: Progress, log: RunLog | None) -> None:
    """Compute the mean loss over the validation windows, which are divided among the ranks."""
    config, ranks, device = run.config, run.ranks, run.device
    limit, micro_size = config.train.eval_windows, config.train.micro_batch_size
    windows = batches.validation_windows(run.tokens["val"], config.model, limit, micro_size, ranks)
    sums = [torch.zeros((), device=device)]  # with few windows, a rank may have none
    count = 0
    for x, y in windows:
        with autocast(config, device):
            sums.append(run.forward(to_device(x, device), summed_loss, to_device(y, device)))
        count += int((y >= 0).sum())  # -1 marks what is not a target

    total = torch.tensor([torch.stack(sums).cpu().double().sum(), count], dtype=torch.float64)
    if ranks.world_size > 1:
        dist.all_reduce(total)  # on the CPU, with gloo
    progress.val_loss = float(total[0] / total[1])
    progress.validated_step = progress.step
    with distributed.errors_on_all_ranks():
        if log:
            log.validation(progress.step, progress.seconds, progress.val_loss)


# ---- Logging -------------------------------------------------------------------------------------


def log_steps(run: Run, pending: Records, progress: Progress, log: RunLog | None) -> None:
    """Log the pending steps, and stop a run that has diverged. All ranks must call it."""
    records = fetch_records(run, pending, progress)
    if isinstance(state.local_shard(run.optimizer), Sophia):
        records[-1] |= state.sophia_statistics(run.optimizer)
    with distributed.errors_on_all_ranks():
        if log:
            log.steps(records)
        stop_if_diverged(run, progress)


def fetch_records(run: Run, pending: Records, progress: Progress) -> Records:
    """Fetch the numbers of pending steps from the device, and complete their records."""
    losses = torch.stack([step["loss"] for step in pending]).tolist()
    grad_norms = torch.stack([step["grad_norm"] for step in pending]).tolist()

    records = []
    for step, loss, grad_norm in zip(pending, losses, grad_norms, strict=True):
        record = {"step": step["step"], "loss": loss, "lr": step["lr"], "grad_norm": grad_norm}
        record["clipped"] = 0 < run.config.train.grad_clip < grad_norm
        *estimate, started, ended = step["times"]
        record["step_ms"] = milliseconds_between(started, ended)
        if estimate:  # the estimate began at the first of three times
            record["hessian_ms"] = milliseconds_between(estimate[0], started)

        if math.isfinite(loss + grad_norm):
            progress.bad_steps = 0
        else:
            progress.bad_steps += 1
            record["skipped"] = True
        progress.seconds += (record["step_ms"] + record.get("hessian_ms", 0.0)) / 1000
        record["tokens"] = step["step"] * run.config.tokens_per_step
        record["seconds"] = progress.seconds
        records.append(record)
    return records


def milliseconds_between(start: Any, end: Any) -> float:
    """Return the milliseconds between two timestamps of the same device."""
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def stop_if_diverged(run: Run, progress: Progress) -> None:
    """Raise UserError if the last max_bad_steps steps, or more, were not finite."""
    if progress.bad_steps >= run.config.train.max_bad_steps:
        raise UserError(
            f"{run.config.run_dir}: loss or gradient not finite in the last {progress.bad_steps} "
            f"steps, up to step {progress.step}. These updates were skipped, and the checkpoints "
            f"are intact. Start again in another train.out_dir with a lower optimizer.lr, a longer "
            f"warm-up, float32, or (Sophia) a larger rho"
        )


# ---- Checkpoints ---------------------------------------------------------------------------------


def is_finite(run: Run, progress: Progress) -> bool:
    """Return whether the run may be saved: non-finite weights must not replace good ones."""
    norm = nn.utils.get_total_norm(run.model.parameters())
    return progress.bad_steps == 0 and bool(torch.isfinite(norm))


def save(run: Run, progress: Progress, log: RunLog | None) -> None:
    """Write a checkpoint, after the log of all that it contains. All ranks must call it."""
    optimizer_state = state.gather_state(run.optimizer, run.model)
    with distributed.errors_on_all_ranks():
        if log:
            log.sync()
            content = {"config": run.config.model_dump(), "fingerprints": fingerprints(run.tokens)}
            content |= {"model": run.model.state_dict(), "optimizer": optimizer_state}
            content |= {"scaler": run.scaler.state_dict()} | asdict(progress)
            checkpoint.save(run.config.run_dir, content, run.config.train.keep_checkpoints)


def restore(run: Run, found: checkpoint.Found | None) -> Progress:
    """Load a checkpoint into the run, if one was found."""
    if found is None:
        return Progress()

    path, saved = found
    try:
        run.model.load_state_dict(saved["model"])
        state.load_state(run.optimizer, run.model, saved["optimizer"])
        run.scaler.load_state_dict(saved["scaler"])
        progress = Progress(**{key: saved[key] for key in asdict(Progress())})
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # RuntimeErrors that say nothing about the checkpoint
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint of this run ({reason(error)})") from error
    saved.clear()  # free the loaded tensors, to which main() still holds a reference
    return progress


if __name__ == "__main__":
    run_main(main)
