"""One update: the gradient of a batch, now and then an estimate of the Hessian's diagonal, the optimizer's step.

Read it from top to bottom; functions stand in the order in which they are called. Step number 1, 2, … is the update
made from batch 0, 1, …; a batch, and all randomness beside it, is a function of (seed, step), see data/batches.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from data.batches import (
    label_uniforms,
    mask_tokens,
    masked_positions,
    probe_seed,
    rank_slices,
    read_windows,
    window_offsets,
)
from model import GPT, summed_loss
from optimizers import build as optimizers
from runtime import metrics
from runtime.config import Config
from runtime.distributed import Place
from runtime.plan import hessian_micro_batch_size
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
