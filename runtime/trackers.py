"""Mirrors of metrics.jsonl, if asked: wandb, TensorBoard. The truth is the file; these may fail, or be made later."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from runtime.cli import UserError, reason
from runtime.config import Config
from runtime.plan import step_flops

# What a validation loss is drawn against at wandb, besides the step. flops: of all steps so far, estimates counted.
AXES = ("tokens", "seconds", "flops")


def check_installed(config: Config) -> None:
    """Raise UserError where a mirror's package is missing, before anything of the run exists."""
    asked = {"wandb": config.wandb.mode != "disabled", "tensorboard": config.train.tensorboard}
    for name, needed in asked.items():
        if needed and not importlib.util.find_spec(name):
            raise UserError(f"{name} is missing: python -m pip install {name}, or train without it")


def start_wandb(config: Config, folder: Path, resolved: dict[str, Any], records: list[dict[str, Any]]) -> Any:
    """A wandb run for the run in `folder`: online if asked and possible, else offline, else None.

    Nothing that wandb raises stops a run.
    """
    if config.wandb.mode == "disabled":
        return None
    if config.wandb.mode == "online":
        try:
            return open_wandb(config, "online", folder, resolved, records)
        except Exception as error:
            give_up_wandb(error, "going on offline")  # wandb would hold on to the id of the run that failed
    try:
        return open_wandb(config, "offline", folder, resolved, records)
    except Exception as error:
        give_up_wandb(error, "going on without it")
    return None


def open_wandb(
    config: Config,
    mode: Literal["online", "offline"],
    folder: Path,
    resolved: dict[str, Any],
    records: list[dict[str, Any]],
) -> Any:
    """A wandb run named like ours, in the experiment's group, that has the `records` of metrics.jsonl already.

    It has one id for its whole life, kept in the run's folder. Online, wandb says how far it has come and ignores what
    it has; what a killed process did not get through is sent again. Offline, its file is written anew from `records`.
    So no point is lost or doubled.
    """
    import wandb

    if mode == "offline":
        for old in (folder / "wandb").glob("*run-*"):
            shutil.rmtree(old)
    id_file = folder / "wandb_id"
    if not id_file.exists():
        in_sweep = "WANDB_SWEEP_ID" in os.environ  # then the agent has chosen
        id_file.write_text(os.environ["WANDB_RUN_ID"] if in_sweep else secrets.token_hex(4))
    run = wandb.init(
        project=config.wandb.project,
        group=config.experiment,
        name=config.run,
        config=resolved,
        id=id_file.read_text().strip(),
        dir=str(folder),
        mode=mode,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(init_timeout=60),
    )
    # Our own step, because wandb's counts log calls.
    run.define_metric("*", step_metric="step")
    for axis in AXES:
        run.define_metric(axis)
        run.define_metric(f"val_loss_by_{axis}", step_metric=axis)
    known = run.step
    for record in records:
        if record["step"] >= known and is_mirrored(record):
            run.log(for_wandb(config, record), step=record["step"])
    if config.wandb.save_code:
        upload_code(run)
    return run


def succeeds(call: Callable[[], None]) -> bool:
    """Call wandb. If that fails (its own process may be killed, say) the run goes on without it."""
    try:
        call()
    except Exception as error:
        give_up_wandb(error, "going on without it")
        return False
    return True


def give_up_wandb(error: Exception, then: str) -> None:
    import wandb

    print(f"warning: wandb: {reason(error)}; {then}, upload later with scripts/wandb_sync.py", file=sys.stderr)
    with suppress(Exception):
        wandb.teardown()  # or it asks for its process once more at the interpreter's end


def for_wandb(config: Config, record: dict[str, Any]) -> dict[str, Any]:
    """The record with the FLOPs so far; a validation's loss once more for each axis to draw it against."""
    flops = record["step"] * step_flops(config.model, config.train.batch_size, config.optimizer)
    losses = {f"val_loss_by_{axis}": record["val_loss"] for axis in AXES} if "val_loss" in record else {}
    return record | {"flops": flops} | losses


def finish_wandb(run: Any, records: list[dict[str, Any]]) -> None:
    """Close the run, with one line of compare.py's tables as its summary."""
    steps = [r for r in records if "loss" in r]
    validations = [r for r in records if "val_loss" in r]
    summary = {f"final/{key}": validations[-1][key] for key in ("step", "tokens", "seconds", "val_loss") if validations}
    for key in ("step_ms", "hessian_ms"):
        if values := [r[key] for r in steps if key in r]:
            summary[f"final/{key}"] = statistics.median(values)
    if steps:
        summary["final/clipped_share"] = sum(r["clipped"] for r in steps) / len(steps)
    run.summary.update(summary)
    run.finish()


def upload_code(run: Any) -> None:
    """The files that git knows, as they are now, as an artifact of the run."""
    import wandb

    root = Path(__file__).resolve().parents[1]
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True).stdout
    files = [name for name in listed.split("\0") if (root / name).is_file()]
    if not files:
        print("warning: wandb.save_code: git knows no file here; nothing is uploaded", file=sys.stderr)
        return
    artifact = wandb.Artifact(f"code-{run.id}", type="code")
    for name in files:
        artifact.add_file(str(root / name), name=name)
    run.log_artifact(artifact)


def start_tensorboard(config: Config, records: list[dict[str, Any]]) -> Any:
    """A writer to RUN/tensorboard that begins anew from the `records` of metrics.jsonl, so that no point is doubled."""
    if not config.train.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    folder = config.run_dir / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    writer = SummaryWriter(str(folder))
    for record in filter(is_mirrored, records):
        write_scalars(writer, record)
    return writer


def write_scalars(writer: Any, record: dict[str, Any]) -> None:
    for key in record.keys() - {"step"}:
        writer.add_scalar(key, record[key], record["step"])


def is_mirrored(record: dict[str, Any]) -> bool:
    """wandb and TensorBoard get validations and the last line of each log interval, the one with the throughput."""
    return "val_loss" in record or "tokens_per_second" in record
