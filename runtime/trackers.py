"""Experiment trackers: Weights & Biases and TensorBoard.

They mirror metrics.jsonl, which stays the source of truth. A tracker that fails never stops a run,
and can be filled again later from the file.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import statistics
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from runtime.cli import UserError, reason
from runtime.config import Config
from runtime.cost import step_flops
from runtime.run_folder import METRICS, ROOT, read_metrics

# What wandb can draw a validation loss against, besides the step. flops: of all steps so far,
# estimates included.
AXES = ("tokens", "seconds", "flops")

FINISH_TIMEOUT = 120.0  # seconds that a run waits at its end for wandb to upload the rest


def check_installed(config: Config) -> None:
    """Refuse a config whose tracker is not installed, before anything of the run exists."""
    wanted = {}
    if config.wandb.mode != "disabled":
        wanted["wandb"] = "requirements.txt"
    if config.train.tensorboard:
        wanted["tensorboard"] = "requirements-extras.txt"
    for name, file in wanted.items():
        if not importlib.util.find_spec(name):
            raise UserError(
                f"{name} is missing: python -m pip install -r {file}, or train without it"
            )


def is_tracked(record: dict[str, Any]) -> bool:
    """Return whether trackers get this record.

    They get validations, the last step of each log interval, and the steps that have the time of a
    Hessian estimate.
    """
    return any(key in record for key in ("val_loss", "tokens_per_second", "hessian_ms"))


def position_of(record: dict[str, Any]) -> int:
    """Return a record's own position in wandb's history, which counts up.

    A step and the validation after it must not share one: the run may be stopped between the two,
    and wandb closes a row at the end of a run.
    """
    return 2 * record["step"] + ("val_loss" in record)


class WandbTracker:
    """Mirrors a run to Weights & Biases: online if asked and possible, otherwise offline.

    The wandb run has one id for its whole life, kept in the run's folder. Online, wandb reports
    how far it has got, and everything after that is sent again. Offline, its file is rewritten
    from `records`. So each record arrives once.

    Args:
        config: the run; its `wandb.mode` must not be "disabled".
        folder: the run's folder.
        environment: goes to wandb as part of the config.
        records: the lines of metrics.jsonl so far.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        environment: dict[str, Any],
        records: list[dict[str, Any]],
    ) -> None:
        self.config = config
        self.folder = folder
        self.run: Any = None
        resolved = config.model_dump() | {"environment": environment}

        if config.wandb.mode == "online":
            try:
                self._start("online", resolved, records)
                return
            except Exception as error:
                self._give_up(error, "continuing offline")
        try:
            self._start("offline", resolved, records)
        except Exception as error:
            self._give_up(error, "continuing without it")

    def log(self, record: dict[str, Any]) -> None:
        """Send one record of metrics.jsonl, if it is one that trackers get."""
        if self.run is None or not is_tracked(record):
            return
        try:
            self._send(record)
        except Exception as error:
            self._give_up(error, "continuing without it")

    def close(self, exit_status: int = 0) -> None:
        """Write the final numbers as the run's summary, and finish the upload.

        With an exit status that is not 0, wandb shows the run as failed instead of finished.
        """
        if self.run is None:
            return
        try:
            records = read_metrics(self.folder / METRICS)
            self.run.summary.update(summarize(records))
            self.run.finish(exit_status)
        except Exception as error:
            self._give_up(error, "not everything was sent")

    def _start(
        self,
        mode: Literal["online", "offline"],
        resolved: dict[str, Any],
        records: list[dict[str, Any]],
    ) -> None:
        import wandb

        if mode == "offline":
            for old in (self.folder / "wandb").glob("*run-*"):
                shutil.rmtree(old)

        self.run = wandb.init(
            project=self.config.wandb.project,
            group=self.config.experiment,
            name=self.config.run,
            config=resolved,
            id=_run_id(self.folder),
            dir=str(self.folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                init_timeout=60, finish_timeout=FINISH_TIMEOUT, finish_timeout_raises=True
            ),
        )

        # Plot against our own step, because wandb's counts calls of log().
        self.run.define_metric("*", step_metric="step")
        for axis in AXES:
            self.run.define_metric(axis)
            self.run.define_metric(f"val_loss_by_{axis}", step_metric=axis)

        known = self.run.starting_step  # run.step is 0 until the first call of log()
        for record in records:
            if position_of(record) >= known and is_tracked(record):
                self._send(record)
        if self.config.wandb.save_code:
            upload_code(self.run)

    def _send(self, record: dict[str, Any]) -> None:
        row = record | {"flops": record["step"] * step_flops(self.config)}
        if "val_loss" in record:
            for axis in AXES:  # one copy per axis that it can be plotted against
                row[f"val_loss_by_{axis}"] = record["val_loss"]
        self.run.log(row, step=position_of(record))

    def _give_up(self, error: Exception, then: str) -> None:
        import wandb

        self.run = None
        print(
            f"warning: wandb: {reason(error)}; {then}, upload later with scripts/wandb_sync.py",
            file=sys.stderr,
        )
        # Otherwise wandb would keep the id of the failed run, and contact its own process once
        # more when the interpreter exits.
        with suppress(Exception):
            wandb.teardown()


class TensorBoardTracker:
    """Mirrors a run to RUN/tensorboard, which is rewritten from `records` on every start."""

    def __init__(self, folder: Path, records: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        shutil.rmtree(path, ignore_errors=True)
        self.writer = SummaryWriter(str(path))
        for record in records:
            self.log(record)

    def log(self, record: dict[str, Any]) -> None:
        """Write one record of metrics.jsonl, if it is one that trackers get."""
        if not is_tracked(record):
            return
        try:
            for key, value in record.items():
                if key != "step":
                    self.writer.add_scalar(key, value, record["step"])
        except OSError as error:
            print(f"warning: tensorboard: {reason(error)}", file=sys.stderr)

    def close(self, exit_status: int = 0) -> None:
        """Flush and close the file."""
        with suppress(OSError):
            self.writer.close()


Tracker = WandbTracker | TensorBoardTracker


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a run's final numbers: its last validation, median times, share of clipped steps."""
    summary: dict[str, Any] = {}
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "val_loss" in record]

    if validations:
        for key in ("step", "tokens", "seconds", "val_loss"):
            summary[f"final/{key}"] = validations[-1][key]
    for key in ("step_ms", "hessian_ms"):
        times = [record[key] for record in steps if key in record]
        if times:
            summary[f"final/{key}"] = statistics.median(times)
    if steps:
        summary["final/clipped_share"] = sum(record["clipped"] for record in steps) / len(steps)
    return summary


def upload_code(run: Any) -> None:
    """Upload the files that git tracks, as they are now, as an artifact of the wandb run."""
    import wandb

    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True
    )
    names = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    if not names:
        print("warning: wandb.save_code: no file is tracked by git here", file=sys.stderr)
        return

    artifact = wandb.Artifact(f"code-{run.id}", type="code")
    for name in names:
        artifact.add_file(str(ROOT / name), name=name)
    run.log_artifact(artifact)


def _run_id(folder: Path) -> str:
    path = folder / "wandb_id"
    if not path.exists():
        is_sweep = "WANDB_SWEEP_ID" in os.environ  # then wandb's agent has chosen the id
        path.write_text(os.environ["WANDB_RUN_ID"] if is_sweep else secrets.token_hex(4))
    return path.read_text().strip()
