"""Token files: opened, checked and told apart. They are nanoGPT's: raw little-endian uint16 tokens, nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from runtime.cli import UserError

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
        own = folder / "prepare.py"
        make = str(own) if own.exists() else f"data/openwebtext/prepare.py --out {folder}"
        raise UserError(f"{path}: no such file; make it first: python {make}")
    meta = read_meta(folder)
    size = path.stat().st_size
    expected = meta.get("splits", {}).get(split, {}).get("tokens")
    if size % 2 or (expected is not None and size != 2 * expected):
        wanted = f"{2 * expected} bytes by its meta.json" if expected is not None else "an even number of bytes"
        raise UserError(f"{path}: {size} bytes, but {wanted}; it is truncated or not ours: prepare it again")
    if meta.get("vocab_size", vocab_size) != vocab_size:
        raise UserError(
            f"{folder}: vocabulary of {meta['vocab_size']} tokens; set model.vocab_size = {meta['vocab_size']}, "
            f"or one more if model.causal = false, for the mask"
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
