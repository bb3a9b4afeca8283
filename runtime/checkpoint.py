"""Checkpoints: written whole, read back with weights_only, the newest few and the best kept.

A checkpoint is one file, step_00001000.pt, of tensors and plain values alone. There is no random state in it: all
randomness of a step derives from (seed, step).
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.token_files import fingerprint
from model import GPT
from runtime.cli import UserError, reason
from runtime.config import FREE_KEYS, KEYS, Config, value_of
from runtime.files import whole_file

CONTENT = {"step": int, "validated_step": int, "config": dict, "model": dict, "optimizer": dict, "fingerprints": dict}


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / f"step_{step:08d}.pt"


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(path for path in run_dir.glob("step_" + 8 * "[0-9]" + ".pt") if path.is_file())


def set_aside(run_dir: Path, beyond: int) -> None:
    """Rename what bears a later step than the one that a run goes on from: damaged, or it would be its checkpoint.

    Otherwise it would count as the newest, and a good one be removed in its place.
    """
    for path in checkpoints(run_dir):
        if path > path_of(run_dir, beyond):
            path.rename(path.with_name(path.name + ".damaged"))


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
        if not isinstance(state, dict) or any(not isinstance(state.get(k), kind) for k, kind in CONTENT.items()):
            raise ValueError("not a checkpoint of this trainer")
        return state
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # there is no telling what damaged bytes make the reader trip over
        raise UserError(f"{path}: unreadable as a checkpoint ({reason(error)})") from None


def load_newest(run_dir: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None where the run has none. Raises UserError if all are damaged."""
    paths = checkpoints(run_dir)
    for path in reversed(paths):
        try:
            return load(path)
        except UserError as error:
            print(f"warning: {error}; trying the one before it", file=sys.stderr)
    if paths:
        raise UserError(
            f"{run_dir}: none of its {len(paths)} checkpoints can be read; start anew in another train.out_dir"
        )
    return None


def open_run(config: Config, resume: bool, tokens: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """The checkpoint to continue from, if any. An existing run is refused without --resume, and never changed here."""
    folder = config.run_dir
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not resume:
        raise UserError(f"{folder}: exists; add --resume to continue it, or choose another --train.out_dir")
    saved = load_newest(folder)
    if saved is None:
        print(f"{folder}: has no checkpoint yet; beginning at step 0")
    else:
        refuse_other_run(config, saved["config"])
        for split, name in saved["fingerprints"].items():
            if fingerprint(tokens[split]) != name:
                raise UserError(f"{folder}: was begun on another {split}.bin than the one in {config.data.path}")
    return saved


def load_model(path: Path) -> tuple[Config, GPT, int]:
    """The config, the model on the CPU and the step of a checkpoint, or of the newest one in a run's folder."""
    saved = load_newest(path) if path.is_dir() else load(path)
    if saved is None:
        raise UserError(f"{path}: no checkpoint in it; give a run's folder or a step_….pt file")
    try:
        config = Config.model_validate(saved["config"])
        model = GPT(config.model)
        model.load_state_dict(saved["model"])
        return config, model, int(saved["step"])
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path}: not a checkpoint of this trainer ({reason(error)})") from None


def refuse_other_run(config: Config, saved: dict[str, Any]) -> None:
    """A resumed run must be the same run: only keys that change no result may differ."""
    now = config.model_dump()
    for key in KEYS:  # in their order: a set's would name another key from one process to the next
        if key not in FREE_KEYS and value_of(now, key) != (before := value_of(saved, key)):
            raise UserError(
                f"{config.run_dir}: was begun with {key} = {before!r}, now it is {value_of(now, key)!r}; "
                f"set it back, or choose another --train.out_dir"
            )
