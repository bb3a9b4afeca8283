"""Checkpoints: written whole, read back with weights_only, the newest few and the best kept.

A checkpoint is one file, step_00001000.pt, of tensors and plain values alone. There is no random state in it: all
randomness of a step derives from (seed, step).
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from errors import UserError, reason
from files import whole_file

KEYS = {"step", "config", "model", "optimizer", "fingerprints"}


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / f"step_{step:08d}.pt"


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(run_dir.glob("step_????????.pt"))


def save(run_dir: Path, state: dict[str, Any], keep: int) -> None:
    """Write `state` (with "step" and "best_step"), then remove all but the newest `keep` and the best.

    Raises UserError where the disk does not take it; the older checkpoints stay.
    """
    path = path_of(run_dir, state["step"])
    try:
        with whole_file(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path}: cannot write ({reason(error)}); free some space and add --resume, older ones stay"
        ) from None
    for old in checkpoints(run_dir)[:-keep]:
        if old != path_of(run_dir, state["best_step"]):
            old.unlink()


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU. Nothing in it is executed. Raises UserError for a file that is not whole."""
    try:
        if (damaged := zipfile.ZipFile(path).testzip()) is not None:  # torch writes CRC-32s and does not read them
            raise ValueError(f"checksum of {damaged} differs")
        # Mapped, not read: the ranks of a node share one copy of it in the page cache.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict) or not state.keys() >= KEYS:
            raise ValueError("not a checkpoint of this trainer")
        return state
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # there is no telling what damaged bytes make the reader trip over
        raise UserError(f"{path}: unreadable ({reason(error)}); remove it to use an older one") from None


def load_newest(run_dir: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None where the run has none. Raises UserError if all are damaged."""
    paths = checkpoints(run_dir)
    for path in reversed(paths):
        try:
            return load(path)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
    if paths:
        raise UserError(
            f"{run_dir}: none of its {len(paths)} checkpoints can be read; start anew in another train.out_dir"
        )
    return None
