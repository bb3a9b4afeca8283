"""Token files in nanoGPT's format, raw little-endian uint16 tokens: opened and checked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from runtime.cli import UserError

# Files up to this size are searched for tokens outside the vocabulary before training; larger ones
# are checked window by window as they are read.
SCAN_TOKENS = 1_000_000_000
# Which script makes data of a vocabulary, by its number of tokens; otherwise OpenWebText's.
PREPARED_BY = {257: "data/stdlib/prepare.py", 1024: "data/stdlib/prepare.py --bpe"}
ROOT = Path(__file__).resolve().parents[1]


def fingerprint(tokens: np.ndarray) -> str:
    """Return a sha256 of the length and of 16 evenly spaced blocks of 256 KiB.

    That is all of a small file, and a sample of a large one.
    """
    block = 131_072
    starts = np.linspace(0, max(len(tokens) - block, 0), 16).astype(int)
    digest = hashlib.sha256(str(len(tokens)).encode())
    for start in starts:
        digest.update(tokens[start : start + block].tobytes())
    return digest.hexdigest()


def fingerprints(tokens: dict[str, np.ndarray]) -> dict[str, str]:
    """Return the fingerprint of each split."""
    return {split: fingerprint(array) for split, array in tokens.items()}


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the folder's meta.json, or {} if there is none, as in nanoGPT's folders.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / "meta.json"
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        counts = [meta["vocab_size"], *(split["tokens"] for split in meta["splits"].values())]
        if not all(isinstance(count, int) and count > 0 for count in counts):
            raise ValueError("counts must be positive integers")
        return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged; prepare the data again in another folder, with --out"
        ) from error


def open_tokens(folder: Path, split: str, vocab_size: int, block_size: int) -> np.ndarray:
    """Memory-map `folder`/`split`.bin, uint16.

    Raises:
        UserError: if it is missing, truncated, shorter than a window, not what its meta.json
            describes, or contains tokens outside the vocabulary.
    """
    path = folder / f"{split}.bin"
    if not path.is_file():
        script = PREPARED_BY.get(vocab_size, "data/openwebtext/prepare.py")
        command = f"{ROOT}/{script} --out {folder}"
        if (folder / "prepare.py").exists():
            command = str(folder / "prepare.py")
        raise UserError(f"{path}: no such file; make it first: python {command}")

    # Size and vocabulary, as far as meta.json is there to tell.
    meta = read_meta(folder)
    facts = meta.get("splits", {}).get(split, {})
    size = path.stat().st_size
    expected = facts.get("tokens")
    if size % 2 or (expected is not None and size != 2 * expected):
        wanted = "an even number" if expected is None else f"{2 * expected}, as in its meta.json"
        raise UserError(
            f"{path}: {size} bytes instead of {wanted}; truncated or not ours: prepare it again"
        )
    if meta.get("vocab_size", vocab_size) != vocab_size:
        raise UserError(
            f"{folder}: its vocabulary has {meta['vocab_size']} tokens; set model.vocab_size = "
            f"{meta['vocab_size']}, or one more, for the mask, if model.causal = false"
        )
    if size // 2 < block_size + 1:
        raise UserError(
            f"{path}: {size // 2} tokens, shorter than a window of block_size + 1 = "
            f"{block_size + 1}"
        )

    # Content.
    tokens = np.memmap(path, dtype="<u2", mode="r")
    if facts.get("fingerprint") not in (None, fingerprint(tokens)):
        raise UserError(f"{path}: its content does not match its meta.json; prepare it again")
    if len(tokens) <= SCAN_TOKENS:
        check_vocabulary(int(tokens.max()), vocab_size, path)
    return tokens


def check_vocabulary(largest: int, vocab_size: int, where: object) -> None:
    """Refuse a token without a row in the embedding table (on a GPU: a device-side assert)."""
    if largest >= vocab_size:
        raise UserError(
            f"{where}: contains token {largest}, but model.vocab_size is {vocab_size}; "
            f"was it made with another tokenizer?"
        )
