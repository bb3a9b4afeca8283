"""Figures that are read off runs: loss against horizon or size, a sweep, the share of clipped steps.

    python scripts/figures.py horizons out/gpt2_30m-cpu                                                 # Figures 4, 5
    python scripts/figures.py sizes out/gpt2_30m-cpu out/gpt2_125m-cpu                                  # Figure 1(c)
    python scripts/figures.py sweep out/ablation_rho_beta2-cpu --x optimizer.beta2 --y optimizer.rho    # Figure 7(c)
    python scripts/figures.py sweep out/ablation_attention-cpu --x optimizer.lr                         # Figure 7(b)
    python scripts/figures.py clipped out/gpt2_30m-cpu                                                  # Figure 7(a)

Each prints a table and writes it with a picture to the first folder, or to --out DIR. Finished runs alone count. In a
sweep a cell is the best over what is neither x nor y, and the mean over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis import plots as pictures
from analysis import runs as analysis
from analysis.runs import Group, Run, value_of
from model import num_parameters
from runtime.cli import Parser, UserError, run_main
from runtime.config import KEYS, ModelConfig
from scripts.compare import format_table

Rows = list[dict[str, str]]  # of a table: {column: text}


def main() -> None:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in (
        ("horizons", "final loss against the steps of the whole schedule"),
        ("sizes", "final loss against the number of parameters"),
        ("sweep", "final loss against one key, or two"),
        ("clipped", "steps whose gradient was clipped, counted up"),
    ):
        command = commands.add_parser(name, help=help_text, description=__doc__)
        command.add_argument("folders", metavar="OUT_DIR", nargs="+", type=Path, help="runs, or experiments")
        command.add_argument("--out", metavar="DIR", type=Path, help="folder to write to (default: the first OUT_DIR)")
        if name == "sweep":
            command.add_argument("--x", metavar="KEY", required=True, help="key on the axis, e.g. optimizer.lr")
            command.add_argument("--y", metavar="KEY", help="a line for each of its values, e.g. optimizer.rho")
    arguments = parser.parse_args()
    runs = [run for run in analysis.find_runs(arguments.folders) if run.is_finished]
    if not runs:
        raise UserError(f"{arguments.folders[0]}: no finished run; go on with scripts/run.py")
    make: dict[str, Callable[..., tuple[Rows, Any]]]
    make = {"horizons": horizons, "sizes": sizes, "sweep": sweep, "clipped": clipped}
    if arguments.command != "horizons":
        runs = of_one_horizon(runs, longest=arguments.command == "clipped")
    rows, figure = make[arguments.command](runs, arguments)
    out = arguments.out or arguments.folders[0]
    pictures.save(figure, [out / f"{arguments.command}.png"])
    table = format_table(rows)
    (out / f"{arguments.command}.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    print(f"wrote {arguments.command}.md and {arguments.command}.png to {out}")


def of_one_horizon(runs: list[Run], longest: bool) -> list[Run]:
    """The runs of the longest horizon, or of the one that most runs have; says what that leaves out."""
    horizons = [run.horizon for run in runs]
    kept = max(horizons) if longest else max(set(horizons), key=horizons.count)
    if others := sorted(set(horizons) - {kept}):
        print(f"note: runs of {kept} steps alone; left out are those of {', '.join(map(str, others))}")
    return [run for run in runs if run.horizon == kept]


def horizons(runs: list[Run], arguments: argparse.Namespace) -> tuple[Rows, Any]:
    return against(lambda run: run.horizon, runs, "steps of the whole schedule", "final validation loss, nats a token")


def sizes(runs: list[Run], arguments: argparse.Namespace) -> tuple[Rows, Any]:
    label = f"validation loss after {runs[0].horizon} steps, nats a token"
    return against(lambda run: num_parameters(ModelConfig(**run.config["model"])), runs, "parameters", label)


def against(key: Callable[[Run], int], runs: list[Run], x_label: str, y_label: str) -> tuple[Rows, Any]:
    """Each run's final loss against a number: mean ± deviation over seeds, of several settings the best."""
    points: dict[str, dict[int, Group]] = {}
    for group in analysis.group_runs(runs):
        best, x = points.setdefault(group.table, {}), key(group.runs[0])
        if x not in best or group.mean < best[x].mean:
            best[x] = group
    plt = pictures.pyplot()
    figure, panel = plt.subplots(figsize=(6, 4.5), layout="constrained")
    columns = sorted({x for groups in points.values() for x in groups})
    rows = []
    for name, groups in points.items():
        xs = sorted(groups)
        means, deviations = [groups[x].mean for x in xs], [groups[x].deviation or 0.0 for x in xs]
        panel.errorbar(xs, means, deviations, label=name, color=color_of(groups[xs[0]].runs[0]), marker="o", capsize=3)
        rows.append({"run": name} | {f"{x:,}": with_deviation(groups[x]) if x in groups else "" for x in columns})
    panel.set_xscale("log")
    panel.set_xticks(columns, [f"{x:,}" for x in columns])
    panel.minorticks_off()
    panel.set(xlabel=x_label, ylabel=y_label)
    panel.legend(frameon=False)
    return rows, figure


def with_deviation(group: Group) -> str:
    return f"{group.mean:.4f}" + ("" if group.deviation is None else f" ± {group.deviation:.4f}")


def sweep(runs: list[Run], arguments: argparse.Namespace) -> tuple[Rows, Any]:
    """A line of the table, and of the picture, for each run of the file and value of y; a column for each x."""
    for key in filter(None, (arguments.x, arguments.y)):
        if key not in KEYS:
            raise UserError(f"{key}: no key of a config; see train.py --help")
    lines: dict[tuple[str, Any], dict[float, float]] = {}  # {(run of the file, y): {x: loss}}
    optimizers: dict[str, str] = {}
    for group in analysis.group_runs(runs):
        config = group.runs[0].config
        x, y = value_of(config, arguments.x), value_of(config, arguments.y) if arguments.y else None
        if isinstance(x, int | float):
            cells = lines.setdefault((group.table, y), {})
            cells[x] = min(cells.get(x, float("inf")), group.mean)
            optimizers[group.table] = group.optimizer
    if not lines:
        raise UserError(f"--x={arguments.x}: no run has a number there")
    names = {key: key[0] + (f", {arguments.y.split('.')[1]} {key[1]}" if arguments.y else "") for key in lines}
    columns = sorted({x for cells in lines.values() for x in cells})
    rows = []
    for key, cells in lines.items():
        best = min(cells, key=lambda x: cells[x])
        texts = {f"{x:g}": f"{cells[x]:.4f}{' *' if x == best else ''}" if x in cells else "" for x in columns}
        rows.append({"run": names[key]} | texts | {"best": f"{cells[best]:.4f}"})
    return rows, draw_sweep(lines, names, optimizers, arguments.x)


def draw_sweep(lines: dict[tuple[str, Any], dict[float, float]], names: dict, optimizers: dict, x_label: str) -> Any:
    """A colour for each run of the file, a line style for each y."""
    plt = pictures.pyplot()
    figure, panel = plt.subplots(figsize=(9, 4.5), layout="constrained")
    colors = table_colors(optimizers)
    drawn: dict[str, int] = {}
    for (table, y), cells in lines.items():
        style = pictures.LINE_STYLES[drawn.get(table, 0) % len(pictures.LINE_STYLES)]
        drawn[table] = drawn.get(table, 0) + 1
        xs = sorted(cells)
        panel.plot(xs, [cells[x] for x in xs], style, color=colors[table], marker="o", ms=4, label=names[table, y])
    xs = sorted(x for cells in lines.values() for x in cells)
    if xs[0] > 0 and xs[-1] > 4 * xs[0]:
        panel.set_xscale("log")
    losses = sorted(loss for cells in lines.values() for loss in cells.values())
    if losses[-1] > 3 * losses[0]:
        panel.set_yscale("log")  # something diverged
    panel.set(xlabel=x_label, ylabel="final validation loss, nats a token")
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


def table_colors(optimizers: dict[str, str]) -> dict[str, str]:
    """{run of the file: colour}: its optimizer's where that is free, else one that no optimizer there has."""
    free = itertools.chain(
        (color for name, color in pictures.COLORS.items() if name not in optimizers.values()),
        itertools.repeat(pictures.OTHER),
    )
    colors: dict[str, str] = {}
    for table, optimizer in optimizers.items():
        own = pictures.COLORS.get(optimizer)
        colors[table] = own if own and own not in colors.values() else next(free)
    return colors


def clipped(runs: list[Run], arguments: argparse.Namespace) -> tuple[Rows, Any]:
    """How many steps so far had a gradient beyond the limit: the picture of each run's first seed, the share of all."""
    plt = pictures.pyplot()
    figure, panel = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = []
    for group in analysis.group_runs(runs):
        run = group.runs[0]
        counts = list(itertools.accumulate(int(r["clipped"]) for r in run.records))
        panel.plot([r["step"] for r in run.records], counts, color=color_of(run), label=group.name.split("/")[1])
        share = statistics.fmean(r["clipped"] for run in group.runs for r in run.records)
        rows.append({"run": group.name, "steps": str(len(counts)), "clipped": f"{share:.1%}"})
    panel.set(xlabel="steps", ylabel="steps with a clipped gradient")
    panel.legend(frameon=False, fontsize="small")
    return rows, figure


def color_of(run: Run) -> str:
    return pictures.COLORS.get(run.optimizer, pictures.OTHER)


if __name__ == "__main__":
    run_main(main)
