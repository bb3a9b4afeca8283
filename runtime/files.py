"""Atomic writes, and folders that only one process writes to."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from runtime.cli import UserError

UNFINISHED = ".tmp"
FULL = 1_000_000  # bytes; a disk with fewer is full


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block ends.

    If the block fails, `path` is untouched. Once it has ended, the content and the new name survive
    a crash of the machine.

    Raises:
        OSError: with ENOSPC if the disk is full, which some writers report as another error.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except Exception as error:
        if shutil.disk_usage(path.parent).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()

    # The rename is durable only once the folder is synced too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a file's path into the errors of reads and writes, which do not have it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, atomically."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def locked(folder: Path, wait_s: float = 5.0) -> Iterator[None]:
    """Hold an exclusive lock on `folder` until the block or the process ends.

    Waits up to `wait_s` seconds, because children of a killed process may hold the lock a little
    longer. Removes unfinished files once it has the lock. Raises UserError if another process
    keeps it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{folder}: another process writes here; wait for it or use another folder"
                    ) from error
                time.sleep(0.1)

        for unfinished in folder.glob(f"*{UNFINISHED}"):
            unfinished.unlink()
        yield
    finally:
        # Unlock explicitly: closing would leave the lock with forked children.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
