"""Upload runs to Weights & Biases from their metrics.jsonl, for example after training without a network.

    python scripts/wandb_sync.py out/gpt2_125m/adamw out/gpt2_125m/sophia-g

The run on wandb's side is the one that training made, if it made any: same id, same group. What wandb has already is
not sent again, so the command may be repeated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic import ValidationError

from runtime.cli import Parser, UserError, reason, run_main
from runtime.config import Config
from runtime.metrics import read_environment, read_metrics
from runtime.trackers import finish_wandb, start_wandb, succeeds


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", type=Path, help="folders with a metrics.jsonl")
    parser.add_argument("--offline", action="store_true", help="only write wandb's own file, for `wandb sync`")
    arguments = parser.parse_args()
    for folder in arguments.runs:
        upload(folder, "offline" if arguments.offline else "online")


def upload(folder: Path, mode: str) -> None:
    """Send one run. Raises UserError where the folder holds none, or wandb cannot be reached."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        saved["wandb"]["mode"] = mode
        config = Config.model_validate(saved)
        records = read_metrics(folder / "metrics.jsonl")
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{folder}: no run's folder ({reason(error)}); config.json, metrics.jsonl") from None
    run = start_wandb(config, folder, config.model_dump() | {"environment": read_environment(folder)}, records)
    if run is None or not succeeds(lambda: finish_wandb(run, records)):
        raise UserError(f"{folder}: not uploaded, wandb failed; see its message above")
    if mode == "online" and run.offline:
        raise UserError(f"{folder}: not uploaded, wandb cannot be reached; run `wandb login` or try again later")
    print(f"{folder}: {len(records)} lines, run {run.id} in project {config.wandb.project}")


if __name__ == "__main__":
    run_main(main)
