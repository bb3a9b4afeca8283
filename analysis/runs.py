"""Runs, read from their folders or from wandb, and grouped by settings.

Losses are compared at the end of a fully decayed schedule, never in its middle, where the learning
rate decides and not the optimizer. A horizon is the number of steps of a whole schedule.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime import cost
from runtime.cli import UserError, reason
from runtime.config import FREE_KEYS, KEYS, from_stored, value_of
from runtime.run_folder import CONFIG, METRICS, read_environment, read_metrics

# Keys that decide a run's losses. A run may be resumed after its data have moved, but to another
# run the path of other data says that the data differ. How often a run is validated changes no
# loss.
DECISIVE = KEYS.keys() - FREE_KEYS - {"train.eval_interval"} | {"data.path"}
# Those of them that may differ between compared runs: what is compared, and what is repeated over.
COMPARED = {key for key in KEYS if key.startswith("optimizer.")}
COMPARED |= {"train.seed", "train.max_steps"}
# What must be equal for losses to be compared at all.
TASK = [f"model.{key}" for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")]
TASK += ["model.causal", "data.path", "train.batch_size"]
# What must be the same besides the config, of environment.json.
ENVIRONMENT = ("commit", "uncommitted_changes", "torch", "device", "world_size")


@dataclass(frozen=True)
class StoredRun:
    """A run that was validated at least once, finished or not."""

    config: dict[str, Any]  # config.json
    environment: dict[str, Any]  # environment.json
    records: list[dict[str, Any]]  # of steps
    validations: list[dict[str, Any]]
    where: str = ""  # its folder, or its address at wandb

    @property
    def name(self) -> str:
        return f"{self.config['experiment']}/{self.config['run']}"

    @property
    def table(self) -> str:
        """The run's table in its experiment file: its name without the variation."""
        return self.config["run"].split(",")[0]

    @property
    def optimizer(self) -> str:
        return self.config["optimizer"]["name"]

    @property
    def horizon(self) -> int:
        return self.config["train"]["max_steps"]

    @property
    def seed(self) -> int:
        return self.config["train"]["seed"]

    @property
    def step(self) -> int:
        """The last step that was logged or validated."""
        return max(record["step"] for record in [*self.records[-1:], *self.validations[-1:]])

    @property
    def is_finished(self) -> bool:
        return bool(self.validations) and self.validations[-1]["step"] == self.horizon

    @property
    def skipped(self) -> int:
        """The number of steps that were skipped because loss or gradient was not finite."""
        return sum(bool(record.get("skipped")) for record in self.records)

    @property
    def is_diverged(self) -> bool:
        """Whether the run skipped steps, or the last loss is not finite.

        Not with float16: its scaler finds the largest factor by skipping.
        """
        if self.config["train"]["dtype"] != "float16" and self.skipped:
            return True
        is_stopped = bool(self.records) and bool(self.records[-1].get("skipped"))
        return (is_stopped and not self.is_finished) or not math.isfinite(self.final_loss)

    @property
    def final_loss(self) -> float:
        return self.validations[-1]["val_loss"]

    @cached_property
    def settings(self) -> str:
        """Everything that decides the result except the seed, as text; equal for other seeds."""
        keys = sorted(DECISIVE - {"train.seed"})
        values = [value_of(self.config, key) for key in keys]
        return json.dumps([self.table, *values, *self.fingerprints])

    @cached_property
    def task(self) -> str:
        """What must be equal so that a difference of losses means something, as text."""
        return json.dumps([value_of(self.config, key) for key in TASK] + self.fingerprints)

    @property
    def fingerprints(self) -> list[str | None]:
        """Those of train.bin and val.bin, as far as they were stored."""
        splits = (self.environment.get("data") or {}).get("splits") or {}
        return [(splits.get(split) or {}).get("fingerprint") for split in ("train", "val")]


@dataclass(frozen=True)
class Group:
    """Finished or diverged runs that differ only in their seed."""

    runs: list[StoredRun]
    where: str = ""  # the name, if others have the run's name too

    @property
    def name(self) -> str:
        """The run's name without its seed."""
        parts = (self.where or self.runs[0].name).split(",")
        return ",".join(part for part in parts if not part.startswith("seed="))

    @property
    def losses(self) -> dict[int, float]:
        """{seed: final loss}, infinite for a diverged run."""
        return {run.seed: math.inf if run.is_diverged else run.final_loss for run in self.runs}

    @property
    def diverged(self) -> int:
        """The number of diverged runs."""
        return sum(run.is_diverged for run in self.runs)

    @property
    def loss(self) -> float:
        """The mean over seeds; with diverged runs the median, in which they are infinite."""
        if self.diverged:
            return statistics.median(self.losses.values())
        return statistics.fmean(self.losses.values())

    @property
    def rank(self) -> tuple[bool, int, float]:
        """What sorts settings, the best first: without diverged runs, with many seeds, low loss."""
        return self.diverged > 0, -len(self.runs), self.loss

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over seeds; None for a single or a diverged one."""
        if self.diverged or len(self.runs) < 2:
            return None
        return statistics.stdev(self.losses.values())

    @property
    def table(self) -> str:
        return self.runs[0].table

    @property
    def optimizer(self) -> str:
        return self.runs[0].optimizer

    @property
    def horizon(self) -> int:
        return self.runs[0].horizon

    @property
    def tokens(self) -> int:
        """The tokens of the whole schedule."""
        return self.horizon * tokens_per_step(self.runs[0].config)

    @property
    def task(self) -> str:
        return self.runs[0].task


# ---- Reading -------------------------------------------------------------------------------------


def find_runs(folders: Iterable[Path]) -> list[StoredRun]:
    """Return all validated runs below the folders.

    Raises:
        UserError: if a folder has none.
    """
    found: list[StoredRun] = []
    for folder in folders:
        runs = []
        for path in sorted(folder.rglob(METRICS)):
            run = read_run(path.parent)
            if run is not None:
                runs.append(run)
            else:
                print(f"warning: {path.parent}: not validated yet, left out", file=sys.stderr)
        if not runs:
            raise UserError(
                f"{folder}: no run with a validation in it; train one, e.g. with "
                f"scripts/quickstart.sh"
            )
        found += runs
    return found


def read_run(folder: Path) -> StoredRun | None:
    """Return the run in a folder, or None if it was not validated yet.

    Raises:
        UserError: if its files are damaged.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        records = read_metrics(folder / METRICS)
        run = StoredRun(config, read_environment(folder), *split_records(records), str(folder))
        is_valid = run.name and run.optimizer and run.horizon > 0 and run.seed >= 0
        if not is_valid or not step_flops(config):
            raise ValueError("not a config of this trainer")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {reason(error)}"
        raise UserError(
            f"{folder}: {CONFIG} or {METRICS} is damaged ({problem}); leave this folder out"
        ) from error
    return run if run.validations else None


def split_records(
    records: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the records of steps, and those of validations."""
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "val_loss" in record]
    return steps, validations


def wandb_runs(path: str) -> list[StoredRun]:
    """Return the runs of ENTITY/PROJECT/GROUP at wandb; the group is the experiment's name.

    wandb has the last step of each log interval, the steps with a Hessian estimate and every
    validation, so T(step) is the median of those steps.

    Raises:
        UserError: if wandb cannot be read, or has no such run.
    """
    import wandb

    parts = path.split("/")
    if len(parts) != 3 or not all(parts):
        raise UserError(
            f"--wandb={path}: must be ENTITY/PROJECT/GROUP; the group is the experiment's name"
        )
    entity, project, group = parts
    runs = []
    try:
        for found in wandb.Api().runs(f"{entity}/{project}", filters={"group": group}):
            if "optimizer" in found.config:  # not a comparison that compare.py uploaded
                runs.append(_from_wandb(found))
    except (wandb.errors.Error, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--wandb={path}: wandb cannot be read ({reason(error)}); is the path right?"
        ) from error

    validated = [run for run in runs if run.validations]
    if not validated:
        raise UserError(
            f"--wandb={path}: no run with a validation in it; is the group's name right?"
        )
    return validated


def _from_wandb(run: Any) -> StoredRun:
    config = dict(run.config)
    environment = config.pop("environment", {})
    rows = []
    for row in run.scan_history(use_cache=False):  # the run may have grown since
        rows.append({key: _number(value) for key, value in row.items() if value is not None})
    rows.sort(key=lambda row: row["step"])
    return StoredRun(config, environment, *split_records(rows), f"wandb {run.id}")


def _number(value: Any) -> Any:
    """Return a value of wandb's service, which writes NaN and infinity as text."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


# ---- Grouping ------------------------------------------------------------------------------------


def group_runs(runs: Iterable[StoredRun]) -> list[Group]:
    """Return finished and diverged runs, grouped by everything but their seed, in their order.

    A second run with the same settings and seed is kept apart, in another group. Groups of the same
    name are named by the folder of their first run, below the one that they have in common.
    """
    groups: dict[tuple[str, int], dict[int, StoredRun]] = {}
    for run in runs:
        if run.is_finished or run.is_diverged:
            copy = 0
            while run.seed in groups.setdefault((run.settings, copy), {}):
                copy += 1
            groups[run.settings, copy][run.seed] = run

    found = [Group(list(by_seed.values())) for by_seed in groups.values()]
    names = Counter(group.name for group in found)
    folders = [os.path.abspath(group.runs[0].where) for group in found]
    for index, group in enumerate(found):
        if names[group.name] > 1:
            where = os.path.relpath(folders[index], os.path.commonpath(folders))
            found[index] = Group(group.runs, where)
    return found


def repeated_runs(runs: Iterable[StoredRun]) -> list[list[StoredRun]]:
    """Return the sets of runs that have the same settings and the same seed."""
    same: dict[tuple[str, int], list[StoredRun]] = {}
    for run in runs:
        same.setdefault((run.settings, run.seed), []).append(run)
    return [copies for copies in same.values() if len(copies) > 1]


def confounders(runs: list[StoredRun]) -> list[str]:
    """Return what differs between the runs besides the optimizer, as lines "key: value, value"."""
    lines = []
    for key in sorted(DECISIVE - COMPARED):
        lines.append((key, [value_of(run.config, key) for run in runs]))
    for key in ENVIRONMENT:
        lines.append((key, [run.environment.get(key) for run in runs]))
    for index, split in enumerate(("train", "val")):
        lines.append((f"{split}.bin", [run.fingerprints[index] for run in runs]))

    differences = []
    for key, values in lines:
        texts = sorted({json.dumps(value) for value in values})
        if len(texts) > 1:
            differences.append(f"{key}: {', '.join(texts)}")
    return differences


def step_flops(config: dict[str, Any]) -> float:
    """Return the FLOPs of a step, estimates included, for a stored config."""
    return cost.step_flops(from_stored(config))


def tokens_per_step(config: dict[str, Any]) -> int:
    """Return the tokens of a batch, for a stored config."""
    return config["train"]["batch_size"] * config["model"]["block_size"]
