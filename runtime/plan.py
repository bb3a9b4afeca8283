"""What a run will do, determined before it starts: how its batch divides, and --dry-run's table."""

from __future__ import annotations

from pathlib import Path

from runtime.cli import UserError
from runtime.config import Config
from runtime.cost import (
    PROBE_BYTES,
    activation_bytes,
    checkpoint_bytes,
    fixed_bytes,
    flops_per_token,
    hvp_bytes,
    num_parameters,
)


def check_divisible(config: Config, world_size: int) -> None:
    """Refuse a batch that ranks × micro-batch do not divide, and suggest the nearest sizes."""
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    unit = micro * world_size
    if batch % unit:
        batches = sorted({max(batch // unit, 1) * unit, (batch // unit + 1) * unit})
        nearest = f"train.batch_size {' or '.join(map(str, batches))}"
        micros = [m for m in range(1, batch + 1) if batch % (m * world_size) == 0]
        if micros:
            closest = min(micros, key=lambda m: abs(m - micro))
            nearest += f", or train.micro_batch_size {closest}"
        raise UserError(
            f"train.batch_size {batch} is not divisible by {unit} "
            f"(train.micro_batch_size {micro} × {world_size} ranks); use {nearest}"
        )

    estimate = config.hessian_batch_size
    if estimate % world_size:
        lower = estimate // world_size * world_size
        upper = lower + world_size
        nearest = f"{lower} or {upper}" if lower else str(upper)
        raise UserError(
            f"optimizer.hessian_batch_size {estimate} is not divisible by {world_size} ranks; "
            f"use {nearest}"
        )


def hessian_micro_batch_size(config: Config, world_size: int) -> int:
    """Return the micro-batch size of the Hessian estimate per rank, or 0 without estimates.

    It is the largest divisor of the rank's share that the config allows. By default that is a
    training micro-batch, or for Hutchinson what needs no more memory than one.
    """
    if not config.hessian_interval:
        return 0

    most = getattr(config.optimizer, "hessian_micro_batch_size", None)
    if most is None:
        most = config.train.micro_batch_size
        if config.optimizer.hessian_estimator == "hutchinson":
            most = min(most, _sequences_that_fit(config))

    share = config.hessian_batch_size // world_size
    sizes = range(1, max(min(most, share), 1) + 1)
    return max(size for size in sizes if share % size == 0)


def _sequences_that_fit(config: Config) -> int:
    """Return how many sequences' Hessian-vector products need no more memory than a step."""
    train = config.train
    room = activation_bytes(config.model, train.dtype, train.micro_batch_size, train.loss_chunk)
    room -= PROBE_BYTES * num_parameters(config.model)
    return room // hvp_bytes(config.model, train.dtype, train.compile)


def print_plan(config: Config, world_size: int, device: str) -> None:
    """Print what this run would be, for --dry-run."""
    model, train = config.model, config.train
    n = num_parameters(model)

    # Memory: a step, or an estimate if that needs more.
    fixed = fixed_bytes(config, world_size)
    activations = activation_bytes(model, train.dtype, train.micro_batch_size, train.loss_chunk)
    hessian_micro = hessian_micro_batch_size(config, world_size)
    if config.optimizer.hessian_estimator == "hutchinson":
        product = hessian_micro * hvp_bytes(model, train.dtype, train.compile)
        activations = max(activations, PROBE_BYTES * n + product)

    estimate = "none"
    if hessian_micro:
        count = config.hessian_batch_size // world_size // hessian_micro
        estimate = (
            f"every {config.hessian_interval} steps, {count} × {hessian_micro} sequences per rank"
        )

    tokens = config.tokens_per_step
    accumulation = train.batch_size // (train.micro_batch_size * world_size)
    is_prepared = Path(config.data.path, "train.bin").exists()
    rows = {
        "run": f"{config.experiment}/{config.run} on {world_size} × {device}, {train.dtype}",
        "parameters": f"{n:,}",
        "tokens per step": f"{tokens:,} = {train.batch_size} sequences of {model.block_size}",
        "accumulation": (
            f"{accumulation} micro-batches of {train.micro_batch_size} sequences per rank"
        ),
        "Hessian estimate": estimate,
        "length": f"{train.max_steps:,} steps, {train.max_steps * tokens:,} tokens",
        "compute": (
            f"{flops_per_token(model) * tokens / 1e12:,.4g} TFLOP per step, without estimates"
        ),
        "memory per rank": (
            f"about {(fixed + activations) / 1e9:.3g} GB (weights, gradients, optimizer "
            f"{fixed / 1e9:.3g}; activations {activations / 1e9:.3g})"
        ),
        "checkpoint": (
            f"{checkpoint_bytes(config) / 1e9:.3g} GB, "
            f"the newest {train.keep_checkpoints} and the best are kept"
        ),
        "output": str(config.run_dir),
        "data": config.data.path + ("" if is_prepared else " (not prepared yet)"),
    }
    for name, value in rows.items():
        print(f"{name:17} {value}")
