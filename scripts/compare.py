"""Compare runs: a table, and a picture of validation loss against steps, tokens and seconds.

    python scripts/compare.py out/gpt2_125m                  # all runs of an experiment
    python scripts/compare.py out/a/adamw out/b/adamw --png two.png

Reads config.json and metrics.jsonl of every run below the given folders. Compare runs at their end alone: in the middle
of a schedule the learning rate, not the optimizer, decides the loss.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from errors import UserError, run_main
from metrics import read_metrics

COLORS = {"adamw": "#0072B2", "lion": "#E69F00", "sophia-g": "#009E73", "sophia-h": "#CC3311"}  # colour-blind safe
LINE_STYLES = ("-", "--", ":", "-.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="OUT_DIR", nargs="+", type=Path, help="a run, an experiment, or all of out/")
    parser.add_argument("--png", metavar="FILE", type=Path, help="picture to write (default: compare.png in OUT_DIR)")
    arguments = parser.parse_args()

    runs = [run for folder in arguments.folders for run in find_runs(folder)]
    print(format_table([table_row(run) for run in runs]))
    for run in runs:
        if run["steps"] < run["max_steps"]:
            print(f"note: {run['name']} is unfinished; its losses are not comparable yet")
    png = arguments.png or arguments.folders[0] / "compare.png"
    if png.is_dir():
        raise UserError(f"{png}: is a folder; --png takes the name of a file")
    draw(runs, png)
    print(f"wrote {png}")


def find_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs below a folder, each with its config and the lines of its metrics.jsonl. Raises UserError for none."""
    paths = sorted(folder.rglob("metrics.jsonl"))
    runs = [run for path in paths if (run := read_run(path.parent))]
    if not runs:
        raise UserError(f"{folder}: no run with a validation in it; train one, e.g. with scripts/quickstart.sh")
    return runs


def read_run(folder: Path) -> dict[str, Any] | None:
    """One run's numbers; None where it was not validated yet."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        records = read_metrics(folder / "metrics.jsonl")
        steps = [r for r in records if "loss" in r]
        validations = [r for r in records if "val_loss" in r]
        name = f"{config['experiment']}/{config['run']}"
        step = steps[-1]["step"] if steps else 0
        max_steps, optimizer = config["train"]["max_steps"], config["optimizer"]["name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}: config.json or metrics.jsonl is damaged ({error!r}); leave it out") from None
    if not validations:
        return None
    numbers = {"steps": step, "max_steps": max_steps, "records": steps, "validations": validations}
    return {"name": name, "optimizer": optimizer, "experiment": config["experiment"], "run": config["run"]} | numbers


def table_row(run: dict[str, Any]) -> dict[str, str]:
    """The run's line of the table. Times are medians over its steps, so that compiling does not count."""
    records = [r for r in run["records"] if {"step_ms", "clipped"} <= r.keys()]
    losses = [r["val_loss"] for r in run["validations"]]
    row = {
        "run": run["name"],
        "val loss": f"{losses[-1]:.4f}",
        "best": f"{min(losses, key=lambda loss: (math.isnan(loss), loss)):.4f}",
    }
    if not records:
        return row
    estimates = [r["hessian_ms"] for r in records if "hessian_ms" in r]
    last = records[-1]
    return row | {
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens'] / 1e6:,.1f}M",
        "hours": f"{last['seconds'] / 3600:.3f}",
        "T(step) ms": f"{median(r['step_ms'] for r in records):.1f}",
        "T(Hessian) ms": f"{median(estimates):.1f}" if estimates else "–",
        "tokens/s": f"{last['tokens'] / max(last['seconds'], 1e-9):,.0f}",
        "clipped": f"{sum(r['clipped'] for r in records) / len(records):.1%}",
    }


def format_table(rows: list[dict[str, str]]) -> str:
    """Rows as a Markdown table with aligned columns, names to the left and numbers to the right."""
    columns = max((list(row) for row in rows), key=len)
    widths = {c: max(len(c), *(len(row.get(c, "")) for row in rows)) for c in columns}

    def line(cells: dict[str, str]) -> str:
        texts = {c: cells.get(c, "") for c in columns}
        padded = [t.ljust(widths[c]) if c == "run" else t.rjust(widths[c]) for c, t in texts.items()]
        return f"| {' | '.join(padded)} |"

    rule = {c: "-" * widths[c] if c == "run" else "-" * (widths[c] - 1) + ":" for c in columns}
    return "\n".join([line({c: c for c in columns}), line(rule), *(line(row) for row in rows)])


def draw(runs: list[dict[str, Any]], png: Path) -> None:
    """Three panels that share the loss axis, which leaves out the loss before training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    drawn: dict[str, int] = {}
    one_experiment = len({run["experiment"] for run in runs}) == 1
    for run in runs:
        optimizer = run["optimizer"]
        style = LINE_STYLES[drawn.get(optimizer, 0) % len(LINE_STYLES)]
        drawn[optimizer] = drawn.get(optimizer, 0) + 1
        points = [r for r in run["validations"] if r["step"] > 0] or run["validations"]
        name = str(run["run"] if one_experiment else run["name"]).replace("$", r"\$")
        label = f"{name}  {points[-1]['val_loss']:.3f}"
        for panel, axis in zip(panels, ("step", "tokens", "seconds"), strict=True):
            unit = 1e6 if axis == "tokens" else 1
            xs, ys = [r[axis] / unit for r in points], [r["val_loss"] for r in points]
            panel.plot(
                xs, ys, style, color=COLORS.get(optimizer, "#555555"), lw=1.6, marker="o", ms=3, alpha=0.85, label=label
            )
    for panel, axis in zip(panels, ("steps", "million tokens", "seconds of training"), strict=True):
        panel.set_xlabel(axis)
        panel.grid(color="#dddddd", lw=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss, nats a token")
    panels[-1].legend(frameon=False, title="run, final loss")
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{png}: cannot write the picture ({error}); choose another --png") from None
    plt.close(figure)


if __name__ == "__main__":
    run_main(main)
