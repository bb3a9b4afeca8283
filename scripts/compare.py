"""Compare runs at the end of their schedules: tables, plots, and a page with interactive curves.

    python scripts/compare.py out/gpt2_125m                   # all runs of an experiment
    python scripts/compare.py out/a/adamw out/b/adamw --out /tmp/two
    python scripts/compare.py --wandb me/sophia-gpt2/gpt2_125m --out results/mine

Writes compare.md, .csv, .json, .png, .svg, and .html if plotly is installed. Runs that differ only
in their seed are one line: mean ± standard deviation, and the difference from the reference with as
many tokens and the same batch, paired over common seeds, with a 95 % interval and tests. Speed-ups
are read only from whole, fully decayed schedules, because before its end the learning rate decides
the loss. Unfinished runs are drawn but not compared, diverged ones are counted, and steps are never
read off a curve.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.report import make_report, write_files
from analysis.runs import find_runs, wandb_runs
from analysis.statistics import MARGIN
from runtime.cli import Parser, UserError, number, reason, run_main


def main() -> None:
    arguments = parse_arguments()
    runs = wandb_runs(arguments.wandb) if arguments.wandb else find_runs(arguments.folders)
    out = arguments.out or (Path() if arguments.wandb else arguments.folders[0])
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes the name of a folder")

    report = make_report(runs, arguments.reference, arguments.target, arguments.margin)
    print(report.as_markdown())
    suffixes = write_files(out, runs, report)
    print(f"wrote compare.{', .'.join(suffixes)} to {out}")
    if "html" not in suffixes:
        print("for the interactive page: python -m pip install -r requirements-extras.txt")
    if arguments.upload:
        upload(arguments.wandb, out, suffixes)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folders", metavar="OUT_DIR", nargs="*", type=Path, help="a run, an experiment, or out/")
    add("--wandb", metavar="ENTITY/PROJECT/GROUP", help="read the runs of a wandb group instead")
    add("--upload", action="store_true", help="with --wandb: upload the result to the group")
    add("--out", metavar="DIR", type=Path, help="folder to write to (default: the first OUT_DIR)")
    add("--reference", metavar="RUN", help="run to compare with (default: the first with AdamW)")
    add(
        "--target",
        metavar="LOSS",
        type=number(float, 0),
        help="loss to reach, nats per token (default: the reference's last)",
    )
    add(
        "--margin",
        metavar="NATS",
        type=number(float, 0),
        default=MARGIN,
        help=f"differences that count as none, nats per token (default: {MARGIN})",
    )
    arguments = parser.parse_args()
    if bool(arguments.folders) == bool(arguments.wandb):
        raise UserError("give folders to compare (out/EXPERIMENT), or --wandb=ENTITY/PROJECT/GROUP")
    if arguments.upload and not arguments.wandb:
        raise UserError("--upload needs to know where to: add --wandb=ENTITY/PROJECT/GROUP")
    return arguments


def upload(path: str, out: Path, suffixes: list[str]) -> None:
    """Upload the plot as a run of the group, and all files as an artifact."""
    import wandb

    entity, project, group = path.split("/")
    try:
        run = wandb.init(
            entity=entity,
            project=project,
            group=group,
            job_type="compare",
            name="compare",
            dir=out,
        )
        artifact = wandb.Artifact(f"compare-{group}", type="comparison")
        for suffix in suffixes:
            artifact.add_file(str(out / f"compare.{suffix}"))
        run.log({"curves": wandb.Image(str(out / "compare.png"))})
        run.log_artifact(artifact)
        run.finish()
    except Exception as error:  # wandb's own errors, and those of its connection and process
        raise UserError(
            f"--upload: wandb failed ({reason(error)}); the files are in {out}"
        ) from error


if __name__ == "__main__":
    run_main(main)
