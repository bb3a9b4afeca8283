"""Token files → batches. The batch of a step is a pure function of (seed, step).

A file is nanoGPT's: raw little-endian uint16 tokens. The window offsets of a step come from a counter-based generator,
and each rank and micro-batch takes its slice of them. So a resumed run needs no loader state, another number of ranks
or another micro-batch sees the same sequences, and all optimizers see the same tokens in the same order.

Shapes: B sequences of T = block_size tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errors import UserError

# What a step's random numbers are for; each purpose has a stream of its own.
WINDOWS, LABELS, PROBES = range(3)

# Files up to this size are searched for tokens beyond the vocabulary before training; larger ones as they are read.
SCAN_TOKENS = 1_000_000_000


def fingerprint(tokens: np.ndarray) -> str:
    """sha256 of the length and of 16 evenly spread blocks of 256 KiB: all of a small file, a sample of a large one."""
    block = 131_072
    starts = np.linspace(0, max(len(tokens) - block, 0), 16).astype(int)
    digest = hashlib.sha256(str(len(tokens)).encode())
    for start in starts:
        digest.update(tokens[start : start + block].tobytes())
    return digest.hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """The folder's meta.json, or {} where there is none (files made by nanoGPT). Raises UserError for a damaged one."""
    path = folder / "meta.json"
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        numbers = [meta["vocab_size"], *(split["tokens"] for split in meta["splits"].values())]
        if not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ValueError("counts must be positive numbers")
        return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path}: damaged; remove it and the .bin files beside it, and prepare the data again"
        ) from None


def open_tokens(folder: Path, split: str, vocab_size: int, block_size: int) -> np.ndarray:
    """Map `folder`/`split`.bin and check that it is whole, long enough for a window, and within the vocabulary.

    Raises UserError where it is not.
    """
    path = folder / f"{split}.bin"
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it first, e.g. python data/openwebtext/prepare.py --out {folder}")
    meta = read_meta(folder)
    size = path.stat().st_size
    expected = meta.get("splits", {}).get(split, {}).get("tokens")
    if size % 2 or (expected is not None and size != 2 * expected):
        wanted = f"{2 * expected} bytes by its meta.json" if expected is not None else "an even number of bytes"
        raise UserError(f"{path}: {size} bytes, but {wanted}; it is truncated or not ours: prepare it again")
    if meta.get("vocab_size", vocab_size) != vocab_size:
        raise UserError(
            f"{folder}: vocabulary of {meta['vocab_size']} tokens; set model.vocab_size = {meta['vocab_size']}"
        )
    if size // 2 < block_size + 1:
        raise UserError(f"{path}: {size // 2} tokens, shorter than one window of block_size + 1 = {block_size + 1}")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    promised = meta.get("splits", {}).get(split, {}).get("fingerprint")
    if promised not in (None, fingerprint(tokens)):
        raise UserError(f"{path}: its content is not what the meta.json beside it says; prepare it again")
    if len(tokens) <= SCAN_TOKENS:
        refuse_beyond_vocabulary(int(tokens.max()), vocab_size, path)
    return tokens


def refuse_beyond_vocabulary(largest: int, vocab_size: int, where: object) -> None:
    """Raise UserError for a token that the embedding table does not have (on a GPU: an assert far away)."""
    if largest >= vocab_size:
        raise UserError(f"{where}: token {largest} is beyond model.vocab_size {vocab_size}; another tokenizer's file?")


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
    windows = np.stack([tokens[i : i + block_size + 1] for i in offsets]).astype(np.int64)  # (B, T + 1)
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
