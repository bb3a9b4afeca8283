"""Tokens → batches. The batch of a step is a pure function of (seed, step).

The window offsets of a step come from a counter-based generator, and each rank and micro-batch takes its slice of
them. So a resumed run needs no loader state, another number of ranks or another micro-batch sees the same sequences,
and all optimizers see the same tokens in the same order.

Shapes: B sequences of T = block_size tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data.token_files import refuse_beyond_vocabulary

# What a step's random numbers are for; each purpose has a stream of its own.
WINDOWS, LABELS, PROBES = range(3)


def window_offsets(seed: int, step: int, n_tokens: int, block_size: int, batch_size: int) -> np.ndarray:
    """Where the sequences of a step begin: (batch_size,) int64, uniform over all windows, with replacement."""
    raw = _generator(seed, step, WINDOWS).random_raw(batch_size)
    # Raw output and not Generator.integers, whose stream numpy may change between releases. The modulo's bias is
    # below 1e-9 for any file that fits a disk.
    return (raw % np.uint64(n_tokens - block_size)).astype(np.int64)


def label_uniforms(seed: int, step: int, batch_size: int, block_size: int) -> np.ndarray:
    """Numbers in [0, 1), (batch_size, T) float32, one for each label that a step's Hessian estimate samples."""
    raw = _generator(seed, step, LABELS).random_raw(batch_size * block_size)
    return ((raw >> np.uint64(40)).astype(np.float32) / np.float32(2**24)).reshape(batch_size, block_size)


def probe_seed(seed: int, step: int) -> int:
    """Seed of the torch generator that draws Hutchinson's probes of a step: on all ranks the same."""
    return int(_generator(seed, step, PROBES).random_raw()) >> 1  # torch takes 63 bits on every device


def _generator(seed: int, step: int, purpose: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=np.array([0, 0, 0, step], np.uint64))


def rank_slices(n: int, micro_batch_size: int, rank: int, world_size: int) -> Iterator[slice]:
    """The micro-batches of one rank, as slices of the batch of n sequences."""
    share = n // world_size
    for start in range(rank * share, (rank + 1) * share, micro_batch_size):
        yield slice(start, start + micro_batch_size)


def read_windows(tokens: np.ndarray, offsets: np.ndarray, block_size: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) int64 of the windows at `offsets`; targets are the inputs shifted by one token."""
    plain = np.asarray(tokens)  # slicing a memmap costs ten times as much
    windows = np.stack([plain[i : i + block_size + 1] for i in offsets]).astype(np.int64)  # (B, T + 1)
    refuse_beyond_vocabulary(int(windows.max()), vocab_size, getattr(tokens, "filename", "tokens"))
    pairs = torch.from_numpy(windows)
    return pairs[:, :-1].contiguous(), pairs[:, 1:].contiguous()


def validation_windows(
    tokens: np.ndarray, block_size: int, limit: int, batch_size: int, vocab_size: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One rank's share of the first `limit` (0: all) whole windows, end to end, in batches of one shape (B, T).

    Every token but the first is predicted once, over all ranks. The batch that the windows do not fill is filled up
    with targets of -1, which `summed_loss` leaves out: one shape for the compiler.
    """
    count = (len(tokens) - 1) // block_size
    mine = np.arange(min(count, limit) if limit else count)[rank::world_size] * block_size
    for start in range(0, len(mine), batch_size):
        offsets = mine[start : start + batch_size]
        filler = batch_size - len(offsets)
        x, y = read_windows(tokens, np.concatenate([offsets, np.zeros(filler, np.int64)]), block_size, vocab_size)
        y[batch_size - filler :] = -1
        yield x, y
