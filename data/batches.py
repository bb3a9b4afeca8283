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
from runtime.config import ModelConfig

# What a step's random numbers are for; each purpose has a stream of its own.
WINDOWS, LABELS, PROBES, MASKS = range(4)


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


def masked_positions(seed: int, step: int, batch_size: int, shape: ModelConfig) -> Tensor:
    """Which tokens of a step's sequences are masked: (batch_size, T) bool, labels_per_sequence of them in each."""
    raw = _generator(seed, step, MASKS).random_raw(batch_size * shape.block_size).reshape(batch_size, shape.block_size)
    chosen = raw.argsort(axis=1, kind="stable")[:, : shape.labels_per_sequence]
    masked = np.zeros(raw.shape, bool)
    np.put_along_axis(masked, chosen, True, axis=1)
    return torch.from_numpy(masked)


def mask_tokens(x: Tensor, masked: Tensor, mask_token: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of masked language modelling: the tokens behind the masks, and -1 elsewhere.

    Every chosen token is masked. BERT leaves or exchanges a fifth of them, for a fine-tuning that never comes here.
    """
    return x.masked_fill(masked, mask_token), x.masked_fill(~masked, -1)


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
    tokens: np.ndarray, shape: ModelConfig, limit: int, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One rank's share of the first `limit` (0: all) whole windows, end to end, in batches of one shape (B, T).

    Every token but the first is predicted once, over all ranks (or, masked, the same 15 % of them in every run). The
    batch that the windows do not fill is filled up with targets of -1, which `summed_loss` leaves out: one shape for
    the compiler.
    """
    count = (len(tokens) - 1) // shape.block_size
    mine = np.arange(min(count, limit) if limit else count)[rank::world_size]
    for start in range(0, len(mine), batch_size):
        windows = mine[start : start + batch_size]
        filler = batch_size - len(windows)
        offsets = np.concatenate([windows * shape.block_size, np.zeros(filler, np.int64)])
        x, y = read_windows(tokens, offsets, shape.block_size, shape.text_vocab_size)
        if not shape.causal:
            masked = [masked_positions(0, int(window), 1, shape) for window in offsets // shape.block_size]
            x, y = mask_tokens(x, torch.cat(masked), shape.mask_token)
        y[batch_size - filler :] = -1
        yield x, y
