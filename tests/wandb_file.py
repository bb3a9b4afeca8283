"""Read a .wandb file, as wandb writes it offline: a LevelDB log (32 KiB blocks that records may span) of protobufs."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

BLOCK = 32768
LAST, FULL = 4, 1


def read_history(path: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The run's record (group, name, …) and the rows that were logged."""
    run, rows = None, []
    for record in read_records(path):
        if record.HasField("run"):
            run = record.run
        if record.HasField("history"):
            rows.append(as_dict(record.history.item))
    return run, rows


def read_records(path: Path) -> Iterator[Any]:
    for data in _records(path.read_bytes()):
        record = pb.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        yield record


def as_dict(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    position, parts = 7, b""  # after the file's own header
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:  # too small for a header: zeros until the next block
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""
