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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.hub import OPENWEBTEXT
from data.prepare import prepare
from runtime.cli import run_main

if __name__ == "__main__":
    run_main(lambda: prepare(OPENWEBTEXT, Path(__file__).parent, __doc__))
