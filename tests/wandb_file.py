"""Read the .wandb files that wandb writes offline.

The format is a LevelDB log of protobufs: blocks of 32 KiB, which records may span.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

BLOCK = 32768
HEADER = 7  # bytes, of the file and of each record
LAST, FULL = 4, 1


def read_history(path: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Return the run's record (group, name, …) and the rows that were logged."""
    run, rows = None, []

    for record in read_records(path):
        if record.HasField("run"):
            run = record.run
        if record.HasField("history"):
            rows.append(as_dict(record.history.item))
    return run, rows


def read_records(path: Path) -> Iterator[Any]:
    """Yield all records of a file."""
    for data in _records(path.read_bytes()):
        record = pb.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        yield record


def as_dict(items: Any) -> dict[str, Any]:
    """Return the values of a history or summary record, a nested key as "a.b"."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    """Yield the bytes of each record, joined if it was split over blocks."""
    position, parts = HEADER, b""

    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        # Too small for a header: filled with zeros.
        if left < HEADER:
            position += left
            continue

        _, length, kind = struct.unpack_from("<IHB", content, position)
        start = position + HEADER
        parts += content[start : start + length]
        position = start + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""
