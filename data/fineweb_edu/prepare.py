"""Prepare FineWeb-Edu's sample of 10 billion tokens, as data/openwebtext/prepare.py does.

    python data/fineweb_edu/prepare.py                      # 29 GB down, 20 GB out
    python data/fineweb_edu/prepare.py --limit 100000 --out data/fineweb100k

Documents come from the hub's parquet shards at a pinned revision. If interrupted, run the same
command again; it picks up where it left off.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.hub import FINEWEB_EDU
from data.prepare import prepare
from runtime.cli import run_main

if __name__ == "__main__":
    run_main(lambda: prepare(FINEWEB_EDU, Path(__file__).parent, __doc__))
