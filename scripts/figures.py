"""Draw figures from runs: differences, loss against horizon or size, a sweep, clipped steps.

    python scripts/figures.py differences out/gpt2_30m-cpu
    python scripts/figures.py horizons out/gpt2_30m-cpu                    # Figures 4, 5
    python scripts/figures.py sizes out/gpt2_30m-cpu out/gpt2_125m-cpu     # Figure 1(c)
    python scripts/figures.py sweep out/ablation_rho_beta2-cpu --x optimizer.beta2 --y optimizer.rho
    python scripts/figures.py sweep out/ablation_attention-cpu --x optimizer.lr        # Figure 7(b)
    python scripts/figures.py clipped out/gpt2_30m-cpu                     # Figure 7(a)

Each command prints a table and writes it, with a plot, to the first folder or to --out DIR.
Unfinished runs are left out. In a sweep a cell is the best over all keys that are neither x nor y,
and the mean over seeds; if a seed has diverged, the median, in which its loss is infinite.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis import plots
from analysis.report import (
    Row,
    compare_groups,
    format_interval,
    format_loss,
    format_table,
    references,
)
from analysis.runs import Group, StoredRun, find_runs, group_runs
from analysis.statistics import MARGIN
from model import ModelConfig
from runtime.cli import Parser, UserError, run_main
from runtime.config import KEYS, value_of
from runtime.cost import num_parameters

COMMANDS = {
    "differences": "final loss minus AdamW's, with intervals over seeds",
    "horizons": "final loss against the steps of the whole schedule",
    "sizes": "final loss against the number of parameters",
    "sweep": "final loss against one key, or two",
    "clipped": "cumulative count of steps whose gradient was clipped",
}


def main() -> None:
    arguments = parse_arguments()
    runs = [run for run in find_runs(arguments.folders) if run.is_finished or run.is_diverged]
    if not runs:
        raise UserError(
            f"{arguments.folders[0]}: no finished run; continue them with scripts/run.py"
        )
    if arguments.command == "differences":
        rows, figure = differences(runs)
    elif arguments.command == "horizons":
        rows, figure = horizons(runs)
    elif arguments.command == "sizes":
        rows, figure = sizes(of_one_horizon(runs, longest=False))
    elif arguments.command == "sweep":
        rows, figure = sweep(of_one_horizon(runs, longest=False), arguments.x, arguments.y)
    else:
        rows, figure = clipped(of_one_horizon(runs, longest=True))

    out = arguments.out or arguments.folders[0]
    plots.save(figure, [out / f"{arguments.command}.png"])
    table = format_table(rows)
    (out / f"{arguments.command}.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    print(f"wrote {arguments.command}.md and {arguments.command}.png to {out}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=__doc__)
        add = command.add_argument
        add("folders", metavar="OUT_DIR", nargs="+", type=Path, help="runs, or experiments")
        add("--out", metavar="DIR", type=Path, help="where to write (default: the first OUT_DIR)")
        if name == "sweep":
            add("--x", metavar="KEY", required=True, help="key on the axis, e.g. optimizer.lr")
            add("--y", metavar="KEY", help="one line per value of this key, e.g. optimizer.rho")
    return parser.parse_args()


def of_one_horizon(runs: list[StoredRun], longest: bool) -> list[StoredRun]:
    """Return the runs of the longest or most frequent horizon, and print what that leaves out."""
    horizons = [run.horizon for run in runs]
    kept = max(horizons) if longest else max(set(horizons), key=horizons.count)
    others = sorted(set(horizons) - {kept})
    if others:
        print(f"note: only runs of {kept} steps; left out: {', '.join(map(str, others))} steps")
    return [run for run in runs if run.horizon == kept]


# ---- Differences ---------------------------------------------------------------------------------


def differences(runs: list[StoredRun]) -> tuple[list[Row], Any]:
    """Draw paired differences from AdamW at equal tokens, and the margin that counts as none."""
    groups = group_runs(runs)
    compared = []
    for comparison in compare_groups(groups, references(groups, None), MARGIN):
        if comparison.difference and comparison.difference.test:
            compared.append(comparison)
    if not compared:
        raise UserError("no run has a seed pair with AdamW at equal tokens; add --seeds to run.py")
    compared.sort(key=lambda one: (one.group.table, one.group.horizon))

    plt = plots.pyplot()
    height = 1.2 + 0.32 * len(compared)
    figure, panel = plt.subplots(figsize=(7, height), layout="constrained")
    panel.axvspan(-MARGIN, MARGIN, color="0.92", label=f"within {MARGIN:g}")
    panel.axvline(0, color="0.5", lw=1)
    colors = plots.colors_of({one.group.table: one.group.optimizer for one in compared})
    rows, names = [], []
    for y, one in enumerate(compared):
        assert one.difference is not None
        assert one.difference.test is not None
        test, mean = one.difference.test, one.difference.mean
        panel.plot([test.low, test.high], [y, y], color=colors[one.group.table])
        panel.plot(mean, y, "o", color=colors[one.group.table])
        names.append(f"{one.group.table}, {one.group.horizon:,} steps")
        rows.append(
            {
                "run": names[-1],
                "minus AdamW": f"{mean:+.4f}",
                "95 % interval": format_interval(test),
                "pairs": str(one.difference.pairs),
                "verdict": one.verdict,
            }
        )
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlabel("final validation loss minus AdamW's, nats per token")
    panel.legend(frameon=False, fontsize="small")
    return rows, figure


# ---- Loss against a number -----------------------------------------------------------------------


def horizons(runs: list[StoredRun]) -> tuple[list[Row], Any]:
    def horizon(run: StoredRun) -> int:
        return run.horizon

    x_label = "steps of the whole schedule"
    return draw_against(horizon, runs, x_label, "final validation loss, nats per token")


def sizes(runs: list[StoredRun]) -> tuple[list[Row], Any]:
    def size(run: StoredRun) -> int:
        return num_parameters(ModelConfig(**run.config["model"]))

    y_label = f"validation loss after {runs[0].horizon} steps, nats per token"
    return draw_against(size, runs, "parameters", y_label)


def draw_against(
    key: Callable[[StoredRun], int], runs: list[StoredRun], x_label: str, y_label: str
) -> tuple[list[Row], Any]:
    """Draw final losses, mean ± deviation over seeds, against a number.

    If a run of the file has several settings at one x, the best one counts.
    """
    points: dict[str, dict[int, Group]] = {}  # run of the file → x → group
    for group in group_runs(runs):
        best = points.setdefault(group.table, {})
        x = key(group.runs[0])
        if x not in best or group.rank < best[x].rank:
            best[x] = group
    columns = sorted({x for groups in points.values() for x in groups})

    plt = plots.pyplot()
    figure, panel = plt.subplots(figsize=(6, 4.5), layout="constrained")
    optimizers = {name: next(iter(groups.values())).optimizer for name, groups in points.items()}
    colors = plots.colors_of(optimizers)
    rows = []
    for name, groups in points.items():
        xs = sorted(groups)
        means = [groups[x].loss for x in xs]
        deviations = [groups[x].deviation or 0.0 for x in xs]
        panel.errorbar(xs, means, deviations, label=name, color=colors[name], marker="o", capsize=3)
        cells = {f"{x:,}": format_loss(groups[x]) if x in groups else "" for x in columns}
        rows.append({"run": name} | cells)

    panel.set_xscale("log")
    panel.set_xticks(columns, [f"{x:,}" for x in columns])
    panel.minorticks_off()
    panel.set(xlabel=x_label, ylabel=y_label)
    panel.legend(frameon=False)
    return rows, figure


# ---- Sweeps --------------------------------------------------------------------------------------


def sweep(runs: list[StoredRun], x_key: str, y_key: str | None) -> tuple[list[Row], Any]:
    """Draw a line, and make a row, for each run of the file and value of y."""
    for key in (x_key, y_key):
        if key is not None and key not in KEYS:
            raise UserError(f"{key}: not a key of a config; see train.py --help")

    lines: dict[tuple[str, Any], dict[float, float]] = {}  # (run of the file, y) → x → loss
    optimizers: dict[str, str] = {}
    for group in group_runs(runs):
        config = group.runs[0].config
        x = value_of(config, x_key)
        y = value_of(config, y_key) if y_key else None
        if isinstance(x, int | float):
            cells = lines.setdefault((group.table, y), {})
            cells[x] = min(cells.get(x, math.inf), group.loss)
            optimizers[group.table] = group.optimizer
    if not lines:
        raise UserError(f"--x={x_key}: no run has a number there")

    names = {}
    for table, y in lines:
        names[table, y] = f"{table}, {y_key.split('.')[1]} {y}" if y_key else table
    columns = sorted({x for cells in lines.values() for x in cells})
    rows = []
    for line, cells in lines.items():
        best = min(cells, key=lambda x: cells[x])
        row = {"run": names[line]}
        for x in columns:
            mark = " *" if x == best else ""
            row[f"{x:g}"] = ""
            if x in cells:
                row[f"{x:g}"] = f"{cells[x]:.4f}{mark}" if math.isfinite(cells[x]) else "diverged"
        rows.append(row | {"best": f"{cells[best]:.4f}"})
    return rows, draw_sweep(lines, names, optimizers, x_key)


def draw_sweep(
    lines: dict[tuple[str, Any], dict[float, float]],
    names: dict[tuple[str, Any], str],
    optimizers: dict[str, str],
    x_label: str,
) -> Any:
    """Draw the lines with one colour per run of the file, and one line style per y."""
    plt = plots.pyplot()
    figure, panel = plt.subplots(figsize=(9, 4.5), layout="constrained")
    colors = plots.colors_of(optimizers)
    drawn: dict[str, int] = {}
    for (table, y), cells in lines.items():
        index = drawn.get(table, 0)
        drawn[table] = index + 1
        style = plots.LINE_STYLES[index % len(plots.LINE_STYLES)]
        xs = sorted(cells)
        losses = [cells[x] for x in xs]
        panel.plot(xs, losses, style, color=colors[table], marker="o", ms=4, label=names[table, y])

    xs = sorted(x for cells in lines.values() for x in cells)
    if xs[0] > 0 and xs[-1] > 4 * xs[0]:
        panel.set_xscale("log")
    losses = sorted(loss for cells in lines.values() for loss in cells.values())
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite and finite[-1] > 3 * finite[0]:
        panel.set_yscale("log")  # something almost diverged
    panel.set(xlabel=x_label, ylabel="final validation loss, nats per token")
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


# ---- Clipped steps -------------------------------------------------------------------------------


def clipped(runs: list[StoredRun]) -> tuple[list[Row], Any]:
    """Draw how many steps so far had their gradient clipped, for each run's first seed.

    The table has the share over all seeds.
    """
    plt = plots.pyplot()
    figure, panel = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = []
    for group in group_runs(runs):
        first = group.runs[0]
        steps = [record["step"] for record in first.records]
        counts = list(itertools.accumulate(int(record["clipped"]) for record in first.records))
        color = plots.color_of(first.optimizer)
        panel.plot(steps, counts, color=color, label=group.name.split("/")[1])

        flags = []
        for run in group.runs:
            flags += [record["clipped"] for record in run.records]
        share = statistics.fmean(flags)
        rows.append({"run": group.name, "steps": str(len(counts)), "clipped": f"{share:.1%}"})
    panel.set(xlabel="steps", ylabel="steps with a clipped gradient")
    panel.legend(frameon=False, fontsize="small")
    return rows, figure


if __name__ == "__main__":
    run_main(main)
