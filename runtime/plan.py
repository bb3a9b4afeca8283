"""What a run will do, determined before it starts: how its batch divides, and --dry-run's table."""

from __future__ import annotations

import math
import shutil
from typing import Any

import torch

from runtime import checkpoint
from runtime.cli import UserError, warn
from runtime.config import Config
from runtime.cost import (
    activation_bytes,
    checkpoint_bytes,
    fixed_bytes,
    flops_per_token,
    num_parameters,
    product_bytes,
    product_parameter_bytes,
)
from runtime.distributed import Ranks, memory_of
from runtime.experiment import as_text
from runtime.run_folder import describe_commit, name_of


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
            most = min(most, _products_that_fit(config, world_size))

    share = config.hessian_batch_size // world_size
    sizes = range(1, max(min(most, share), 1) + 1)
    return max(size for size in sizes if share % size == 0)


def _products_that_fit(config: Config, world_size: int) -> int:
    """Return how many sequences' Hessian-vector products need no more memory than a step."""
    room = _step_bytes(config) - product_parameter_bytes(config, world_size)
    return room // product_bytes(config.model, config.train.dtype, bool(config.train.compile))


def _step_bytes(config: Config) -> int:
    train = config.train
    return activation_bytes(
        config.model, train.dtype, bool(train.compile), train.micro_batch_size, train.loss_chunk
    )


# ---- Memory and disk -----------------------------------------------------------------------------

ROOM = 0.9  # the share of the memory that a suggested micro-batch may fill
# Beyond this factor of the memory, a run cannot fit. On CUDA the rules are within a tenth of what
# tests/cuda_without_gpu counts; on other devices they are a guess.
BEYOND_DOUBT = 3.0


def memory_per_rank(config: Config, world_size: int) -> tuple[int, int]:
    """Return the bytes of weights, gradients and optimizer, and those of a micro-batch.

    The second is a step's, or a Hessian estimate's if that needs more.
    """
    activations = _step_bytes(config)
    if config.optimizer.hessian_estimator == "hutchinson":
        sequences = hessian_micro_batch_size(config, world_size)
        train = config.train
        products = sequences * product_bytes(config.model, train.dtype, bool(train.compile))
        products += product_parameter_bytes(config, world_size)
        activations = max(activations, products)
    return fixed_bytes(config, world_size), activations


def check_memory(config: Config, ranks: Ranks, device: torch.device) -> None:
    """Refuse a run that cannot fit into the memory of this rank's device; warn if it may not.

    Raises:
        UserError: naming the largest micro-batch that fits.
    """
    available = memory_of(device)
    needed = sum(memory_per_rank(config, ranks.world_size))
    if available is None or needed <= available:
        return

    message = (
        f"train.micro_batch_size {config.train.micro_batch_size} needs about "
        f"{_gigabytes(needed)} GB per rank, of {_gigabytes(available)} GB; "
        f"{_advise_less_memory(config, ranks.world_size, available)}"
    )
    if needed > BEYOND_DOUBT * available:
        raise UserError(message)
    warn(f"this may not fit: {message}")


def check_disk(config: Config) -> None:
    """Warn if the run's checkpoints may fill the disk: the kept ones, and the one being written."""
    folder = config.run_dir
    existing = len(checkpoint.checkpoints(folder))
    while not folder.exists():
        folder = folder.parent
    available = shutil.disk_usage(folder).free

    # The newest, the best, and the one being written, but not more than the run saves.
    train = config.train
    most = min(train.keep_checkpoints + 2, math.ceil(train.max_steps / train.checkpoint_interval))
    needed = max(most - existing, 1) * checkpoint_bytes(config)
    if needed > available:
        warn(
            f"{folder}: the disk may become full: the run's checkpoints need "
            f"{_gigabytes(needed)} GB more, and {_gigabytes(available)} GB are free; free some "
            f"space, or use a lower train.keep_checkpoints or another train.out_dir"
        )


def describe_out_of_memory(config: Config, ranks: Ranks, device: torch.device) -> str:
    """Return the message for a run whose device is full."""
    needed = sum(memory_per_rank(config, ranks.world_size))
    available = memory_of(device) or needed
    there_is = f", of {_gigabytes(available)} GB" if memory_of(device) else ""
    message = (
        f"{device} is out of memory. The run needs about {_gigabytes(needed)} GB per rank"
        f"{there_is}; {_advise_less_memory(config, ranks.world_size, min(available, needed))}, "
        f"and --resume if there is a checkpoint"
    )
    if device.type == "cuda":
        message += ". nvidia-smi shows what other processes use"
    return message


def _advise_less_memory(config: Config, world_size: int, available: float) -> str:
    """Return what to change so that a run fits, by the rules, with some room."""

    def fits(key: str, value: Any) -> bool:
        section, _, name = key.partition(".")
        changed = getattr(config, section).model_copy(update={name: value})
        smaller = config.model_copy(update={section: changed})
        return sum(memory_per_rank(smaller, world_size)) <= ROOM * available

    for micro in range(config.train.micro_batch_size - 1, 0, -1):
        divides = config.train.batch_size % (micro * world_size) == 0
        if divides and fits("train.micro_batch_size", micro):
            return f"use --train.micro_batch_size={micro}, which gives the same losses"

    advice = "use a device with more memory or a smaller model"
    options: dict[str, Any] = {"train.shard_optimizer": True, "train.loss_chunk": 2048}
    if config.optimizer.hessian_estimator == "hutchinson":
        options["optimizer.hessian_micro_batch_size"] = 1
    for key, value in options.items():
        if fits(key, value):
            advice += f", or --{key}={as_text(value)}"
    return advice


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.0f}" if size >= 1e11 else f"{size / 1e9:.3g}"


# ---- The table -----------------------------------------------------------------------------------


def print_plan(config: Config, ranks: Ranks, device: torch.device, start: str) -> None:
    """Print what this run is, and from which step it starts: at its start, and for --dry-run."""
    model, train, world_size = config.model, config.train, ranks.world_size
    micro, tokens = train.micro_batch_size, config.tokens_per_step
    fixed, activations = memory_per_rank(config, world_size)
    accumulation = train.batch_size // (micro * world_size)
    memory = memory_of(device)
    there_is = f" of {_gigabytes(memory)} GB" if memory else ""

    is_prepared = (config.data_folder / "train.bin").exists()
    estimate = "none"
    hessian_micro = hessian_micro_batch_size(config, world_size)
    if hessian_micro:
        count = config.hessian_batch_size // world_size // hessian_micro
        estimate = (
            f"every {config.hessian_interval} steps, {count} × {hessian_micro} sequences per rank"
        )

    threads = f", {torch.get_num_threads()} threads each" if device.type == "cpu" else ""
    rows = {
        "run": f"{config.experiment}/{config.run}",
        "device": f"{world_size} × {name_of(device)}{threads}",
        "number format": f"{train.dtype}, {'compiled' if train.compile else 'not compiled'}",
        "parameters": f"{num_parameters(model):,}",
        "batch": (
            f"{train.batch_size} sequences of {model.block_size} = {tokens:,} tokens; "
            f"ranks × micro-batches × sequences: {world_size} × {accumulation} × {micro}"
        ),
        "Hessian estimate": estimate,
        "schedule": f"{train.max_steps:,} steps, {_describe_length(config)}",
        "compute": (
            f"{flops_per_token(model) * tokens / 1e12:,.4g} TFLOP per step, without estimates"
        ),
        "memory per rank": (
            f"about {_gigabytes(fixed + activations)} GB{there_is} (weights, gradients, optimizer "
            f"{_gigabytes(fixed)}; activations {_gigabytes(activations)})"
        ),
        "checkpoint": (
            f"{_gigabytes(checkpoint_bytes(config))} GB, "
            f"the newest {train.keep_checkpoints} and the best are kept"
        ),
        "data": str(config.data_folder) + ("" if is_prepared else " (not prepared)"),
        "output": str(config.run_dir),
        "code": describe_commit(),
        "start": start,
    }
    for name, value in rows.items():
        print(f"{name:17} {value}", flush=True)


def _describe_length(config: Config) -> str:
    """Return the tokens of the schedule, and how often it goes through the training data."""
    tokens = config.train.max_steps * config.tokens_per_step
    path = config.data_folder / "train.bin"
    if not path.exists():
        return f"{tokens:,} tokens"
    epochs = tokens / (path.stat().st_size / 2)
    return f"{tokens:,} tokens, {epochs:,.3g} epochs"
