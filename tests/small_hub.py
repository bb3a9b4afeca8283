"""Run prepare.py on a hub whose shards have 30 documents, and pause for less between attempts.

HF_ENDPOINT=… python tests/small_hub.py PAUSE… -- ARGUMENTS OF prepare.py
"""

from __future__ import annotations

import runpy
import sys

from huggingface_hub import constants

from data import hub
from tests.conftest import ROOT
from tests.hub_server import CHUNK

separator = sys.argv.index("--")
hub.PAUSES = tuple(map(float, sys.argv[1:separator]))
hub.HUB_DOCUMENTS = 30 * len(hub.HUB_SHARDS)
hub.SHARD_BYTES = 1e6
constants.DOWNLOAD_CHUNK_SIZE = CHUNK
sys.argv = ["prepare.py", *sys.argv[separator + 1 :]]
runpy.run_path(str(ROOT / "data/openwebtext/prepare.py"), run_name="__main__")
