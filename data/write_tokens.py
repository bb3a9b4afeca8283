"""Write documents as token files: train.bin, val.bin and meta.json.

The files are nanoGPT's: uint16 tokens, document after document, each ended by the end-of-text
token. Tokens go straight to disk in the order of the documents, whatever the number of workers.
Every 10 million tokens, at the end of a shard, progress.json records how far the two files are
complete, and a killed run continues from there. The files have the suffix .partial until all of
them are complete; meta.json is written last.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from data.token_files import fingerprint, read_meta
from data.tokenizer import load_tokenizer
from runtime.cli import UserError, reason
from runtime.files import locked, naming, write_json

# Keeps `datasets` from importing torch, which takes three seconds. Must be set before the import.
os.environ.setdefault("USE_TORCH", "0")

SPLITS = ("train", "val")
DOCUMENTS_PER_TASK = 256  # a worker's unit of work: some megabytes of text
COMMIT_TOKENS = 10_000_000  # write progress.json after this many new tokens

Shard = Callable[[], Iterator[str]]  # yields the texts of one shard


def write_dataset(
    out: Path,
    shards: list[Shard],
    n_documents: int,
    tokenizer: str,
    source: dict[str, Any],
    *,
    val_fraction: float = 0.0005,
    seed: int = 2357,
    workers: int = 1,
) -> dict[str, Any]:
    """Tokenize the first `n_documents` of the shards' documents into the folder `out`.

    Args:
        out: created if missing. An unfinished preparation of the same data is resumed, a finished
            one left alone.
        shards: each yields the texts of one shard when it is called.
        n_documents: at most as many as there are. If it is 1, the end of the document's text is
            the validation set, as with nanoGPT's input.txt.
        tokenizer: a name that :func:`data.tokenizer.load_tokenizer` knows.
        source: identifies the documents; goes into meta.json.
        val_fraction, seed: of the split; the defaults are nanoGPT's for OpenWebText.
        workers: processes that tokenize.

    Returns the content of meta.json.

    Raises:
        UserError: if `out` contains other data, or the number of documents is not as announced.
    """
    by_position = n_documents == 1
    if by_position:
        shards, n_documents = [partial(_cut_in_two, shards, val_fraction)], 2
    else:
        check_split(n_documents, val_fraction)
    recipe = {
        "source": source,
        "documents": n_documents,
        "tokenizer": tokenizer,
        "val_fraction": val_fraction,
        "split_seed": None if by_position else seed,
    }

    with ProcessPoolExecutor(workers, initializer=_exit_with_parent) as pool:
        # The workers load the tokenizer while this process imports datasets.
        loading = [pool.submit(_describe, tokenizer) for _ in range(workers)]
        held_out = {1} if by_position else validation_documents(n_documents, val_fraction, seed)
        vocabulary = loading[0].result()  # an unknown tokenizer fails before any file is made

        out.mkdir(parents=True, exist_ok=True)
        with locked(out), naming(out):
            progress = _find_progress(out, recipe)
            if progress is None:
                return read_meta(out)
            if progress["documents"] < n_documents:
                try:
                    _tokenize(out, shards, recipe, held_out, progress, pool, workers)
                except UserError:
                    _remove_if_empty(out)
                    raise
            return _finish(out, vocabulary, progress)


def check_split(n_documents: int, fraction: float) -> None:
    """Refuse a split that leaves no documents for training or validation."""
    if not 0 < math.ceil(n_documents * fraction) < n_documents:
        raise UserError(
            f"documents: {n_documents}, of which --val-fraction {fraction} leaves none for "
            f"training or validation; use more documents or another fraction"
        )


def validation_documents(n_documents: int, fraction: float, seed: int) -> set[int]:
    """Return the indices of the documents that nanoGPT's split holds out for validation."""
    from datasets import Dataset  # here: it takes a second to import

    indices = Dataset.from_dict({"index": np.arange(n_documents)})
    split = indices.train_test_split(test_size=fraction, seed=seed, shuffle=True)
    return set(split["test"]["index"])


def _cut_in_two(shards: list[Shard], val_fraction: float) -> Iterator[str]:
    """Yield the beginning and the end of the first document's text."""
    text = next(itertools.chain.from_iterable(shard() for shard in shards))
    cut = round(len(text) * (1 - val_fraction))
    if not 0 < cut < len(text):
        raise UserError(
            f"the only document has {len(text)} characters, of which --val-fraction "
            f"{val_fraction} leaves none for training or validation; use more text"
        )
    yield text[:cut]
    yield text[cut:]


# ---- Tokenizing ----------------------------------------------------------------------------------


def _tokenize(
    out: Path,
    shards: list[Shard],
    recipe: dict[str, Any],
    held_out: set[int],
    progress: dict[str, Any],
    pool: ProcessPoolExecutor,
    workers: int,
) -> None:
    """Append what `progress` lacks to the two .partial files, and keep it up to date."""
    n_documents = recipe["documents"]
    with (
        progress_bar(n_documents, progress["documents"]) as bar,
        open(_partial(out, "train"), "r+b") as train,
        open(_partial(out, "val"), "r+b") as val,
    ):
        # Drop what was written after the last commit.
        files: dict[str, BinaryIO] = {"train": train, "val": val}
        for split, file in files.items():
            file.truncate(2 * progress["tokens"][split])
            file.seek(0, os.SEEK_END)

        committed = sum(progress["tokens"].values())
        for shard in shards[progress["shards"] :]:
            bar.set_postfix_str(f"file {progress['shards'] + 1} of {len(shards)}", refresh=False)
            tasks = _tasks(shard(), limit=n_documents - progress["documents"])
            for tokens, lengths in _encode_in_order(pool, recipe["tokenizer"], tasks, workers):
                _append(files, tokens, lengths, held_out, progress)
                bar.update(len(lengths))
            progress["shards"] += 1

            total = sum(progress["tokens"].values())
            if total - committed >= COMMIT_TOKENS:
                _commit(out, files, progress)
                committed = total
            if progress["documents"] == n_documents:
                break

        if progress["documents"] < n_documents:
            raise UserError(
                f"{out}: expected {n_documents} documents, found {progress['documents']}; "
                f"did the input change?"
            )
        _commit(out, files, progress)


def progress_bar(total: int, done: int) -> tqdm:
    """Return a bar that moves on a terminal, and prints a line every half minute in a log."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        initial=done,
        unit="doc",
        desc="tokenize",
        mininterval=interval,
        maxinterval=interval,
    )


def _tasks(texts: Iterator[str], limit: int) -> Iterator[list[str]]:
    """Yield the first `limit` texts in lists of DOCUMENTS_PER_TASK."""
    task: list[str] = []
    for count, text in enumerate(texts):
        if count == limit:
            break
        task.append(text)
        if len(task) == DOCUMENTS_PER_TASK:
            yield task
            task = []
    if task:
        yield task


def _encode_in_order(
    pool: ProcessPoolExecutor, tokenizer: str, tasks: Iterable[list[str]], workers: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yield the tasks' results in the order of the tasks, with a few tasks per worker in memory."""
    waiting: deque[Future] = deque()
    for task in tasks:
        waiting.append(pool.submit(_encode, tokenizer, task))
        if len(waiting) > 4 * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _describe(tokenizer: str) -> dict[str, int]:
    """Load the tokenizer in a worker, and return what meta.json says about it."""
    loaded = load_tokenizer(tokenizer)
    return {"vocab_size": loaded.vocab_size, "end_of_text": loaded.end_of_text}


def _encode(tokenizer: str, texts: list[str]) -> tuple[np.ndarray, list[int]]:
    """Return the concatenated tokens of all texts, each with end-of-text, and their lengths."""
    loaded = load_tokenizer(tokenizer)  # once per process
    end = np.array([loaded.end_of_text], "<u2")
    pieces, lengths = [], []
    for text in texts:
        try:
            tokens = loaded.encode(text)
        except UnicodeEncodeError:  # a lone surrogate, which JSON can express and UTF-8 cannot
            valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            tokens = loaded.encode(valid)
        pieces += [tokens, end]
        lengths.append(len(tokens) + 1)
    return np.concatenate(pieces, dtype="<u2", casting="unsafe"), lengths


def _append(
    files: dict[str, BinaryIO],
    tokens: np.ndarray,
    lengths: list[int],
    held_out: set[int],
    progress: dict[str, Any],
) -> None:
    """Append a task's documents to the files of their splits, one write per run of documents."""
    first = progress["documents"]
    splits = ["val" if first + i in held_out else "train" for i in range(len(lengths))]
    start = 0
    for split, documents in itertools.groupby(zip(splits, lengths, strict=True), key=itemgetter(0)):
        end = start + sum(length for _, length in documents)
        with naming(Path(files[split].name)):
            files[split].write(tokens[start:end].data)
        progress["tokens"][split] += end - start
        start = end
    progress["documents"] += len(lengths)
    progress["val_documents"] += splits.count("val")


def _exit_with_parent() -> None:
    """Make a worker exit when its parent is killed; otherwise it would wait for work forever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- Progress ------------------------------------------------------------------------------------


def _find_progress(out: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """Return the progress to continue from, or None if the folder is complete."""
    path = out / "progress.json"
    if (out / "meta.json").exists():
        meta = read_meta(out)
        if meta.get("recipe") != recipe:
            raise UserError(
                f"{out}: contains data of another recipe (see its meta.json); choose another --out"
            )
        path.unlink(missing_ok=True)
        if all(_is_as_recorded(out, split, meta) for split in SPLITS):
            return None
        print(f"{out}: its files do not match its meta.json; preparing them again")
        for name in ("meta.json", "train.bin", "val.bin"):
            (out / name).unlink(missing_ok=True)

    if path.exists():
        progress = _read_progress(path)
        if progress["recipe"] != recipe:
            raise UserError(
                f"{out}: contains an unfinished preparation of another recipe; choose another --out"
            )
        return progress

    for split in SPLITS:
        if (out / f"{split}.bin").exists():
            raise UserError(
                f"{out}/{split}.bin: exists and was not made here; choose another --out"
            )
        _partial(out, split).write_bytes(b"")
    progress = {
        "shards": 0,
        "documents": 0,
        "tokens": dict.fromkeys(SPLITS, 0),
        "val_documents": 0,
        "recipe": recipe,
    }
    write_json(path, progress)
    return progress


def _remove_if_empty(out: Path) -> None:
    """Remove a preparation that has no documents yet; it would only block one of other data."""
    path = out / "progress.json"
    if _read_progress(path)["documents"] == 0:
        path.unlink()
        for split in SPLITS:
            _partial(out, split).unlink(missing_ok=True)


def _is_as_recorded(out: Path, split: str, meta: dict[str, Any]) -> bool:
    path, facts = out / f"{split}.bin", meta["splits"].get(split, {})
    if not path.exists() or path.stat().st_size != 2 * facts.get("tokens", -1):
        return False
    return fingerprint(np.memmap(path, dtype="<u2", mode="r")) == facts.get("fingerprint")


def _read_progress(path: Path) -> dict[str, Any]:
    """Return progress.json; refuse it if it is damaged or the files have less than it says."""
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        shards, documents = progress["shards"], progress["documents"]
        if not isinstance(shards, int) or not isinstance(documents, int):
            raise ValueError("counts must be integers")
        if not isinstance(progress["recipe"], dict):
            raise ValueError("recipe must be an object")
        for split in SPLITS:
            file = _partial(path.parent, split)
            if not file.exists():
                file = path.parent / f"{split}.bin"
            if file.stat().st_size < 2 * progress["tokens"][split]:
                raise ValueError(f"{file.name} is shorter than recorded")
        return progress
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged ({reason(error)}); start again in another folder, with --out"
        ) from error


def _partial(out: Path, split: str) -> Path:
    return out / f"{split}.bin.partial"


def _commit(out: Path, files: dict[str, BinaryIO], progress: dict[str, Any]) -> None:
    """Make tokens durable before progress.json counts them."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    write_json(out / "progress.json", progress)


def _finish(out: Path, vocabulary: dict[str, int], progress: dict[str, Any]) -> dict[str, Any]:
    """Rename the files, write meta.json, remove progress.json. It can be interrupted anywhere."""
    n_val = progress["val_documents"]
    documents = {"train": progress["documents"] - n_val, "val": n_val}
    splits = {}
    for split in SPLITS:
        path = out / f"{split}.bin"
        if _partial(out, split).exists():
            os.replace(_partial(out, split), path)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        splits[split] = {
            "tokens": progress["tokens"][split],
            "documents": documents[split],
            "sha256": sha256,
            "fingerprint": fingerprint(np.memmap(path, dtype="<u2", mode="r")),
        }

    meta = {
        "tokenizer": progress["recipe"]["tokenizer"],
        **vocabulary,
        "dtype": "uint16",
        "splits": splits,
        "recipe": progress["recipe"],
    }
    write_json(out / "meta.json", meta)
    (out / "progress.json").unlink()
    return meta
