"""The report of compare.py: tables in Markdown, and files with all numbers."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from tabulate import tabulate

from analysis import plots
from analysis.runs import Group, StoredRun, confounders, group_runs, step_flops, tokens_of
from analysis.statistics import compare_losses, fit_power_law, overhead, step_times
from runtime.cli import UserError
from runtime.files import write_text

Row = dict[str, str]  # column → text


def make_report(runs: list[StoredRun], reference: str | None, target: float | None) -> str:
    """Return the whole report as Markdown.

    Args:
        runs: what to compare.
        reference: the run to compare with. Default: the first one with AdamW.
        target: the loss to reach. Default: the reference's at its longest horizon.
    """
    lines = []
    for run in runs:
        if not run.is_finished:
            step = max(record["step"] for record in [*run.records, *run.validations])
            lines.append(
                f"note: {run.name} is unfinished, step {step:,} of {run.horizon:,}: left out"
            )
        origin = run.environment.get("branched_from")
        if origin:
            lines.append(f"note: {run.name} is a branch of {origin}: the steps up to there are its")
    for difference in confounders(runs):
        lines.append(f"warning: the runs differ in more than the optimizer. {difference}")

    groups = group_runs(runs)
    if not groups:
        return "\n".join([*lines, "no run is finished: nothing to compare yet"])

    base = references(groups, reference)
    doubled = "The paper's test: T steps against T and 2T, each with its own decayed schedule"
    tables = {
        "Final losses": [loss_row(group, base) for group in groups],
        "Cost": [cost_row(group) for group in groups],
        "To the target": target_rows(groups, base, target),
        doubled: doubled_rows(groups, base),
        "Data efficiency by the reference's power law over horizons": efficiency_rows(groups, base),
    }
    for title, rows in tables.items():
        if rows:
            lines.append(f"\n{title}\n\n{format_table(rows)}")
    return "\n".join(lines)


def references(groups: list[Group], name: str | None) -> dict[int, Group]:
    """Return {horizon: the group to compare with}, all of one run of the experiment file.

    If a sweep has several settings for it, the best one counts.
    """
    chosen = [group for group in groups if group.optimizer == "adamw"][:1]
    if name:
        chosen = [group for group in groups if name in (group.table, group.name)]
        if not chosen:
            tables = ", ".join(dict.fromkeys(group.table for group in groups))
            raise UserError(f"--reference={name}: no such finished run; there are: {tables}")

    best: dict[int, Group] = {}
    for group in groups:
        if chosen and group.table == chosen[0].table:
            other = best.get(group.horizon)
            if other is None or group.mean <= other.mean:
                best[group.horizon] = group
    return best


# ---- Tables --------------------------------------------------------------------------------------


def format_table(rows: list[Row]) -> str:
    """Return rows as a Markdown table, names aligned to the left and numbers to the right."""
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    sides = ["left" if column == "run" else "right" for column in columns]
    return tabulate(rows, headers="keys", tablefmt="pipe", colalign=sides, disable_numparse=True)


def loss_row(group: Group, base: dict[int, Group]) -> Row:
    """Return a group's final loss, and its difference from the reference at the same horizon."""
    row = {
        "run": group.name,
        "seeds": str(len(group.losses)),
        "steps": f"{group.horizon:,}",
        "val loss": f"{group.mean:.4f}",
        "±": "–" if group.deviation is None else f"{group.deviation:.4f}",
    }
    reference = base.get(group.horizon)
    if reference is None or reference is group:
        return row | {"minus reference": "–", "p": "–", "pairs": "–"}
    difference = compare_losses(group, reference)
    return row | {
        "minus reference": f"{difference.mean:+.4f}",
        "p": "–" if difference.p is None else f"{difference.p:.3f}",
        "pairs": str(difference.seeds),
    }


def cost_row(group: Group) -> Row:
    """Return a run's tokens, FLOPs and times."""
    config = group.runs[0].config
    step, estimate = step_times(group.runs)
    share = overhead(group.runs)
    clipped = []
    for run in group.runs:
        clipped += [record["clipped"] for record in run.records if "clipped" in record]
    return {
        "run": group.name,
        "tokens": f"{tokens_of(config) / 1e6:,.1f}M",
        "FLOPs": f"{step_flops(config) * group.horizon:.3g}",
        "hours": f"{mean_seconds(group) / 3600:.3f}",
        "T(step) ms": "–" if step is None else f"{step:.1f}",
        "T(Hessian) ms": "–" if estimate is None else f"{estimate:.1f}",
        "overhead": "–" if share is None else f"{share:.1%}",
        "clipped": f"{sum(clipped) / len(clipped):.1%}" if clipped else "–",
    }


def mean_seconds(group: Group) -> float:
    """Return the seconds that a run of the group has taken, the mean over seeds."""
    return sum(run.validations[-1]["seconds"] for run in group.runs) / len(group.runs)


def target_rows(groups: list[Group], base: dict[int, Group], target: float | None) -> list[Row]:
    """Return, for each run of the file, its shortest schedule that ends at the target or below."""
    if target is None:
        # The reference's loss at the longest horizon that another run has too.
        shared = []
        for group in groups:
            if group.horizon in base and group.table != base[group.horizon].table:
                shared.append(group.horizon)
        if not shared:
            return []
        target = base[max(shared)].mean

    rows = []
    for table in dict.fromkeys(group.table for group in groups):
        row = {"run": table, "target": f"{target:.4f}"}
        reached = [group for group in groups if group.table == table and group.mean <= target]
        if not reached:
            rows.append(row | {"steps": "not reached"})
            continue
        shortest = min(reached, key=lambda group: group.horizon)
        config = shortest.runs[0].config
        row |= {
            "steps": f"{shortest.horizon:,}",
            "tokens": f"{tokens_of(config) / 1e6:,.1f}M",
            "FLOPs": f"{step_flops(config) * shortest.horizon:.3g}",
            "seconds": f"{mean_seconds(shortest):,.0f}",
        }
        rows.append(row)
    return rows


def doubled_rows(groups: list[Group], base: dict[int, Group]) -> list[Row]:
    """Return each run at T beside the reference at T and at 2T."""
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


def efficiency_rows(groups: list[Group], base: dict[int, Group]) -> list[Row]:
    """Return how many tokens the reference would need for a run's loss, over the run's own."""
    law = fit_power_law(list(base.values()))
    if law is None:
        return []
    rows = []
    for group in groups:
        if group in base.values():
            continue
        own, needed = tokens_of(group.runs[0].config), law.tokens(group.mean)
        ratio = "beyond the fit's floor" if needed is None else f"{needed / own:.2f}"
        is_inside = needed is not None and law.covers(needed)
        rows.append(
            {
                "run": group.name,
                "D_eff / D": ratio,
                "within the fit": "yes" if is_inside else "no, extrapolated",
            }
        )
    return rows


# ---- Files ---------------------------------------------------------------------------------------


def summary(run: StoredRun) -> dict[str, Any]:
    """Return a run as one small JSON object: its config, its environment, and how it ended."""
    last = run.validations[-1]
    step, estimate = step_times([run])
    clipped = [record["clipped"] for record in run.records if "clipped" in record]
    curve = []
    for validation in run.validations:
        if math.isfinite(validation["val_loss"]):
            curve.append([validation["step"], round(validation["val_loss"], 4)])
    return {
        "name": run.name,
        "finished": run.is_finished,
        "step": last["step"],
        "val_loss": last["val_loss"] if math.isfinite(last["val_loss"]) else None,
        "seed": run.seed,
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "flops": step_flops(run.config) * last["step"],
        "step_ms": step,
        "hessian_ms": estimate,
        "clipped_share": sum(clipped) / len(clipped) if clipped else None,
        "curve": curve,
        "environment": run.environment,
        "config": run.config,
    }


def write_files(out: Path, runs: list[StoredRun], report: str) -> list[str]:
    """Write compare.md, .csv, .json, .png, .svg, and .html if plotly is installed.

    Returns the suffixes of the files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    summaries = [summary(run) for run in runs]
    write_text(out / "compare.md", report + "\n")
    write_text(out / "compare.csv", _as_csv(summaries))
    lines = ",\n".join(json.dumps(one) for one in summaries)  # one run per line
    write_text(out / "compare.json", f"[\n{lines}\n]\n")
    plots.draw_curves(runs, [out / "compare.png", out / "compare.svg"])

    suffixes = ["md", "csv", "json", "png", "svg"]
    if plots.write_page(runs, report, out / "compare.html"):
        suffixes.append("html")
    return suffixes


def _as_csv(summaries: list[dict[str, Any]]) -> str:
    nested = ("curve", "environment", "config")
    columns = [key for key in summaries[0] if key not in nested]
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(summaries)
    return table.getvalue()
