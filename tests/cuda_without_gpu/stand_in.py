"""Read the counters of the GPU that computes nothing; see README.md."""

from __future__ import annotations

import collections
import ctypes
import os
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COUNTERS = (
    "kernels",
    "triton",
    "gemms",
    "to_host",
    "to_device",
    "syncs",
    "all_reduces",
    "all_reduced_bytes",
    "broadcasts",
)


class StandIn:
    """The counters, and who waited for the device since the last reset."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["STAND_IN"])
        self._library.stand_in_count.restype = ctypes.c_longlong
        self.waits: collections.Counter[str] = collections.Counter()

        # ctypes keeps no reference to a callback, and calling a freed one crashes.
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._note)
        self._library.stand_in_on_sync(self._callback)

    def reset(self) -> None:
        self._library.stand_in_reset()
        self.waits.clear()

    def counts(self) -> dict[str, int]:
        return {name: self._library.stand_in_count(name.encode()) for name in COUNTERS}

    def _note(self, call: bytes) -> None:
        """Remember a call that waits, with the last line of the project that led to it."""
        where = "outside the project"
        for frame in traceback.extract_stack():
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and path != Path(__file__):
                where = f"{path.relative_to(ROOT)}:{frame.lineno}"
        self.waits[f"{call.decode()} at {where}"] += 1
