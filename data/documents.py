"""Read documents from local files: parquet, json, jsonl, csv and txt."""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from runtime.cli import UserError, reason

KINDS = (".parquet", ".json", ".jsonl", ".csv", ".txt")
OUR_FILES = {"meta.json", "progress.json"}  # of prepared data; not documents
# What damaged files raise, compressed or not.
DAMAGED = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error)
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


# ---- Finding files -------------------------------------------------------------------------------


def find_files(patterns: Iterable[str]) -> list[Path]:
    """Return the files that the patterns name, each once, sorted by path.

    A pattern is a file, a folder with all files below it that have a known suffix, or a glob. It
    may begin with ~.

    Raises:
        UserError: if a pattern matches nothing, or a file of a kind that cannot be read.
    """
    found: set[Path] = set()
    for pattern in patterns:
        paths = _matches(os.path.expanduser(pattern))
        if not paths:
            raise UserError(
                f"--files {pattern!r}: no file matches; give files, folders or quoted patterns "
                f"of {', '.join(KINDS)} files"
            )
        for path in paths:
            kind_of(path)
        found |= paths
    return sorted(found)


def _matches(pattern: str) -> set[Path]:
    # A path that exists is taken literally, even if it contains brackets.
    path = Path(pattern)
    if path.is_file():
        return {path}
    if path.is_dir():
        files = {file for file in path.rglob("*") if file.is_file() and _kind(file) in KINDS}
        return {file for file in files if file.name not in OUR_FILES}
    return {Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)}


def kind_of(path: Path) -> str:
    """Return a file's kind, one of KINDS, from its name; it may be compressed.

    Raises:
        UserError: if it is none of them.
    """
    kind = _kind(path)
    if kind not in KINDS:
        compressed = ", ".join(OPENERS)
        raise UserError(
            f"{path}: not one of {', '.join(KINDS)} (all but parquet also {compressed}); "
            f"leave it out or convert it"
        )
    return kind


def _kind(path: Path) -> str:
    uncompressed = path.with_suffix("") if path.suffix in OPENERS else path
    return uncompressed.suffix


# ---- Reading -------------------------------------------------------------------------------------


def count_documents(path: Path) -> int:
    """Return the number of documents in a file, from its metadata if it is parquet.

    Raises:
        UserError: if the file cannot be read.
    """
    if kind_of(path) == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        # `datasets` would read the whole file to count its rows.
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error
        _check_text_column(path, file.schema_arrow)
        return file.metadata.num_rows
    return sum(1 for _ in read_documents(path))


def read_documents(path: Path) -> Iterator[str]:
    """Yield the texts of a file. A txt file is one document.

    Raises:
        UserError: if the file cannot be read, or a document has no text.
    """
    kind = kind_of(path)
    if kind == ".jsonl":
        yield from _read_jsonl(path)
    elif kind == ".txt":
        try:
            with _open_text(path) as file:
                text = file.read()
        except DAMAGED as error:
            raise _unreadable(path, error) from error
        yield text
    else:
        yield from _read_table(path, kind[1:])


def _open_text(path: Path) -> TextIO:
    """Open a text file, compressed or not, without the byte order mark that Windows adds."""
    return OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig")


def _read_jsonl(path: Path) -> Iterator[str]:
    """Yield the texts of a file with one JSON object per line. Blank lines are skipped."""
    count = 0
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    count += 1
                    yield _text_of_line(line, f"{path}, line {number}")
    except DAMAGED as error:
        raise _unreadable(path, error) from error
    if count == 0:
        raise UserError(f"{path}: is empty; leave it out")


def _text_of_line(line: str, where: str) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({reason(error)}); replace the file") from error

    if not isinstance(document, dict):
        raise UserError(f"{where}: {type(document).__name__} instead of an object with a text")
    if "text" not in document:
        keys = ", ".join(document) or "nothing"
        raise UserError(f"{where}: no key 'text'; it has: {keys}")
    if not isinstance(document["text"], str):
        kind = type(document["text"]).__name__
        raise UserError(f"{where}: its text is {kind}, not a string; mend or remove the document")
    return document["text"]


def _read_table(path: Path, reader: str) -> Iterator[str]:
    """Yield the column named text of a parquet, json or csv file, read by `datasets`."""
    import datasets
    import pyarrow as pa

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error is reported here
    columns: dict[str, Any] = {"columns": ["text"]} if reader == "parquet" else {}
    count = 0
    try:
        dataset = datasets.load_dataset(
            reader, data_files=glob.escape(str(path)), split="train", streaming=True, **columns
        )
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            _check_text_column(path, table.schema)
            for text in table.column("text").to_pylist():
                count += 1
                if text is None:
                    raise UserError(
                        f"{path}: the text of document {count} is missing; remove the document"
                    )
                yield text
    except (RuntimeError, StopIteration) as error:
        if reader != "json" or count > 0:
            raise
        # What the json reader raises for an empty file, compressed or not.
        raise UserError(f"{path}: is empty; leave it out") from error
    except (
        *DAMAGED,
        ValueError,
        pa.ArrowException,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise _unreadable(path, error) from error


def _check_text_column(path: Path, schema: Any) -> None:
    """Refuse a table without a column of strings named text.

    Raises:
        UserError: naming the columns there are, or the type.
    """
    import pyarrow as pa

    if "text" not in schema.names:
        raise UserError(f"{path}: has no column named text, only {', '.join(schema.names)}")
    kind = schema.field("text").type
    if pa.types.is_dictionary(kind):  # such as a pandas category
        kind = kind.value_type
    if not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
        raise UserError(f"{path}: its column text contains {kind}, not text")


def _unreadable(path: Path, error: Exception) -> UserError:
    kind = kind_of(path)[1:]
    return UserError(f"{path}: unreadable as {kind} ({reason(error)}); replace the file")
