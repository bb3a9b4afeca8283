"""Batches of token windows. The batch of a step is a pure function of (seed, step).

A counter-based generator draws a step's window offsets, and each rank and micro-batch takes its
slice of them. So a resumed run needs no loader state, another number of ranks or another
micro-batch sees the same sequences, and all optimizers see the same tokens in the same order.

Shapes: B sequences of T = block_size tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data.token_files import check_vocabulary
from model import ModelConfig
from runtime.distributed import Ranks

# Every use of random numbers has its own stream.
WINDOWS, LABELS, PROBES, MASKS = range(4)


def window_offsets(
    seed: int, step: int, n_tokens: int, block_size: int, batch_size: int
) -> np.ndarray:
    """Return where the sequences of a step start: (batch_size,) int64.

    Uniform over all windows, with replacement. A smaller batch is the beginning of a larger one.
    """
    raw = _generator(seed, step, WINDOWS).random_raw(batch_size)
    # Raw output instead of Generator.integers, whose stream numpy may change between releases. The
    # modulo's bias is below 1e-6 for any file that fits on a disk.
    return (raw % np.uint64(n_tokens - block_size)).astype(np.int64)


def label_uniforms(seed: int, step: int, batch_size: int, block_size: int) -> np.ndarray:
    """Return one number in [0, 1) per label that a step's estimate samples: (batch_size, T)."""
    raw = _generator(seed, step, LABELS).random_raw(batch_size * block_size)
    uniforms = (raw >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    return uniforms.reshape(batch_size, block_size)


def probe_seed(seed: int, step: int) -> int:
    """Return the seed for Hutchinson's probes of a step, the same on all ranks."""
    raw = _generator(seed, step, PROBES).random_raw()
    return int(raw) >> 1  # torch takes 63 bits on every device


def masked_positions(seed: int, step: int, batch_size: int, shape: ModelConfig) -> Tensor:
    """Return which tokens of a step's sequences are masked: (batch_size, T) bool.

    Each sequence has labels_per_sequence of them.
    """
    T = shape.block_size
    raw = _generator(seed, step, MASKS).random_raw(batch_size * T).reshape(batch_size, T)
    chosen = raw.argsort(axis=1, kind="stable")[:, : shape.labels_per_sequence]
    masked = np.zeros(raw.shape, bool)
    np.put_along_axis(masked, chosen, True, axis=1)
    return torch.from_numpy(masked)


def mask_tokens(x: Tensor, masked: Tensor, mask_token: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B, T) of masked language modelling.

    Targets are the tokens behind the masks, and -1 elsewhere. Every chosen token is masked. BERT
    keeps or replaces a fifth of them to prepare for fine-tuning; we do not fine-tune.
    """
    return x.masked_fill(masked, mask_token), x.masked_fill(~masked, -1)


def _generator(seed: int, step: int, purpose: int) -> np.random.Philox:
    key = np.array([seed, purpose], np.uint64)
    counter = np.array([0, 0, 0, step], np.uint64)
    return np.random.Philox(key=key, counter=counter)


def rank_slices(n: int, micro_batch_size: int, ranks: Ranks) -> list[slice]:
    """Return one rank's micro-batches as slices of a batch of n sequences."""
    share = n // ranks.world_size
    first = ranks.rank * share
    starts = range(first, first + share, micro_batch_size)
    return [slice(start, start + micro_batch_size) for start in starts]


def read_windows(
    tokens: np.ndarray, offsets: np.ndarray, block_size: int, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B, T) int64 of the windows at `offsets`.

    Targets are the inputs shifted by one token. Raises UserError for a token outside the
    vocabulary.
    """
    plain = np.asarray(tokens)  # slicing a memmap takes ten times as long
    windows = np.stack([plain[i : i + block_size + 1] for i in offsets]).astype(np.int64)
    check_vocabulary(int(windows.max()), vocab_size, getattr(tokens, "filename", "tokens"))
    pairs = torch.from_numpy(windows)  # (B, T + 1)
    return pairs[:, :-1].contiguous(), pairs[:, 1:].contiguous()


def validation_windows(
    tokens: np.ndarray, shape: ModelConfig, limit: int, batch_size: int, ranks: Ranks
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one rank's share of the first `limit` (0: all) whole windows, in batches (B, T).

    Over all ranks, every token but the first is predicted once (or, with masks, the same 15 % of
    them in every run). An incomplete batch is filled up with targets of -1, which `summed_loss`
    ignores, so that the compiler sees only one shape.
    """
    count = (len(tokens) - 1) // shape.block_size
    if limit:
        count = min(count, limit)
    own = np.arange(count)[ranks.rank :: ranks.world_size]

    for start in range(0, len(own), batch_size):
        windows = own[start : start + batch_size]
        filler = batch_size - len(windows)
        padded = np.concatenate([windows, np.zeros(filler, np.int64)])
        offsets = padded * shape.block_size
        x, y = read_windows(tokens, offsets, shape.block_size, shape.text_vocab_size)
        if not shape.causal:
            masked = [masked_positions(0, int(window), 1, shape) for window in padded]
            x, y = mask_tokens(x, torch.cat(masked), shape.mask_token)
        y[batch_size - filler :] = -1
        yield x, y
