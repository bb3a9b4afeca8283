"""Checkpoints: written atomically, read with weights_only, the newest few and the best kept.

A checkpoint is one file, step_00001000.pt, that contains only tensors and plain values. It needs no
random state, because all randomness of a step derives from (seed, step).
"""

from __future__ import annotations

import errno
import shutil
import time
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from model import GPT
from runtime import distributed
from runtime.cli import UserError, reason, warn
from runtime.config import FREE_KEYS, KEYS, Config, from_stored, value_of
from runtime.files import whole_file, write_json
from runtime.run_folder import ENVIRONMENT, METRICS, read_environment

LISTING_ATTEMPTS = 13
LISTING_PAUSE = 5.0  # seconds
Found = tuple[Path, dict[str, Any]]  # a checkpoint's path and content
# What a run may have different from the one that it branches off: its horizon and decay.
BRANCH_KEYS = {"train.max_steps", "train.decay_share", "train.final_lr_ratio"}
BRANCH_KEYS.add("train.eval_interval")
CONTENT = {
    "step": int,
    "validated_step": int,
    "config": dict,
    "model": dict,
    "optimizer": dict,
    "fingerprints": dict,
}


def path_of(run_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` updates."""
    return run_dir / f"step_{step:08d}.pt"


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first."""
    pattern = "step_" + 8 * "[0-9]" + ".pt"
    return sorted(path for path in run_dir.glob(pattern) if path.is_file())


def quarantine(run_dir: Path, after: int) -> None:
    """Rename checkpoints that are newer than the step from which a run continues.

    They are damaged, otherwise the run would continue from them. Left in place they would count as
    the newest, and a good one would be removed instead.
    """
    for path in checkpoints(run_dir):
        if path > path_of(run_dir, after):
            path.rename(path.with_name(path.name + ".damaged"))


def save(run_dir: Path, state: dict[str, Any], keep: int) -> None:
    """Write `state`, then remove all checkpoints but the newest `keep` and the best.

    Args:
        run_dir: the run's folder.
        state: must have "step" and "best_step".
        keep: how many of the newest to keep.

    Raises:
        UserError: if it cannot be written; older checkpoints stay.
    """
    path = path_of(run_dir, state["step"])
    try:
        with whole_file(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        problem = "the disk is full" if is_full else f"cannot write ({reason(error)})"
        raise UserError(
            f"{path}: {problem}; older checkpoints are intact; free some space and add --resume"
        ) from error

    for old in checkpoints(run_dir)[:-keep]:
        if old != path_of(run_dir, state["best_step"]):
            old.unlink()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without executing anything in it.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        # torch.save writes CRC-32 checksums, but torch.load does not verify them.
        damaged = zipfile.ZipFile(path).testzip()
        if damaged is not None:
            raise ValueError(f"checksum of {damaged} differs")

        # Memory-mapped, so that the ranks of a node share one copy in the page cache.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict):
            raise ValueError("not a checkpoint of this trainer")
        for key, kind in CONTENT.items():
            if not isinstance(state.get(key), kind):
                raise ValueError(f"not a checkpoint of this trainer: {key} is missing")
        return state
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except Exception as error:  # damaged bytes can make the reader raise almost anything
        raise UserError(f"{path}: unreadable as a checkpoint ({reason(error)})") from error


def load_newest(run_dir: Path) -> Found | None:
    """Return the newest readable checkpoint and its path, or None if the run has none.

    Raises:
        UserError: if the run has checkpoints and all of them are damaged.
    """
    paths = checkpoints(run_dir)
    for path in reversed(paths):
        try:
            return path, load(path)
        except UserError as error:
            warn(f"{error}; trying the previous one")
    if paths:
        raise UserError(
            f"{run_dir}: none of its {len(paths)} checkpoints can be read; "
            f"start again with another --train.out_dir"
        )
    return None


def find_checkpoint(
    config: Config, resume: bool, branch_from: str | None, fingerprints: dict[str, str]
) -> Found | None:
    """Return the checkpoint to continue from, or None for a new run. Changes nothing on disk.

    Args:
        config: the run.
        resume: whether an existing run may be continued.
        branch_from: RUN@STEP, for a new run that continues another one; see :func:`find_branch`.
        fingerprints: of the token file of each split.

    Raises:
        UserError: if the folder is not empty and `resume` is false, or if it belongs to a run with
            another config or other data.
    """
    folder = config.run_dir
    found = None
    if folder.exists() and any(folder.iterdir()):
        if not resume:
            raise UserError(
                f"{folder}: exists; add --resume to continue it, or choose another --train.out_dir"
            )
        found = load_newest(folder)
        # A branch that was killed before its first checkpoint still knows where it began.
        branch_from = branch_from or read_environment(folder).get("branched_from")

    if found is not None:
        check_same_config(config, found[1]["config"])
    elif branch_from is not None:
        found = find_branch(config, branch_from)
    if found is not None:
        check_same_data(config, found, fingerprints)
    return found


def find_branch(config: Config, branch_from: str) -> Found:
    """Return the checkpoint of another run that a run with another horizon continues.

    Both have a stable phase (train.schedule = "wsd"), and the checkpoint is in it, so that the runs
    have made the same updates up to there.

    Args:
        config: the new run.
        branch_from: RUN@STEP, with the name of a run of the same experiment, or the path of its
            folder.

    Raises:
        UserError: if the checkpoint does not exist, or the runs differ before it.
    """
    name, _, step = branch_from.rpartition("@")
    if not name or not step.isdecimal():
        raise UserError(f"--branch-from={branch_from}: must be RUN@STEP, such as adamw@8000")
    beside = config.run_dir.parent / name
    folder = beside if beside.is_dir() else Path(name)
    path = path_of(folder, int(step))
    if not path.exists():
        there_are = ", ".join(str(int(p.stem[5:])) for p in checkpoints(folder)) or "none"
        raise UserError(
            f"--branch-from={branch_from}: {path} does not exist; checkpoints of that run: "
            f"{there_are}. train.keep_checkpoints decides how many are kept"
        )

    state = load(path)
    for key, before, now in differences(config, state["config"], FREE_KEYS | BRANCH_KEYS):
        raise UserError(
            f"--branch-from={branch_from}: {name} has {key} = {before!r}, this run {now!r}; a "
            f"branch may change its horizon and decay only"
        )
    for run in (from_stored(state["config"]), config):
        if run.train.schedule != "wsd" or int(step) > run.train.decay_start:
            raise UserError(
                f"--branch-from={branch_from}: step {step} is not in the stable phase of "
                f"{run.run}, which has train.schedule = {run.train.schedule!r} and decays from "
                f"step {run.train.decay_start}; both runs need wsd, and an earlier step"
            )
    return path, state


def inherit_metrics(config: Config, found: Found | None, step: int) -> str | None:
    """Copy the metrics of the run that this one branches off, if it does.

    Returns RUN@STEP, also for a branch that is resumed, or None for other runs.
    """
    if found is None or found[0].parent == config.run_dir:
        return read_environment(config.run_dir).get("branched_from")
    source = found[0].parent.resolve()
    name = source.name if source.parent == config.run_dir.parent.resolve() else source
    origin = f"{name}@{step}"
    # First, so that the run knows where it began even if it is killed now.
    write_json(config.run_dir / ENVIRONMENT, {"branched_from": origin})
    shutil.copyfile(source / METRICS, config.run_dir / METRICS)
    return origin


def check_same_data(config: Config, found: Found, fingerprints: dict[str, str]) -> None:
    """Refuse token files that are not those of the checkpoint."""
    path, state = found
    for split, stored in state["fingerprints"].items():
        if fingerprints[split] != stored:
            raise UserError(
                f"{path.parent}: was started with another {split}.bin than the one in "
                f"{config.data.path}"
            )


def find_on_all_ranks(
    config: Config, resume: bool, branch_from: str | None, fingerprints: dict[str, str]
) -> Found | None:
    """Return what :func:`find_checkpoint` does, once all ranks find the same step.

    On another node than that of the rank which wrote a checkpoint, a network file system may list
    an older one for up to a minute. Ranks that still differ then are refused later.
    """
    for attempt in range(LISTING_ATTEMPTS):
        with distributed.errors_on_all_ranks():
            found = find_checkpoint(config, resume, branch_from, fingerprints)
        step = found[1]["step"] if found else 0
        newest = distributed.max_over_ranks(step)
        if not distributed.max_over_ranks(step < newest):
            break
        if attempt < LISTING_ATTEMPTS - 1:
            time.sleep(LISTING_PAUSE)
    return found


def check_same_config(config: Config, stored: dict[str, Any]) -> None:
    """Refuse a config that differs from a stored one in any key but those of FREE_KEYS."""
    for key, before, now in differences(config, stored, FREE_KEYS):
        raise UserError(
            f"{config.run_dir}: was started with {key} = {before!r}, now it is {now!r}; "
            f"set it back, or choose another --train.out_dir"
        )


def differences(
    config: Config, stored: dict[str, Any], free: Collection[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, stored value, value now) of the keys in which two configs differ.

    "auto" is whatever the run was started with.
    """
    current = config.model_dump()
    for key in KEYS:
        before, now = value_of(stored, key), value_of(current, key)
        if key not in free and now not in (before, "auto"):
            yield key, before, now


def load_model(path: Path) -> tuple[Config, GPT, int]:
    """Return the config, model (on the CPU) and step of a checkpoint.

    Args:
        path: a checkpoint, or a run's folder, whose newest checkpoint is taken.

    Raises:
        UserError: if no checkpoint can be read.
    """
    if path.is_dir():
        newest = load_newest(path)
        if newest is None:
            raise UserError(f"{path}: contains no checkpoint; give a run's folder or a .pt file")
        path, state = newest
    else:
        state = load(path)

    try:
        config = from_stored(state["config"])
        model = GPT(config.model)
        model.load_state_dict(state["model"])
        return config, model, state["step"]
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint of this trainer ({reason(error)})") from error
