"""What a run costs, by arithmetic: parameters, floating-point operations, bytes of memory."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from model import GPT, ModelConfig
from runtime.config import Config

FP32_BYTES = 4
AUTOCAST_BYTES = 2  # per parameter, for 16-bit copies of the weights

# A Hessian-vector product, forward over reverse, differentiates every matrix product of a
# gradient, and the derivative of A B consists of two products, A' B + A B'.
GRADIENTS_PER_HVP = 3

MUON_ITERATIONS = 5  # of Newton and Schulz, per step
SOAP_FREQUENCY = 10  # steps between updates of the eigenbases


class Bytes(NamedTuple):
    """What is kept for the backward pass: bytes per channel and token of a block, and so on."""

    block: int  # per channel and token of each block
    stream: int  # per channel and token, once
    logit: int
    score: int = 0  # per attention score


# At the peak of a step, under the keys (compiled, 16-bit autocast). Counted with torch's CUDA
# build by tests/cuda_without_gpu. Eager code keeps the log-probabilities in fp32 and needs twice as
# much for the gradient of the loss; compiled code computes them again from the logits.
STEP_BYTES = {
    (False, True): Bytes(block=36, stream=0, logit=12),
    (False, False): Bytes(block=64, stream=0, logit=12),
    (True, True): Bytes(block=36, stream=6, logit=2),
    (True, False): Bytes(block=64, stream=12, logit=4),
}
# Compiled, per entry of the embedding: its gradient as the output head. With loss_chunk, the sum
# over the chunks is in fp32, and so is the gradient of the last hidden states.
HEAD_BYTES, CHUNKED_HEAD_BYTES, CHUNKED_STREAM_BYTES = 3, 7, 10

# The same for a Hessian-vector product, which keeps every tensor together with its derivative, and
# the T × T scores of every head because attention is not fused there.
PRODUCT_BYTES = {
    (False, True): Bytes(block=144, stream=0, logit=16, score=24),
    (False, False): Bytes(block=240, stream=0, logit=20, score=24),
    (True, True): Bytes(block=72, stream=0, logit=8, score=11),
    (True, False): Bytes(block=120, stream=0, logit=14, score=11),
}
# Per parameter: the probe, the sum of the estimates, and one estimate, all in fp32. Eager code also
# holds gradients, their derivatives and copies of the weights.
COMPILED_PRODUCT_PARAMETER_BYTES, EAGER_PRODUCT_PARAMETER_BYTES = 12, 23


@functools.cache
def num_parameters(config: ModelConfig) -> int:
    """Return the number of stored parameters, padding rows included, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of a forward and backward pass per token: 6 N + 12 n_layer C T.

    From PaLM (arXiv 2204.02311, appendix B). N does not count the position embedding, which is
    looked up and never multiplied.
    """
    n = num_parameters(config) - config.block_size * config.n_embd
    return 6 * n + 12 * config.n_layer * config.n_embd * config.block_size


def step_flops(config: Config) -> float:
    """Return the FLOPs of a step, including Hessian estimates and the products of Muon and SOAP.

    The other arithmetic of optimizers is not counted: a dozen operations per parameter.
    """
    sequences = float(config.train.batch_size)
    if config.hessian_interval:
        hutchinson = config.optimizer.hessian_estimator == "hutchinson"
        gradients = GRADIENTS_PER_HVP if hutchinson else 1
        sequences += gradients * config.hessian_batch_size / config.hessian_interval
    model = sequences * config.model.block_size * flops_per_token(config.model)
    return model + optimizer_flops(config)


def optimizer_flops(config: Config) -> float:
    """Return the FLOPs of the matrix products in a step of Muon or SOAP, 0 for others."""
    C, total = config.model.n_embd, 0.0
    for rows, columns in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C)):
        short, long = min(rows, columns), max(rows, columns)
        if config.optimizer.name == "muon":
            # X Xᵀ, its square, and the square times X, in each iteration.
            total += MUON_ITERATIONS * (4 * short**2 * long + 2 * short**3)
        elif config.optimizer.name == "soap":
            # From both sides: into the eigenbasis twice, back once, and the averages; every few
            # steps a product and a QR decomposition (4/3 n³, and as much again to form Q).
            sides = 2 * rows * columns * (rows + columns)
            bases = (2 + 8 / 3) * (rows**3 + columns**3) / SOAP_FREQUENCY
            total += 4 * sides + bases
    return config.model.n_layer * total


def activation_bytes(
    config: ModelConfig, dtype: str, compiled: bool, sequences: int, loss_chunk: int = 0
) -> int:
    """Return the bytes that a micro-batch of a step needs besides weights, gradients and states."""
    unit = STEP_BYTES[compiled, dtype != "float32"]
    tokens, width = sequences * config.block_size, config.n_embd
    chunk = min(loss_chunk or tokens, tokens)

    stream, head = unit.stream, HEAD_BYTES if compiled else 0
    if compiled and chunk < tokens:
        stream, head = CHUNKED_STREAM_BYTES, CHUNKED_HEAD_BYTES
    total = tokens * width * (unit.block * config.n_layer + stream)
    return total + config.vocab_size * (unit.logit * chunk + head * width)


def product_bytes(config: ModelConfig, dtype: str, compiled: bool) -> int:
    """Return the bytes that a Hessian-vector product needs per sequence."""
    unit = PRODUCT_BYTES[compiled, dtype == "bfloat16"]  # in fp32 under fp16 too
    T = config.block_size
    block = unit.block * config.n_embd + unit.score * config.n_head * T
    return T * (config.n_layer * block + unit.logit * config.vocab_size)


def product_parameter_bytes(config: Config, world_size: int) -> int:
    """Return what Hessian-vector products need besides :func:`fixed_bytes`, whatever their size.

    A single rank has no gradients at that time, several have DDP's buckets. fixed_bytes also counts
    16-bit copies of the weights, which the product's own bytes include.
    """
    per_parameter = EAGER_PRODUCT_PARAMETER_BYTES
    if config.train.compile:
        per_parameter = COMPILED_PRODUCT_PARAMETER_BYTES
    if world_size == 1:
        per_parameter -= FP32_BYTES
    if config.train.dtype != "float32":
        per_parameter -= AUTOCAST_BYTES
    return per_parameter * num_parameters(config.model)


class StateSize(NamedTuple):
    """A parameter tensor, and the numbers that the optimizer keeps for it."""

    is_matrix: bool  # a weight matrix of a block, which decays
    parameters: int
    states: int


def state_sizes(config: Config) -> list[StateSize]:
    """Return how many numbers the optimizer keeps for each parameter tensor."""
    sizes = []
    for is_matrix, shape in parameter_shapes(config.model):
        momentum_only = config.optimizer.name == "lion" or (
            config.optimizer.name == "muon" and is_matrix
        )
        states = shape.numel() * (1 if momentum_only else 2)
        if config.optimizer.name == "soap" and is_matrix:
            # A preconditioner and its eigenbasis for each side.
            states += sum(2 * side**2 for side in shape)
        sizes.append(StateSize(is_matrix, shape.numel(), states))
    return sizes


@functools.cache
def parameter_shapes(config: ModelConfig) -> list[tuple[bool, torch.Size]]:
    """Return for each parameter tensor whether it is a weight matrix of a block, and its shape."""
    with torch.device("meta"):
        model = GPT(config)
    return [(p.ndim == 2 and "blocks" in name, p.shape) for name, p in model.named_parameters()]


def sharded_states(config: Config, world_size: int) -> int:
    """Return how many numbers the fullest rank keeps with train.shard_optimizer.

    ZeroRedundancyOptimizer takes the groups one after the other, matrices first, and gives the
    largest remaining tensor to the rank that has the fewest parameters. Muon and SOAP start again
    for AdamW's part.
    """
    loads, states = [0] * world_size, [0] * world_size
    for is_matrix in (True, False):
        if not is_matrix and config.optimizer.name in ("muon", "soap"):
            loads = [0] * world_size
        sizes = [size for size in state_sizes(config) if size.is_matrix == is_matrix]
        for size in sorted(sizes, key=lambda size: -size.parameters):
            rank = loads.index(min(loads))
            loads[rank] += size.parameters
            states[rank] += size.states
    return max(states)


def fixed_bytes(config: Config, world_size: int) -> int:
    """Return the bytes for weights, gradients and optimizer state, of the fullest rank."""
    n = num_parameters(config.model)
    states = sum(size.states for size in state_sizes(config))
    if config.train.shard_optimizer:
        states = sharded_states(config, world_size)
    autocast_copies = 0 if config.train.dtype == "float32" else AUTOCAST_BYTES * n
    return FP32_BYTES * (2 * n + states) + autocast_copies


def checkpoint_bytes(config: Config) -> int:
    """Return the size of a checkpoint file."""
    states = sum(size.states for size in state_sizes(config))
    return FP32_BYTES * (num_parameters(config.model) + states)
