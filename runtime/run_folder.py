"""The files in a run's folder besides checkpoints: config.json, environment.json, metrics.jsonl."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.cli import UserError

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"

ROOT = Path(__file__).resolve().parents[1]


def describe_environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return what a reader needs to repeat a run: commit, versions, device, command."""
    return {
        "commit": _git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain", "-uno")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": name_of(device),
        "world_size": world_size,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def name_of(device: torch.device) -> str:
    """Return the model of a GPU, or that of the CPU and the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name", "cpu")
    return f"{name if device.type == 'cpu' else device.type}, {os.cpu_count()} cores"


def _git(*arguments: str) -> str:
    """Return what git prints about this repository, or nothing if that fails."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def describe_commit() -> str:
    """Return the commit that is checked out, and the version of torch, as text."""
    commit = _git("rev-parse", "--short=10", "HEAD")
    changes = " with uncommitted changes" if _git("status", "--porcelain", "-uno") else ""
    return f"{'commit ' + commit if commit else 'not in git'}{changes}, torch {torch.__version__}"


def describe_code() -> dict[str, Any]:
    """Return what decides a run's numbers besides its config and data: code and versions."""
    files = set()
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "/")
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            files.add(path)
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return {
        "commit": _git("rev-parse", "HEAD") or None,
        "digest of the code": digest.hexdigest()[:12],
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def read_environment(folder: Path) -> dict[str, Any]:
    """Return a run's environment.json, or {} if it does not exist.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / ENVIRONMENT
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(environment, dict) or not isinstance(environment.get("data", {}), dict):
            raise ValueError("not a JSON object")
        return environment
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged; restore it from a backup or move it away (the run itself is intact)"
        ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, with null as NaN.

    A damaged line, such as one that was being written when the process was killed, is skipped
    with a warning.
    """
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_parse_line(line))
        except (ValueError, KeyError, AttributeError, RecursionError):
            print(f"warning: {path}, line {number}: damaged, skipped", file=sys.stderr)
    return records


def _parse_line(line: str) -> dict[str, Any]:
    record = json.loads(line)
    for key, value in record.items():
        if value is None:
            record[key] = math.nan
        elif not isinstance(value, int | float):
            raise ValueError(f"{key} is not a number")
    if not isinstance(record["step"], int) or not {"tokens", "seconds"} <= record.keys():
        raise ValueError("not a record of metrics.jsonl")
    return record


def to_line(record: dict[str, Any]) -> str:
    """Return a record as one line of metrics.jsonl, with NaN and infinity as null."""
    content = {}
    for key, value in record.items():
        is_finite = not isinstance(value, float) or math.isfinite(value)
        content[key] = value if is_finite else None
    return json.dumps(content) + "\n"
