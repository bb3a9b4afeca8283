"""What a run would be, found out before it begins: does the batch divide, how long, how large (--dry-run)."""

from __future__ import annotations

from pathlib import Path

import torch

from model import GPT, activation_bytes, flops_per_token, hvp_bytes, num_parameters
from runtime.cli import UserError
from runtime.config import Config, ModelConfig, OptimizerConfig

# A parameter's probe, product and estimate in fp32, less the gradient that a training step would have.
PROBE_BYTES = 8
# A Hessian-vector product, forward over reverse, has to differentiate every matrix product of a gradient, and the
# derivative of A B is two products more, A' B + A B'.
GRADIENTS_PER_HVP = 3


def step_flops(model: ModelConfig, batch_size: int, optimizer: OptimizerConfig) -> float:
    """Floating-point operations of a step, the estimates' share counted in (model.flops_per_token a gradient).

    The optimizer's own arithmetic is left out: a dozen operations a parameter, or Muon's and SOAP's matrix products.
    """
    sequences = float(batch_size)
    if optimizer.hessian_interval and optimizer.hessian_batch_size:
        gradients = GRADIENTS_PER_HVP if optimizer.hessian_estimator == "hutchinson" else 1
        sequences += gradients * optimizer.hessian_batch_size / optimizer.hessian_interval
    return sequences * model.block_size * flops_per_token(model)


def check_divisible(config: Config, world_size: int) -> None:
    """Refuse a batch that ranks and micro-batches do not divide, naming the nearest numbers that work."""
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    if batch % (micro * world_size):
        unit = micro * world_size
        batches = sorted({max(batch // unit, 1) * unit, (batch // unit + 1) * unit})
        micros = [m for m in range(1, batch + 1) if batch % (m * world_size) == 0]
        nearest = f"train.batch_size {' or '.join(map(str, batches))}"
        if micros:
            nearest += f", or train.micro_batch_size {min(micros, key=lambda m: abs(m - micro))}"
        raise UserError(
            f"train.batch_size {batch} is not divisible by {unit} "
            f"(train.micro_batch_size {micro} × {world_size} ranks); use {nearest}"
        )
    estimate = config.optimizer.hessian_batch_size
    if estimate and estimate % world_size:
        lower, upper = estimate // world_size * world_size, (estimate // world_size + 1) * world_size
        nearest = f"{lower} or {upper}" if lower else str(upper)
        raise UserError(
            f"optimizer.hessian_batch_size {estimate} is not divisible by {world_size} ranks; use {nearest}"
        )


def hessian_micro_batch_size(config: Config, world_size: int) -> int:
    """Sequences a rank estimates on at once: the largest divisor of its share that the config allows.

    Where it says nothing, as many as need no more memory than a micro-batch of training, but at least one.
    """
    recipe, optimizer = config.train, config.optimizer
    share = (optimizer.hessian_batch_size or 0) // world_size
    most = optimizer.hessian_micro_batch_size or recipe.micro_batch_size
    if optimizer.hessian_estimator == "hutchinson" and optimizer.hessian_micro_batch_size is None:
        room = activation_bytes(config.model, recipe.dtype, recipe.micro_batch_size, recipe.loss_chunk)
        most = min(most, (room - PROBE_BYTES * num_parameters(config.model)) // hvp_memory(config))
    return max(size for size in range(1, max(min(most, share), 1) + 1) if share % size == 0)


def hvp_memory(config: Config) -> int:
    """Of the Hessian-vector product of a sequence, which float16 is too narrow for."""
    dtype = "float32" if config.train.dtype == "float16" else config.train.dtype
    return hvp_bytes(config.model, dtype, config.train.compile)


def optimizer_numbers(config: Config) -> int:
    """How many numbers the optimizer keeps."""
    with torch.device("meta"):
        shapes = [(p.shape, "blocks" in name and p.ndim == 2) for name, p in GPT(config.model).named_parameters()]
    kept = 0
    for shape, decays in shapes:
        momentum_alone = config.optimizer.name == "lion" or (config.optimizer.name == "muon" and decays)
        kept += shape.numel() * (1 if momentum_alone else 2)
        if config.optimizer.name == "soap" and len(shape) == 2:
            # A factor and its basis a side, up to 10,000 (its default).
            kept += sum(2 * side**2 for side in shape if side <= 10_000)
    return kept


def print_plan(config: Config, world_size: int, device: str) -> None:
    """--dry-run: what this run would be, before any of it exists."""
    recipe = config.train
    n = num_parameters(config.model)
    states = optimizer_numbers(config) / n
    shares = world_size if recipe.shard_optimizer else 1
    fixed = 4 * n * (2 + states / shares) + (0 if recipe.dtype == "float32" else 2 * n)  # autocast copies the weights
    activations = activation_bytes(config.model, recipe.dtype, recipe.micro_batch_size, recipe.loss_chunk)
    if config.optimizer.hessian_estimator == "hutchinson":
        size = hessian_micro_batch_size(config, world_size)
        activations = max(activations, PROBE_BYTES * n + size * hvp_memory(config))
    tokens = recipe.batch_size * config.model.block_size
    steps = f"{recipe.max_steps:,} steps, {recipe.max_steps * tokens:,} tokens"
    accumulation = recipe.batch_size // (recipe.micro_batch_size * world_size)
    estimate = ""
    if config.optimizer.hessian_interval:
        share = (config.optimizer.hessian_batch_size or 0) // world_size
        size = hessian_micro_batch_size(config, world_size)
        estimate = f"every {config.optimizer.hessian_interval} steps, {share // size} × {size} sequences a rank"
    rows = {
        "run": f"{config.experiment}/{config.run} on {world_size} × {device}, {recipe.dtype}",
        "parameters": f"{n:,}",
        "tokens a step": f"{tokens:,} = {recipe.batch_size} sequences of {config.model.block_size}",
        "accumulation": f"{accumulation} micro-batches of {recipe.micro_batch_size} sequences a rank",
        "Hessian estimate": estimate or "none",
        "length": steps,
        "compute": f"{flops_per_token(config.model) * tokens / 1e12:,.4g} TFLOP a step, estimates not counted",
        "memory a rank": f"about {(fixed + activations) / 1e9:.3g} GB "
        f"(weights, gradients, optimizer {fixed / 1e9:.3g}; activations {activations / 1e9:.3g})",
        "checkpoint": f"{4 * n * (1 + states) / 1e9:.3g} GB, {recipe.keep_checkpoints} newest and the best kept",
        "output": str(config.run_dir),
        "data": config.data.path + ("" if Path(config.data.path, "train.bin").exists() else " (not prepared yet)"),
    }
    print("\n".join(f"{name:17} {value}" for name, value in rows.items()))
