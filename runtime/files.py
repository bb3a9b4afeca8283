"""Files that are whole or absent, whenever the process or the machine stops; folders that one process writes to."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from runtime.cli import UserError

UNFINISHED = ".tmp"


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write `path`'s new content into: it replaces the old one on leaving, or never, if writing fails."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself must survive a power cut
    finally:
        os.close(folder)


@contextmanager
def locked(folder: Path, wait_s: float = 5.0) -> Iterator[None]:
    """Have `folder` to oneself, until the block or the process ends, however it ends; then remove unfinished files.

    Waits a little, for the children of a killed predecessor to be gone. Raises UserError where another process stays.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{folder}: another process writes here; wait for it or use another") from None
                time.sleep(0.1)
        for unfinished in folder.glob(f"*{UNFINISHED}"):
            unfinished.unlink()
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it with forked children
        os.close(descriptor)
