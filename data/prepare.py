"""The command that prepares a dataset from the hub's shards or from local files."""

from __future__ import annotations

import argparse
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

from data import hub
from data.documents import count_documents, find_files, read_documents
from data.write_tokens import Shard, write_dataset
from runtime.cli import Parser, number, warn

WINDOW = 1024  # tokens, GPT-2's
FEW_WINDOWS = 64


def prepare(dataset: hub.HubDataset, folder: Path, description: str) -> None:
    """Write train.bin, val.bin and meta.json, as the command line says.

    Args:
        dataset: what to download without --files.
        folder: where to write without --out.
        description: of the command, for --help.
    """
    arguments = make_parser(description, folder).parse_args()
    out, limit = arguments.out.expanduser(), arguments.limit
    downloads = out / "downloads"
    is_complete = (out / "meta.json").exists()
    if arguments.files is None:
        source: dict[str, Any] = {"hub": dataset.hub_id, "revision": dataset.revision}
        n_documents = min(dataset.documents, limit or dataset.documents)
        if not is_complete:
            hub.check_disk(dataset, out, downloads, n_documents, arguments.keep_downloads)
        shards = hub.hub_shards(dataset, downloads, n_documents, arguments.keep_downloads)
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
        hub.remove_downloads(dataset, downloads)  # shards that were not read to their end
    report(meta, out, dataset)


def local_shards(patterns: list[str]) -> tuple[dict[str, Any], list[Shard], int]:
    """Return what identifies the files, a reader for each, and their number of documents."""
    files: list[list[Any]] = []
    shards: list[Shard] = []
    for path in find_files(patterns):
        files.append([path.name, count_documents(path), path.stat().st_size])
        shards.append(partial(read_documents, path))
    return {"files": files}, shards, sum(count for _, count, _ in files)


def report(meta: dict[str, Any], out: Path, dataset: hub.HubDataset) -> None:
    """Print the counts, and a warning if the validation set is short."""
    recipe = meta["recipe"]
    is_whole_hub = "hub" in recipe["source"] and recipe["documents"] == dataset.documents
    has_known_counts = is_whole_hub and bool(dataset.nanogpt_tokens)
    for split, facts in meta["splits"].items():
        known = f"; nanoGPT's has {dataset.nanogpt_tokens[split]:,}" if has_known_counts else ""
        print(f"{split}: {facts['tokens']:,} tokens in {facts['documents']:,} documents{known}")
    if has_known_counts:
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


def make_parser(description: str, folder: Path) -> argparse.ArgumentParser:
    parser = Parser(description)
    add = parser.add_argument
    positive, fraction = number(int, 1), number(float, 0, 1)
    cores = os.cpu_count()
    files = "local files, folders or quoted patterns instead of the hub"
    add("--files", metavar="PATH", nargs="+", help=files)
    add("--limit", metavar="N", type=positive, help="use only the first N documents")
    add("--out", metavar="DIR", type=Path, default=folder, help="where to write")
    add("--workers", metavar="N", type=positive, default=cores, help="processes that tokenize")
    keep = "keep the hub's shards in DIR/downloads (default: remove each once it is read)"
    add("--keep-downloads", action="store_true", help=keep)
    share = "share of the documents for val.bin (default: 0.0005; of a single document's text 0.1)"
    add("--val-fraction", metavar="F", type=fraction, help=share)
    return parser
