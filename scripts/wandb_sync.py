"""Upload runs to Weights & Biases from their metrics.jsonl, e.g. after training without a network.

    python scripts/wandb_sync.py out/gpt2_125m/adamw out/gpt2_125m/sophia-g

The wandb run is the one that training has created, if any: same id, same group. What wandb already
has is not sent again, so the command may be repeated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.cli import Parser, UserError, reason, run_main
from runtime.config import from_stored
from runtime.run_folder import CONFIG, METRICS, read_environment, read_metrics
from runtime.trackers import WandbTracker


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", metavar="RUN_DIR", nargs="+", type=Path, help="folders with a metrics.jsonl")
    add("--offline", action="store_true", help="only write wandb's own file, for `wandb sync`")
    arguments = parser.parse_args()
    for folder in arguments.runs:
        upload(folder, "offline" if arguments.offline else "online")


def upload(folder: Path, mode: str) -> None:
    """Send one run.

    Raises:
        UserError: if the folder does not contain a run, or if wandb cannot be reached.
    """
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        stored["wandb"]["mode"] = mode
        config = from_stored(stored)
        records = read_metrics(folder / METRICS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: not a run's folder, which has {CONFIG} and {METRICS} ({reason(error)})"
        ) from error

    tracker = WandbTracker(config, folder, read_environment(folder), records)
    run = tracker.run
    last = max((record["step"] for record in records if "val_loss" in record), default=-1)
    tracker.close(exit_status=0 if last == config.train.max_steps else 1)
    if tracker.run is None:
        raise UserError(f"{folder}: not uploaded, wandb failed; see its message above")
    if mode == "online" and run.offline:
        raise UserError(
            f"{folder}: not uploaded, wandb cannot be reached; run `wandb login` or try again later"
        )
    print(f"{folder}: {len(records)} lines, run {run.id} in project {config.wandb.project}")


if __name__ == "__main__":
    run_main(main)
