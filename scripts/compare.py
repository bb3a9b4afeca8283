"""Compare runs at the end of their schedules: tables, a picture, a page with curves to look into.

    python scripts/compare.py out/gpt2_125m                   # all runs of an experiment
    python scripts/compare.py out/a/adamw out/b/adamw --out /tmp/two
    python scripts/compare.py --wandb me/sophia-gpt2/gpt2_125m --out results/mine

Writes compare.md, .csv, .json, .png, .svg and .html. Runs that differ in their seed alone are one line: mean ± standard
deviation, and against the reference at the same horizon the difference over common seeds, with its paired t-test.
A speed-up is read from whole, fully decayed schedules alone. In the middle of one, the learning rate decides the loss:
unfinished runs are drawn but not compared, and no number of steps is ever read off a curve.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis import plots as pictures
from analysis import runs as analysis
from analysis.runs import Group, Run
from runtime.cli import Parser, UserError, number, reason, run_main
from runtime.files import whole_file


def main() -> None:
    arguments = parse_arguments()
    runs = analysis.wandb_runs(arguments.wandb) if arguments.wandb else analysis.find_runs(arguments.folders)
    out = arguments.out or (Path() if arguments.wandb else arguments.folders[0])
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes the name of a folder")
    report = make_report(runs, arguments.reference, arguments.target)
    print(report)
    write(out, runs, report)
    print(f"wrote compare.md, .csv, .json, .png, .svg and .html to {out}")
    if arguments.upload:
        upload(arguments.wandb, out)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("folders", metavar="OUT_DIR", nargs="*", type=Path, help="a run, an experiment, or all of out/")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT/GROUP", help="read the runs of a group at wandb instead")
    parser.add_argument(
        "--upload", action="store_true", help="with --wandb: put the result there, as a run of the group"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to write to (default: the first OUT_DIR)")
    parser.add_argument("--reference", metavar="RUN", help="run to compare with (default: the first with AdamW)")
    parser.add_argument(
        "--target",
        metavar="LOSS",
        type=number(float, 0),
        help="loss to reach, nats a token (default: the reference's last)",
    )
    arguments = parser.parse_args()
    if bool(arguments.folders) == bool(arguments.wandb):
        raise UserError("what is to be compared? Give folders (out/EXPERIMENT), or --wandb=ENTITY/PROJECT/GROUP")
    if arguments.upload and not arguments.wandb:
        raise UserError("--upload: where to? Add --wandb=ENTITY/PROJECT/GROUP")
    return arguments


def make_report(runs: list[Run], reference: str | None, target: float | None) -> str:
    """All that is printed, as Markdown."""
    groups = analysis.group_runs(runs)
    sections = [f"note: {run.name} is unfinished, {_where(run)}: left out" for run in runs if not run.is_finished]
    sections += [f"warning: the runs differ in more than the optimizer. {line}" for line in analysis.confounders(runs)]
    if not groups:
        return "\n".join([*sections, "no run is finished: nothing to compare yet"])
    base = references(groups, reference)
    tables = [
        ("Final losses", [loss_row(group, base) for group in groups]),
        ("Cost", [cost_row(group) for group in groups]),
        ("To the target", target_rows(groups, base, target)),
        ("The paper's test: T steps against T and 2T, each with its own decayed schedule", doubled_rows(groups, base)),
        ("Data efficiency by the reference's power law over horizons", efficiency_rows(groups, base)),
    ]
    sections += [f"\n{title}\n\n{format_table(rows)}" for title, rows in tables if rows]
    return "\n".join(sections)


def references(groups: list[Group], name: str | None) -> dict[int, Group]:
    """{horizon: the group to compare with}, all of one run of the file; of a sweep's settings, the best."""
    chosen = [g for g in groups if name in (g.table, g.name)] if name else [g for g in groups if _is_adamw(g)][:1]
    if name and not chosen:
        there = ", ".join(dict.fromkeys(group.table for group in groups))
        raise UserError(f"--reference={name}: no such finished run; there are: {there}")
    rivals = [group for group in groups if chosen and group.table == chosen[0].table]
    return {group.horizon: group for group in sorted(rivals, key=lambda group: group.mean, reverse=True)}


def _is_adamw(group: Group) -> bool:
    return group.optimizer == "adamw"


def _where(run: Run) -> str:
    return f"step {run.validations[-1]['step']:,} of {run.horizon:,}"


def loss_row(group: Group, base: dict[int, Group]) -> dict[str, str]:
    row = {
        "run": group.name,
        "seeds": str(len(group.losses)),
        "steps": f"{group.horizon:,}",
        "val loss": f"{group.mean:.4f}",
        "±": "–" if group.deviation is None else f"{group.deviation:.4f}",
    }
    reference = base.get(group.horizon)
    if reference is None or reference is group:
        return row | {"less reference": "–", "p": "–", "pairs": "–"}
    difference = analysis.compare_losses(group, reference)
    return row | {
        "less reference": f"{difference.mean:+.4f}",
        "p": "–" if difference.p is None else f"{difference.p:.3f}",
        "pairs": str(difference.seeds),
    }


def cost_row(group: Group) -> dict[str, str]:
    """Tokens and FLOPs of a run, and medians of its times, so that compiling does not count."""
    config, records = group.runs[0].config, [r for run in group.runs for r in run.records if "clipped" in r]
    step, estimate = analysis.step_times(group.runs)
    overhead = analysis.overhead(group.runs)
    return {
        "run": group.name,
        "tokens": f"{analysis.tokens_of(config) / 1e6:,.1f}M",
        "FLOPs": f"{analysis.step_flops(config) * group.horizon:.3g}",
        "hours": f"{seconds_of(group) / 3600:.3f}",
        "T(step) ms": "–" if step is None else f"{step:.1f}",
        "T(Hessian) ms": "–" if estimate is None else f"{estimate:.1f}",
        "overhead": "–" if overhead is None else f"{overhead:.1%}",
        "clipped": f"{sum(r['clipped'] for r in records) / len(records):.1%}" if records else "–",
    }


def seconds_of(group: Group) -> float:
    return sum(run.validations[-1]["seconds"] for run in group.runs) / len(group.runs)


def target_rows(groups: list[Group], base: dict[int, Group], target: float | None) -> list[dict[str, str]]:
    """For each run of the file, its shortest schedule that ends at the target or below."""
    if target is None:
        # The reference's loss at the longest horizon that another run has too: who gets there with less?
        shared = [g.horizon for g in groups if g.horizon in base and g.table != base[g.horizon].table]
        if not shared:
            return []
        target = base[max(shared)].mean
    tables = list(dict.fromkeys(group.table for group in groups))
    rows = []
    for table in tables:
        reached = [g for g in groups if g.table == table and g.mean <= target]
        row = {"run": table, "target": f"{target:.4f}"}
        if not reached:
            rows.append(row | {"steps": "not reached"})
            continue
        best = min(reached, key=lambda group: group.horizon)
        config = best.runs[0].config
        rows.append(
            row
            | {
                "steps": f"{best.horizon:,}",
                "tokens": f"{analysis.tokens_of(config) / 1e6:,.1f}M",
                "FLOPs": f"{analysis.step_flops(config) * best.horizon:.3g}",
                "seconds": f"{seconds_of(best):,.0f}",
            }
        )
    return rows


def doubled_rows(groups: list[Group], base: dict[int, Group]) -> list[dict[str, str]]:
    """Each run at T against the reference at T and at 2T."""
    rows = []
    for group in groups:
        once, twice = base.get(group.horizon), base.get(2 * group.horizon)
        if once is None or twice is None or once is group:
            continue
        rows.append(
            {
                "run": group.name,
                "T": f"{group.horizon:,}",
                "loss at T": f"{group.mean:.4f}",
                "reference at T": f"{once.mean:.4f}",
                "reference at 2T": f"{twice.mean:.4f}",
                "as good as 2T": "yes" if group.mean <= twice.mean else "no",
            }
        )
    return rows


def efficiency_rows(groups: list[Group], base: dict[int, Group]) -> list[dict[str, str]]:
    """How many tokens the reference would need for a run's final loss, by its fit, over the run's own."""
    law = analysis.fit_power_law(list(base.values()))
    if law is None:
        return []
    rows = []
    for group in groups:
        if group in base.values():
            continue
        own, needed = analysis.tokens_of(group.runs[0].config), law.tokens(group.mean)
        ratio = "beyond the fit's floor" if needed is None else f"{needed / own:.2f}"
        inside = needed is not None and law.covers(needed)
        rows.append({"run": group.name, "D_eff / D": ratio, "within the fit": "yes" if inside else "no, extrapolated"})
    return rows


def format_table(rows: list[dict[str, str]]) -> str:
    """Rows as a Markdown table with aligned columns, names to the left and numbers to the right."""
    columns = dict.fromkeys(column for row in rows for column in row)
    sides = ["left" if column == "run" else "right" for column in columns]
    return tabulate(rows, headers="keys", tablefmt="pipe", colalign=sides, disable_numparse=True)


def summary(run: Run) -> dict[str, Any]:
    """A run in one small JSON object: what was asked for, where it ran, and how it ended."""
    last, (step, estimate) = run.validations[-1], analysis.step_times([run])
    clipped = [r["clipped"] for r in run.records if "clipped" in r]
    return {
        "name": run.name,
        "finished": run.is_finished,
        "step": last["step"],
        "val_loss": last["val_loss"] if math.isfinite(last["val_loss"]) else None,
        "seed": run.seed,
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "flops": analysis.step_flops(run.config) * last["step"],
        "step_ms": step,
        "hessian_ms": estimate,
        "clipped_share": sum(clipped) / len(clipped) if clipped else None,
        "curve": [[v["step"], round(v["val_loss"], 4)] for v in run.validations if math.isfinite(v["val_loss"])],
        "environment": run.environment,
        "config": run.config,
    }


def write(out: Path, runs: list[Run], report: str) -> None:
    summaries = [summary(run) for run in runs]
    flat = [{k: v for k, v in s.items() if k not in ("curve", "environment", "config")} for s in summaries]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    lines = ",\n".join(json.dumps(s) for s in summaries)  # a run a line
    contents = {"md": report + "\n", "csv": table.getvalue(), "json": f"[\n{lines}\n]\n"}
    out.mkdir(parents=True, exist_ok=True)
    for suffix, text in contents.items():
        with whole_file(out / f"compare.{suffix}") as file:
            file.write(text.encode())
    pictures.draw_curves(runs, [out / "compare.png", out / "compare.svg"])
    pictures.write_page(runs, report, out / "compare.html")


def upload(path: str, out: Path) -> None:
    """The picture as a run of its own in the group, and all files as an artifact."""
    import wandb

    entity, project, group = path.split("/")
    try:
        run = wandb.init(entity=entity, project=project, group=group, job_type="compare", name="compare", dir=out)
        artifact = wandb.Artifact(f"compare-{group}", type="comparison")
        for suffix in ("md", "csv", "json", "png", "svg", "html"):
            artifact.add_file(str(out / f"compare.{suffix}"))
        run.log({"curves": wandb.Image(str(out / "compare.png"))})
        run.log_artifact(artifact)
        run.finish()
    except Exception as error:  # wandb's own, its connection's, its process's
        raise UserError(f"--upload: wandb failed ({reason(error)}); the files are in {out}") from None


if __name__ == "__main__":
    run_main(main)
