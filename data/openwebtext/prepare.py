"""Prepare OpenWebText: train.bin, val.bin and meta.json, with nanoGPT's format and split.

    python data/openwebtext/prepare.py                                    # 24 GB down, 18 GB out
    python data/openwebtext/prepare.py --limit 100000 --out data/owt100k  # the first documents
    python data/openwebtext/prepare.py --files books/ --out data/books
    python data/openwebtext/prepare.py --files input.txt --out data/shakespeare

Documents come from the hub's parquet shards at a pinned revision, or from local files, folders of
files and patterns: parquet, json and csv with a column named text, jsonl with that key, or txt with
one document per file; all but parquet may be compressed. A single document is split by position.
If interrupted, run the same command again; it picks up where it left off.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import hub
from data.documents import count_documents, find_files, read_documents
from data.write_tokens import Shard, write_dataset
from runtime.cli import Parser, number, run_main, warn

# From nanoGPT's README, for the archive's older order of documents.
NANOGPT_TOKENS = {"train": 9_035_582_198, "val": 4_434_897}
WINDOW = 1024  # tokens, GPT-2's
FEW_WINDOWS = 64


def main() -> None:
    arguments = make_parser().parse_args()
    out, limit = arguments.out.expanduser(), arguments.limit
    downloads = out / "downloads"
    is_complete = (out / "meta.json").exists()
    if arguments.files is None:
        source: dict[str, Any] = {"hub": hub.HUB_ID, "revision": hub.HUB_REVISION}
        n_documents = min(hub.HUB_DOCUMENTS, limit or hub.HUB_DOCUMENTS)
        if not is_complete:
            hub.check_disk(out, downloads, n_documents, arguments.keep_downloads)
        shards = hub.hub_shards(downloads, n_documents, arguments.keep_downloads)
    else:
        source, shards, available = local_shards(arguments.files)
        n_documents = min(available, limit or available)

    default = 0.1 if n_documents == 1 else 0.0005  # both are nanoGPT's
    meta = write_dataset(
        out,
        shards,
        n_documents,
        "gpt2",
        source,
        val_fraction=default if arguments.val_fraction is None else arguments.val_fraction,
        workers=arguments.workers,
    )
    if arguments.files is None and not is_complete and not arguments.keep_downloads:
        hub.remove_downloads(downloads)  # shards that were not read to their end
    report(meta, out)


def local_shards(patterns: list[str]) -> tuple[dict[str, Any], list[Shard], int]:
    """Return what identifies the files, a reader for each, and their number of documents."""
    files: list[list[Any]] = []
    shards: list[Shard] = []
    for path in find_files(patterns):
        files.append([path.name, count_documents(path), path.stat().st_size])
        shards.append(partial(read_documents, path))
    return {"files": files}, shards, sum(count for _, count, _ in files)


def report(meta: dict[str, Any], out: Path) -> None:
    """Print the counts, and a warning if the validation set is short."""
    recipe = meta["recipe"]
    is_whole_hub = "hub" in recipe["source"] and recipe["documents"] == hub.HUB_DOCUMENTS
    for split, facts in meta["splits"].items():
        known = f"; nanoGPT's has {NANOGPT_TOKENS[split]:,}" if is_whole_hub else ""
        print(f"{split}: {facts['tokens']:,} tokens in {facts['documents']:,} documents{known}")
    if is_whole_hub:
        print(
            "A small difference from nanoGPT's counts is expected: it split the same documents in "
            "another order."
        )
    print(f"wrote {out}/train.bin, {out}/val.bin, {out}/meta.json")

    tokens = {split: facts["tokens"] for split, facts in meta["splits"].items()}
    if tokens["val"] < FEW_WINDOWS * WINDOW:
        # Rounded up to one digit, such as 0.003.
        share = FEW_WINDOWS * WINDOW / sum(tokens.values())
        digit = 10 ** math.floor(math.log10(share))
        fraction = min(math.ceil(share / digit) * digit, 0.1)
        advice = "use more text"
        if fraction > recipe["val_fraction"]:
            advice += f", or prepare it again in another --out with --val-fraction {fraction:.1g}"
        warn(
            f"{out}/val.bin has {tokens['val'] // WINDOW} windows of {WINDOW:,} tokens: validation "
            f"losses will be noisy, and with 0 there are none; {advice}"
        )


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    positive, fraction = number(int, 1), number(float, 0, 1)
    cores = os.cpu_count()
    files = "local files, folders or quoted patterns instead of the hub"
    add("--files", metavar="PATH", nargs="+", help=files)
    add("--limit", metavar="N", type=positive, help="use only the first N documents")
    add("--out", metavar="DIR", type=Path, default=Path(__file__).parent, help="where to write")
    add("--workers", metavar="N", type=positive, default=cores, help="processes that tokenize")
    keep = "keep the hub's shards in DIR/downloads (default: remove each once it is read)"
    add("--keep-downloads", action="store_true", help=keep)
    share = "share of the documents for val.bin (default: 0.0005; of a single document's text 0.1)"
    add("--val-fraction", metavar="F", type=fraction, help=share)
    return parser


if __name__ == "__main__":
    run_main(main)
