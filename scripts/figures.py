"""Figures of the paper that are read off runs: a sweep, the share of clipped steps, the loss against the model's size.

    python scripts/figures.py sweep out/ablation_rho_beta2-cpu --x optimizer.beta2 --y optimizer.rho    # Figure 7(c)
    python scripts/figures.py sweep out/ablation_attention-cpu --x optimizer.lr                         # Figure 7(b)
    python scripts/figures.py clipped out/gpt2_30m-cpu                                                  # Figure 7(a)
    python scripts/figures.py sizes out/gpt2_30m-cpu out/gpt2_125m-cpu                                  # Figure 1(c)

Each prints a table and writes it with a picture to the first folder, or to --out DIR. Finished runs alone count. In a
sweep a cell is the best over what is neither x nor y, and the mean over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import KEYS, ModelConfig
from errors import UserError, run_main
from model import num_parameters
from scripts import analysis, pictures
from scripts.analysis import Group, Run, value_of
from scripts.compare import format_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in (
        ("sweep", "final loss against one key, or two"),
        ("clipped", "steps whose gradient was clipped, counted up"),
        ("sizes", "final loss against the number of parameters"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("folders", metavar="OUT_DIR", nargs="+", type=Path)
        command.add_argument("--out", metavar="DIR", type=Path, help="folder to write to (default: the first OUT_DIR)")
        if name == "sweep":
            command.add_argument("--x", metavar="KEY", required=True, help="e.g. optimizer.lr")
            command.add_argument("--y", metavar="KEY", help="a line for each of its values, e.g. optimizer.rho")
    arguments = parser.parse_args()
    runs = [run for run in analysis.find_runs(arguments.folders) if run.is_finished]
    if not runs:
        raise UserError(f"{arguments.folders[0]}: no finished run; go on with scripts/run.py")
    make: dict[str, Callable[..., tuple[list[dict[str, str]], Any]]] = {"sweep": sweep, "clipped": clipped}
    rows, figure = make.get(arguments.command, sizes)(runs, arguments)
    out = arguments.out or arguments.folders[0]
    pictures.save(figure, [out / f"{arguments.command}.png"])
    table = format_table(rows)
    (out / f"{arguments.command}.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    print(f"wrote {arguments.command}.md and {arguments.command}.png to {out}")


def sweep(runs: list[Run], arguments: argparse.Namespace) -> tuple[list[dict[str, str]], Any]:
    """A line of the table, and of the picture, for each run of the file and value of y; a column for each x."""
    for key in filter(None, (arguments.x, arguments.y)):
        if key not in KEYS:
            raise UserError(f"{key}: no key of a config; see train.py --help")
    lines: dict[str, dict[float, float]] = {}
    for group in analysis.group_runs(runs):
        config = group.runs[0].config
        x, y = value_of(config, arguments.x), value_of(config, arguments.y) if arguments.y else None
        if not isinstance(x, int | float):
            continue
        name = group.table + ("" if y is None else f", {arguments.y.split('.')[1]} {y}")
        cells = lines.setdefault(name, {})
        cells[x] = min(cells.get(x, float("inf")), group.mean)
    if not lines:
        raise UserError(f"--x={arguments.x}: no run has a number there")
    columns = sorted({x for cells in lines.values() for x in cells})
    rows = []
    for name, cells in lines.items():
        best = min(cells, key=lambda x: cells[x])
        texts = {f"{x:g}": f"{cells[x]:.4f}{' *' if x == best else ''}" if x in cells else "" for x in columns}
        rows.append({"run": name} | texts | {"best": f"{cells[best]:.4f}"})
    plt = pictures.pyplot()
    figure, panel = plt.subplots(figsize=(7, 4.5), layout="constrained")
    styles = itertools.cycle(itertools.product(pictures.LINE_STYLES, list(pictures.COLORS.values())))
    for (name, cells), (style, color) in zip(lines.items(), styles, strict=False):
        xs = sorted(cells)
        panel.plot(xs, [cells[x] for x in xs], style, color=color, marker="o", ms=4, label=name)
    if columns[0] > 0 and columns[-1] > 4 * columns[0]:
        panel.set_xscale("log")
    highest = sorted(loss for cells in lines.values() for loss in cells.values())
    if highest[-1] > 3 * highest[0]:
        panel.set_yscale("log")  # something diverged
    panel.set(xlabel=arguments.x, ylabel="final validation loss, nats a token")
    panel.legend(frameon=False, fontsize="small")
    return rows, figure


def clipped(runs: list[Run], arguments: argparse.Namespace) -> tuple[list[dict[str, str]], Any]:
    """How many steps so far had a gradient beyond the limit, for the first seed of each run at its longest horizon."""
    plt = pictures.pyplot()
    figure, panel = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = []
    longest = max(run.horizon for run in runs)
    for group in analysis.group_runs(run for run in runs if run.horizon == longest):
        run = group.runs[0]
        counts = list(itertools.accumulate(int(r["clipped"]) for r in run.records))
        panel.plot([r["step"] for r in run.records], counts, color=color_of(run), label=group.name.split("/")[1])
        rows.append({"run": group.name, "steps": str(len(counts)), "clipped": f"{counts[-1] / len(counts):.1%}"})
    panel.set(xlabel="steps", ylabel="steps with a clipped gradient")
    panel.legend(frameon=False, fontsize="small")
    return rows, figure


def sizes(runs: list[Run], arguments: argparse.Namespace) -> tuple[list[dict[str, str]], Any]:
    """Final loss of each optimizer's best setting against parameters; at the horizon that most runs have."""
    horizons = [run.horizon for run in runs]
    horizon = max(set(horizons), key=horizons.count)
    points: dict[str, dict[int, Group]] = {}
    for group in analysis.group_runs(run for run in runs if run.horizon == horizon):
        n = num_parameters(ModelConfig(**group.runs[0].config["model"]))
        by_size = points.setdefault(group.optimizer, {})
        if n not in by_size or group.mean < by_size[n].mean:
            by_size[n] = group
    plt = pictures.pyplot()
    figure, panel = plt.subplots(figsize=(6, 4.5), layout="constrained")
    rows = []
    for optimizer, by_size in points.items():
        ns = sorted(by_size)
        losses = [by_size[n].mean for n in ns]
        panel.semilogx(ns, losses, marker="o", color=pictures.COLORS.get(optimizer, pictures.OTHER), label=optimizer)
        rows.append({"run": optimizer} | {f"{n:,}": f"{by_size[n].mean:.4f}" for n in ns})
    panel.set(xlabel="parameters", ylabel=f"validation loss after {horizon} steps")
    panel.legend(frameon=False)
    return rows, figure


def color_of(run: Run) -> str:
    return pictures.COLORS.get(run.optimizer, pictures.OTHER)


if __name__ == "__main__":
    run_main(main)
