"""Run prepare.py on a hub whose shards have 30 documents, and pause for less between attempts.

HF_ENDPOINT=… python tests/small_hub.py PAUSE… -- openwebtext ARGUMENTS OF prepare.py
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace

from huggingface_hub import constants

from data import hub
from tests.conftest import ROOT
from tests.hub_server import CHUNK

separator = sys.argv.index("--")
hub.PAUSES = tuple(map(float, sys.argv[1:separator]))
for name in ("OPENWEBTEXT", "FINEWEB_EDU"):
    dataset = getattr(hub, name)
    n_shards = len(dataset.shards)
    small = replace(dataset, documents=30 * n_shards, size=1e6 * n_shards, tokens=1e5 * n_shards)
    setattr(hub, name, small)
constants.DOWNLOAD_CHUNK_SIZE = CHUNK
folder, *arguments = sys.argv[separator + 1 :]
sys.argv = ["prepare.py", *arguments]
runpy.run_path(str(ROOT / "data" / folder / "prepare.py"), run_name="__main__")
