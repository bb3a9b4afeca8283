"""OpenWebText → train.bin, val.bin, meta.json, in nanoGPT's format and with nanoGPT's split.

    python data/openwebtext/prepare.py                                     # all of OpenWebText: 24 GB down, 18 GB out
    python data/openwebtext/prepare.py --limit 100000 --out data/owt100k   # its first 100,000 documents
    python data/openwebtext/prepare.py --files 'books/*.parquet' --out data/books

Documents come from the hub's parquet shards at a pinned revision, or from local files: .parquet with a text column,
.jsonl with a text key a line, or .txt, one document each. Stopped half-way, the same command continues.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.write_tokens import write_dataset
from runtime.cli import Parser, UserError, number, reason, run_main

HUB_ID = "Skylion007/openwebtext"
HUB_REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"
HUB_SHARDS = [f"plain_text/train-{i:05d}-of-00080.parquet" for i in range(80)]
HUB_DOCUMENTS = 8_013_769
NANOGPT_TOKENS = {"train": 9_035_582_198, "val": 4_434_897}  # nanoGPT's README, from the archive's older order


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.files is not None:
        paths = sorted(Path(name) for name in glob.glob(arguments.files, recursive=True) if os.path.isfile(name))
        if not paths:
            raise UserError(f"--files {arguments.files!r}: no file matches (quote the pattern for the shell)")
        counts = [count_documents(path) for path in paths]
        sizes = [path.stat().st_size for path in paths]
        source: dict[str, Any] = {"files": [[p.name, n, size] for p, n, size in zip(paths, counts, sizes, strict=True)]}
        shards: list[Callable[[], Iterator[str]]] = [partial(read_documents, path) for path in paths]
        available = sum(counts)
    else:
        fetch_hub_shard(HUB_SHARDS[0])  # fails here, before any file is made, where there is no network
        source = {"hub": HUB_ID, "revision": HUB_REVISION}
        shards = [partial(read_hub_shard, shard) for shard in HUB_SHARDS]
        available = HUB_DOCUMENTS
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
    report(meta, whole_hub=arguments.files is None and n_documents == HUB_DOCUMENTS, out=arguments.out)


def report(meta: dict[str, Any], whole_hub: bool, out: Path) -> None:
    for split, facts in meta["splits"].items():
        known = f"; nanoGPT's has {NANOGPT_TOKENS[split]:,}" if whole_hub else ""
        print(f"{split}: {facts['tokens']:,} tokens of {facts['documents']:,} documents{known}")
    if whole_hub:
        print("A small difference from nanoGPT's counts is expected: it split the same documents in another order.")
    print(f"wrote {out}/train.bin, {out}/val.bin, {out}/meta.json")


def read_hub_shard(shard: str) -> Iterator[str]:
    """Read a shard of the hub's."""
    yield from read_documents(fetch_hub_shard(shard))


def fetch_hub_shard(shard: str) -> Path:
    """Download a shard, or find it in the hub's cache. Raises UserError where neither works."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries are announced in several lines each
    try:
        return Path(hf_hub_download(HUB_ID, shard, repo_type="dataset", revision=HUB_REVISION))
    except LocalEntryNotFoundError:
        problem = "the hub cannot be reached"
    except (HfHubHTTPError, OSError) as error:
        problem = reason(error)
    raise UserError(
        f"{HUB_ID}/{shard}: download failed ({problem}); run the same command again with a network, "
        f"or use local files with --files"
    )


def count_documents(path: Path) -> int:
    """Documents in a local file, read as cheaply as its type allows. Raises UserError for one that cannot be read."""
    if path.suffix == ".parquet":
        return _open_parquet(path).metadata.num_rows
    return sum(1 for _ in read_documents(path))


def read_documents(path: Path) -> Iterator[str]:
    """The texts of a .parquet, .jsonl or .txt file. Raises UserError for one that cannot be read."""
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_txt}
    if path.suffix not in readers:
        raise UserError(f"{path}: not one of {', '.join(readers)}; narrow the pattern or rename the file")
    try:
        yield from readers[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: unreadable ({reason(error)}); replace the file") from None


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: unreadable as parquet ({reason(error)}); replace the file") from None
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path}: has no column named text, but {', '.join(file.schema_arrow.names)}")
    if not pa.types.is_string(kind := file.schema_arrow.field("text").type) and not pa.types.is_large_string(kind):
        raise UserError(f"{path}: its column text holds {kind}, not text")
    return file


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow as pa

    try:
        for batch in _open_parquet(path).iter_batches(batch_size=1024, columns=["text"]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    except pa.ArrowException as error:
        raise UserError(f"{path}: damaged parquet ({reason(error)}); replace the file") from None


def _read_jsonl(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError("text must be a string")
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{path}, line {number}: not a JSON object with a text") from None
            yield text


def _read_txt(path: Path) -> Iterator[str]:
    yield path.read_text(encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("--files", metavar="GLOB", help="local .parquet, .jsonl or .txt files instead of the hub")
    parser.add_argument("--limit", metavar="N", type=number(int, 1), help="only the first N documents")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument(
        "--workers",
        metavar="N",
        type=number(int, 1),
        default=os.cpu_count(),
        help="processes (default: %(default)s, one a core)",
    )
    parser.add_argument(
        "--val-fraction",
        metavar="F",
        type=number(float, 0, 1),
        default=0.0005,
        help="share of the documents that val.bin holds",
    )
    return parser


if __name__ == "__main__":
    run_main(main)
