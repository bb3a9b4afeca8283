"""Prepare OpenWebText: train.bin, val.bin and meta.json, with nanoGPT's format and split.

    python data/openwebtext/prepare.py                                    # 24 GB down, 18 GB out
    python data/openwebtext/prepare.py --limit 100000 --out data/owt100k  # the first documents
    python data/openwebtext/prepare.py --files 'books/*.parquet' --out data/books

Documents come from the hub's parquet shards at a pinned revision, or from local files: parquet,
json, jsonl and csv with a column named text, or txt with one document per file; all but parquet may
be compressed (.gz). If interrupted, run the same command again; it picks up where it left off.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.write_tokens import Shard, write_dataset
from runtime.cli import Parser, UserError, number, reason, run_main

HUB_ID = "Skylion007/openwebtext"
HUB_REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"
HUB_SHARDS = [f"plain_text/train-{i:05d}-of-00080.parquet" for i in range(80)]
HUB_DOCUMENTS = 8_013_769
# From nanoGPT's README, for the archive's older order of documents.
NANOGPT_TOKENS = {"train": 9_035_582_198, "val": 4_434_897}

# The readers of `datasets`, by file name.
READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
OPTIONS: dict[str, dict[str, Any]] = {
    "parquet": {"columns": ["text"]},
    "text": {"sample_by": "document", "keep_linebreaks": True},
}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.files is None:
        source: dict[str, Any] = {"hub": HUB_ID, "revision": HUB_REVISION}
        download(HUB_SHARDS[0])  # without a network this fails before any file is made
        shards: list[Shard] = [partial(read_hub_shard, shard) for shard in HUB_SHARDS]
        available = HUB_DOCUMENTS
    else:
        paths = find_files(arguments.files)
        counts = [count_documents(path) for path in paths]
        files = []
        for path, count in zip(paths, counts, strict=True):
            files.append([path.name, count, path.stat().st_size])
        source = {"files": files}
        shards = [partial(read_documents, path) for path in paths]
        available = sum(counts)

    n_documents = min(available, arguments.limit or available)
    meta = write_dataset(
        arguments.out,
        shards,
        n_documents,
        "gpt2",
        source,
        val_fraction=arguments.val_fraction,
        workers=arguments.workers,
    )
    report(meta, arguments.out)


def report(meta: dict[str, Any], out: Path) -> None:
    """Print the counts; those of all of OpenWebText beside nanoGPT's."""
    recipe = meta["recipe"]
    is_whole_hub = "hub" in recipe["source"] and recipe["documents"] == HUB_DOCUMENTS
    for split, facts in meta["splits"].items():
        known = f"; nanoGPT's has {NANOGPT_TOKENS[split]:,}" if is_whole_hub else ""
        print(f"{split}: {facts['tokens']:,} tokens in {facts['documents']:,} documents{known}")
    if is_whole_hub:
        print(
            "A small difference from nanoGPT's counts is expected: it split the same documents in "
            "another order."
        )
    print(f"wrote {out}/train.bin, {out}/val.bin, {out}/meta.json")


# ---- The hub -------------------------------------------------------------------------------------


def read_hub_shard(shard: str) -> Iterator[str]:
    """Yield the texts of one of the hub's shards."""
    yield from read_documents(download(shard))


def download(shard: str) -> Path:
    """Download a shard, or find it in the hub's cache.

    Raises:
        UserError: if neither works.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # every retry would print several lines
    try:
        path = hf_hub_download(HUB_ID, shard, repo_type="dataset", revision=HUB_REVISION)
        return Path(path)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        problem = reason(error)
        if isinstance(error, LocalEntryNotFoundError):
            problem = "the hub cannot be reached"
        raise UserError(
            f"{HUB_ID}/{shard}: download failed ({problem}); run the same command again with a "
            f"network, or use local files with --files"
        ) from error


# ---- Files ---------------------------------------------------------------------------------------


def find_files(pattern: str) -> list[Path]:
    """Return the files that match, sorted by name.

    Raises:
        UserError: if there is none, or if `datasets` has no reader for one.
    """
    if os.path.isdir(pattern):
        raise UserError(
            f"--files {pattern!r}: is a folder; name its files, such as '{pattern}/*.parquet'"
        )
    # A path that exists is taken literally, even if it contains brackets.
    names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    paths = sorted(Path(name) for name in names if os.path.isfile(name))
    if not paths:
        raise UserError(f"--files {pattern!r}: no file matches (quote the pattern for the shell)")
    for path in paths:
        kind_of(path)
    return paths


def kind_of(path: Path) -> str:
    """Return the name of the reader for a file.

    Raises:
        UserError: if there is none.
    """
    name = path.with_suffix("") if path.suffix in COMPRESSED else path
    if name.suffix not in READERS:
        known = ", ".join(READERS)
        raise UserError(f"{path}: not one of {known}; narrow the pattern or rename the file")
    return READERS[name.suffix]


def count_documents(path: Path) -> int:
    """Return the number of documents in a file, from its metadata if it is parquet.

    Raises:
        UserError: if the file cannot be read.
    """
    if kind_of(path) == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        # `datasets` would read the whole file to count its rows.
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(path, error) from error
        check_text_column(path, file.schema_arrow)
        return file.metadata.num_rows
    return sum(1 for _ in read_documents(path))


def read_documents(path: Path) -> Iterator[str]:
    """Yield the texts of a file.

    Raises:
        UserError: if the file cannot be read, or has no texts.
    """
    import datasets
    import pyarrow as pa

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error is reported here
    kind = kind_of(path)
    count = 0
    try:
        dataset = datasets.load_dataset(
            kind,
            data_files=glob.escape(str(path)),
            split="train",
            streaming=True,
            **OPTIONS.get(kind, {}),
        )
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            check_text_column(path, table.schema)
            for text in table.column("text").to_pylist():
                count += 1
                if text is None:
                    columns = ", ".join(table.schema.names)
                    raise UserError(
                        f"{path}: the text of document {count} is missing (columns: {columns}); "
                        f"remove the document"
                    )
                yield text
    except (RuntimeError, StopIteration) as error:
        if kind != "json" or count > 0:
            raise
        # What the json reader raises for an empty file, compressed or not.
        raise UserError(f"{path}: is empty; remove it or narrow the pattern") from error
    except (
        OSError,
        ValueError,
        EOFError,
        pa.ArrowException,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise unreadable(path, error) from error


def check_text_column(path: Path, schema: Any) -> None:
    """Refuse a table without a column of strings named text.

    Raises:
        UserError: naming the columns there are, or the type.
    """
    import pyarrow as pa

    if "text" not in schema.names:
        raise UserError(f"{path}: has no column named text, only {', '.join(schema.names)}")
    kind = schema.field("text").type
    if not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
        raise UserError(f"{path}: its column text contains {kind}, not text")


def unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: unreadable as {kind_of(path)} ({reason(error)}); replace the file")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    positive, fraction = number(int, 1), number(float, 0, 1)
    cores = os.cpu_count()
    add("--files", metavar="GLOB", help="local files instead of the hub; quote the pattern")
    add("--limit", metavar="N", type=positive, help="use only the first N documents")
    add("--out", metavar="DIR", type=Path, default=Path(__file__).parent, help="where to write")
    add("--workers", metavar="N", type=positive, default=cores, help="processes that tokenize")
    share = "share of the documents that goes to val.bin"
    add("--val-fraction", metavar="F", type=fraction, default=0.0005, help=share)
    return parser


if __name__ == "__main__":
    run_main(main)
