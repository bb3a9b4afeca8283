"""What a run costs, by arithmetic: parameters, floating-point operations, bytes of memory."""

from __future__ import annotations

import functools

import torch

from model import GPT, ModelConfig
from runtime.config import Config

FP32_BYTES = 4

# A Hessian-vector product, forward over reverse, differentiates every matrix product of a
# gradient, and the derivative of A B consists of two products, A' B + A B'.
GRADIENTS_PER_HVP = 3

# Bytes that the forward pass keeps for the backward pass, counted on autograd's saved tensors with
# fused attention: per channel and token of a block, in fp32 and under a 16-bit autocast, and per
# logit (fp32 log-probabilities, and twice as much for the gradient of the loss).
BLOCK_BYTES_FP32, BLOCK_BYTES_16_BIT = 64, 36
LOGIT_BYTES = 12

# The same for a Hessian-vector product, which keeps every tensor together with its derivative, and
# the T × T scores of every head because attention is not fused there. Counted in eager mode; a
# compiled product took 0.46 of it on a CPU.
HVP_BLOCK_BYTES_FP32, HVP_BLOCK_BYTES_16_BIT = 240, 144
HVP_LOGIT_BYTES_FP32, HVP_LOGIT_BYTES_16_BIT = 20, 16
HVP_SCORE_BYTES = 24
COMPILED_HVP_DIVISOR = 2

# Per parameter: the fp32 probe, product and estimate, minus the gradient that a training step has.
PROBE_BYTES = 8

SOAP_MAX_DIMENSION = 10_000  # pytorch-optimizer's default: larger sides get no preconditioner


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
    """Return the FLOPs of a step, including its share of the Hessian estimates.

    The optimizer's own arithmetic is not counted: a dozen operations per parameter, or the matrix
    products of Muon and SOAP.
    """
    sequences = float(config.train.batch_size)
    if config.hessian_interval:
        hutchinson = config.optimizer.hessian_estimator == "hutchinson"
        gradients = GRADIENTS_PER_HVP if hutchinson else 1
        sequences += gradients * config.hessian_batch_size / config.hessian_interval
    return sequences * config.model.block_size * flops_per_token(config.model)


def activation_bytes(config: ModelConfig, dtype: str, sequences: int, loss_chunk: int = 0) -> int:
    """Return the bytes that a forward pass keeps for the backward pass (a rule of thumb)."""
    tokens = sequences * config.block_size
    block = BLOCK_BYTES_FP32 if dtype == "float32" else BLOCK_BYTES_16_BIT
    logits = min(loss_chunk or tokens, tokens) * config.vocab_size
    return tokens * block * config.n_layer * config.n_embd + LOGIT_BYTES * logits


def hvp_bytes(config: ModelConfig, dtype: str, compiled: bool) -> int:
    """Return the bytes that a Hessian-vector product keeps per sequence (a rule of thumb)."""
    channel, logit = HVP_BLOCK_BYTES_16_BIT, HVP_LOGIT_BYTES_16_BIT
    if dtype != "bfloat16":  # the product is computed in fp32 under fp16 too
        channel, logit = HVP_BLOCK_BYTES_FP32, HVP_LOGIT_BYTES_FP32

    T = config.block_size
    block = HVP_SCORE_BYTES * config.n_head * T + channel * config.n_embd
    total = T * (config.n_layer * block + logit * config.vocab_size)
    return total // (COMPILED_HVP_DIVISOR if compiled else 1)


def state_size(config: Config) -> int:
    """Return how many numbers the optimizer keeps for the whole model."""
    with torch.device("meta"):
        model = GPT(config.model)

    size = 0
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2
        decays = is_matrix and "blocks" in name
        momentum_only = config.optimizer.name == "lion" or (
            config.optimizer.name == "muon" and decays
        )
        size += parameter.numel() * (1 if momentum_only else 2)
        if config.optimizer.name == "soap" and is_matrix:
            # A preconditioner and its eigenbasis for each side.
            sides = [side for side in parameter.shape if side <= SOAP_MAX_DIMENSION]
            size += sum(2 * side**2 for side in sides)
    return size


def fixed_bytes(config: Config, world_size: int) -> int:
    """Return a rank's bytes for weights, gradients and optimizer state."""
    n = num_parameters(config.model)
    states = state_size(config) / (world_size if config.train.shard_optimizer else 1)
    autocast_copies = 0 if config.train.dtype == "float32" else 2 * n
    return int(FP32_BYTES * (2 * n + states)) + autocast_copies


def checkpoint_bytes(config: Config) -> int:
    """Return the size of a checkpoint file."""
    return FP32_BYTES * (num_parameters(config.model) + state_size(config))
