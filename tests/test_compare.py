"""compare.py, figures.py and the numbers behind them, on runs whose losses are known."""

from __future__ import annotations

import functools
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from analysis import runs as analysis
from model import GPT, summed_loss
from runtime import plan
from runtime.cli import UserError, run_main
from runtime.experiment import load_experiment
from runtime.metrics import to_line
from scripts import compare, figures, hessian, toy
from tests.conftest import TINY
from tests.wandb_file import read_history


def write_run(out: Path, run: str, losses: list[float], **overrides: object) -> Path:
    """A run's folder as train.py leaves it, with these validation losses at even intervals up to max_steps."""
    keys = {key.replace("__", "."): str(value) for key, value in overrides.items() if "__" in key}
    experiment = out / "tiny.toml"
    out.mkdir(parents=True, exist_ok=True)
    experiment.write_text(TINY.format(data="data", out="out"))
    config = load_experiment(experiment, run, keys)
    suffix = "".join(f",{key.split('.')[1]}={value}" for key, value in keys.items())
    config = config.model_copy(update={"run": run + suffix})
    folder = out / (run + suffix)
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "environment.json").write_text(json.dumps({"commit": "abc"}))
    done = int(overrides.get("done", config.train.max_steps))  # type: ignore[call-overload]
    lines = []
    for step in range(1, done + 1):
        at = {"step": step, "tokens": 128 * step, "seconds": 0.5 * step}
        record = at | {"loss": 3.0, "step_ms": 10.0, "clipped": step % 2 == 0}
        lines.append(to_line(record | ({"hessian_ms": 6.0} if run.startswith("sophia") and step % 3 == 1 else {})))
    for index, loss in enumerate(losses, start=1):
        step = done * index // len(losses)
        lines.append(to_line({"step": step, "tokens": 128 * step, "seconds": 0.5 * step, "val_loss": loss}))
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def report(out: Path, reference: str | None = None, target: float | None = None) -> str:
    return compare.make_report(analysis.find_runs([out]), reference, target)


def rows(text: str, title: str) -> list[dict[str, str]]:
    """The table below a title, as {column: cell} a line."""
    table = text.split(f"{title}")[1].strip().split("\n\n")[1 if title.startswith("\n") else 0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def test_seeds_are_gathered_with_their_deviation_and_a_paired_test(tmp_path: Path) -> None:
    for seed, (adamw, sophia) in enumerate([(2.0, 1.9), (2.2, 2.0), (2.4, 2.4)], start=1):
        write_run(tmp_path, "adamw", [3.0, adamw], train__seed=seed)
        write_run(tmp_path, "sophia-g", [3.0, sophia], train__seed=seed)
    one, two = rows(report(tmp_path), "Final losses")
    assert (one["run"], one["seeds"], one["val loss"], one["±"]) == ("tiny/adamw", "3", "2.2000", "0.2000")
    # Differences -0.1, -0.2, 0: t = -0.1 / (0.1 / √3) = -√3, two degrees of freedom.
    p = 1 - math.sqrt(3) / math.sqrt(3 + 2)
    assert (two["less reference"], two["p"]) == ("-0.1000", f"{p:.3f}")
    difference = analysis.compare_losses(*reversed(analysis.group_runs(analysis.find_runs([tmp_path]))))
    assert difference.p == pytest.approx(p)
    assert difference.seeds == 3
    assert rows(report(tmp_path, "sophia-g"), "Final losses")[0]["less reference"] == "+0.1000"


def test_only_common_seeds_are_compared_and_one_has_no_p(tmp_path: Path) -> None:
    for seed, loss in enumerate([2.0, 2.1, 9.0], start=1):
        write_run(tmp_path, "adamw", [loss], train__seed=seed)
    for seed, loss in enumerate([2.1, 2.3], start=1):
        write_run(tmp_path, "lion", [loss], train__seed=seed)
    write_run(tmp_path, "sophia-g", [1.9], train__seed=1)
    _, lion, sophia = rows(report(tmp_path), "Final losses")
    assert (lion["less reference"], lion["pairs"]) == ("+0.1500", "2")
    assert (sophia["less reference"], sophia["p"], sophia["pairs"]) == ("-0.1000", "–", "1")


def test_other_data_are_other_runs_and_a_new_key_is_not(tmp_path: Path) -> None:
    old = write_run(tmp_path, "adamw", [2.0], train__seed=1) / "config.json"
    config = json.loads(old.read_text())
    del config["model"]["causal"]  # written before the key was there
    old.write_text(json.dumps(config))
    write_run(tmp_path, "adamw", [2.2], train__seed=2)
    (row,) = rows(report(tmp_path), "Final losses")
    assert (row["seeds"], row["val loss"]) == ("2", "2.1000")
    write_run(tmp_path, "adamw", [3.0], train__seed=3, data__path="elsewhere")
    text = report(tmp_path)
    assert len(rows(text, "Final losses")) == 2
    assert 'warning: the runs differ in more than the optimizer. data.path: "data", "elsewhere"' in text


def test_cost_counts_estimates_and_takes_medians(tmp_path: Path) -> None:
    write_run(tmp_path, "adamw", [2.0])
    write_run(tmp_path, "sophia-g", [2.0])
    write_run(tmp_path, "sophia-h", [2.0])
    adamw, g, h = rows(report(tmp_path), "Cost")
    assert (g["T(step) ms"], g["T(Hessian) ms"], g["overhead"], g["clipped"]) == ("10.0", "6.0", "20.0%", "50.0%")
    assert (adamw["T(Hessian) ms"], adamw["overhead"]) == ("–", "–")
    # 4 of 8 sequences every 3 steps: a sixth of a gradient; a Hessian-vector product is three.
    flops = [float(row["FLOPs"]) for row in (adamw, g, h)]
    assert flops[1] / flops[0] == pytest.approx(1 + 1 / 6, abs=0.01)
    assert flops[2] / flops[0] == pytest.approx(1 + 3 / 6, abs=0.01)


def test_a_hessian_vector_product_is_three_gradients(tiny_gpt: GPT) -> None:
    model = tiny_gpt.float()
    x, y = torch.randint(11, (2, 4, 6))
    with FlopCounterMode(display=False) as gradient:
        model(x, summed_loss, y).backward()
    with FlopCounterMode(display=False) as product:
        hessian.hutchinson(model, x, y, torch.randn_like)
    ratio = product.get_total_flops() / gradient.get_total_flops()
    assert ratio == pytest.approx(plan.GRADIENTS_PER_HVP, rel=0.15)


def test_unfinished_runs_and_other_differences_are_told(tmp_path: Path) -> None:
    write_run(tmp_path, "adamw", [2.0])
    write_run(tmp_path, "lion", [1.0], done=6)
    write_run(tmp_path, "sophia-g", [1.9], train__grad_clip=0.5)
    text = report(tmp_path)
    assert "note: tiny/lion is unfinished, step 6 of 12: left out" in text
    assert "warning: the runs differ in more than the optimizer. train.grad_clip: 0.5, 1.0" in text
    assert [row["run"] for row in rows(text, "Final losses")] == ["tiny/adamw", "tiny/sophia-g,grad_clip=0.5"]
    assert "lion" not in text.split("Final losses")[1]
    assert "nothing to compare" in compare.make_report(analysis.find_runs([tmp_path / "lion"]), None, None)


def test_a_target_is_reached_by_whole_schedules_alone(tmp_path: Path) -> None:
    write_run(tmp_path, "adamw", [2.0])
    write_run(tmp_path, "adamw", [1.8], train__max_steps=24)
    write_run(tmp_path, "sophia-g", [1.7, 1.9])  # in its middle it was below
    write_run(tmp_path, "sophia-g", [1.75], train__max_steps=24)
    write_run(tmp_path, "lion", [2.1])
    text = report(tmp_path)
    found = {row["run"]: row for row in rows(text, "To the target")}
    assert {name: row["steps"] for name, row in found.items()} == {
        "adamw": "24",
        "sophia-g": "24",
        "lion": "not reached",
    }
    assert found["adamw"]["target"] == "1.8000"
    assert found["sophia-g"]["seconds"] == "12"
    by_hand = {row["run"]: row["steps"] for row in rows(report(tmp_path, target=1.95), "To the target")}
    assert by_hand == {"adamw": "24", "sophia-g": "12", "lion": "not reached"}
    doubled = {row["run"]: row["as good as 2T"] for row in rows(text, "own decayed schedule")}
    assert doubled == {"tiny/sophia-g": "no", "tiny/lion": "no"}
    with pytest.raises(UserError, match="--reference=x: no such finished run"):
        report(tmp_path, reference="x")


def test_data_efficiency_is_that_of_a_known_power_law(tmp_path: Path) -> None:
    def law(steps: float) -> float:
        return 1.5 + 0.8 * (steps / 12) ** -0.4

    for steps in (12, 24, 48, 96):
        write_run(tmp_path, "adamw", [law(steps)], train__max_steps=steps)
    write_run(tmp_path, "sophia-g", [law(1.5 * 24)], train__max_steps=24)
    write_run(tmp_path, "lion", [law(3 * 96)], train__max_steps=96)
    write_run(tmp_path, "sophia-h", [1.4], train__max_steps=96)
    found = {row["run"].split("/")[1].split(",")[0]: row for row in rows(report(tmp_path), "over horizons")}
    assert float(found["sophia-g"]["D_eff / D"]) == pytest.approx(1.5, abs=0.02)
    assert found["sophia-g"]["within the fit"] == "yes"
    assert float(found["lion"]["D_eff / D"]) == pytest.approx(3, abs=0.1)
    assert found["lion"]["within the fit"] == "no, extrapolated"
    assert found["sophia-h"]["D_eff / D"] == "beyond the fit's floor"


def test_compare_writes_table_csv_json_pictures_and_a_page_of_its_own(tmp_path: Path, monkeypatch, capsys) -> None:
    write_run(tmp_path, "adamw", [3.0, 2.0])
    write_run(tmp_path, "sophia-g", [3.0, math.nan])
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path), "--out", str(tmp_path / "new/results")])
    run_main(compare.main)
    printed, out = capsys.readouterr().out, tmp_path / "new/results"
    assert (out / "compare.md").read_text().strip() in printed
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "compare.svg").read_text()
    page = (out / "compare.html").read_text()
    assert "tiny/adamw" in page
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page
    (one, two) = json.loads((out / "compare.json").read_text())
    assert (one["val_loss"], one["environment"], one["curve"]) == (2.0, {"commit": "abc"}, [[6, 3.0], [12, 2.0]])
    assert two["val_loss"] is None
    assert (out / "compare.csv").read_text().splitlines()[0].startswith("name,finished,step,val_loss,seed")


def test_wandb_runs_are_read_like_folders(tmp_path: Path, monkeypatch) -> None:
    import wandb

    write_run(tmp_path, "adamw", [3.0, 2.0])
    write_run(tmp_path, "lion", [3.0, math.nan])
    write_run(tmp_path, "sophia-g", [3.0, 1.9])
    local = analysis.find_runs([tmp_path])

    class Stored:
        def __init__(self, run: analysis.Run) -> None:
            self.config = run.config | {"environment": run.environment}
            rows = [{"val_loss": None} | row for row in run.records] + run.validations
            self.rows = [{k: "NaN" if v != v else v for k, v in row.items()} for row in rows]

        def scan_history(self) -> list[dict[str, Any]]:
            return self.rows

    class Api:
        def runs(self, path: str, filters: dict[str, str]) -> list[Any]:
            if path != "me/project":
                raise ValueError(f"could not find {path}")
            uploaded = types.SimpleNamespace(config={}, scan_history=lambda: [{"curves": "an image"}])
            return [*(Stored(run) for run in local), uploaded] if filters == {"group": "tiny"} else []

    monkeypatch.setattr(wandb, "Api", Api)
    found = analysis.wandb_runs("me/project/tiny")
    assert compare.make_report(found, None, None) == compare.make_report(local, None, None)
    for wrong, says in {
        "me/project": "must be ENTITY/PROJECT/GROUP",
        "me/x/tiny": "could not find",
        "me/project/x": "no run",
    }.items():
        with pytest.raises(UserError, match=says):
            analysis.wandb_runs(wrong)
    monkeypatch.setattr(wandb, "init", functools.partial(wandb.init, mode="offline"))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["compare.py", "--wandb=me/project/tiny", "--upload", f"--out={out}"])
    run_main(compare.main)
    (stored,) = out.rglob("run-*.wandb")
    run, rows = read_history(stored)
    assert (run.entity, run.project, run.run_group, run.job_type) == ("me", "project", "tiny", "compare")
    assert [row["curves._type"] for row in rows] == ["image-file"]


def figure(monkeypatch, capsys, *arguments: object) -> list[list[str]]:
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, arguments)])
    run_main(figures.main)
    printed = capsys.readouterr().out
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]


def test_sweep_figure_has_the_best_of_what_is_not_shown(tmp_path: Path, monkeypatch, capsys) -> None:
    for lr, rho, loss in ((1e-3, 0.1, 2.0), (1e-3, 0.2, 1.9), (1e-2, 0.1, 1.8), (1e-2, 0.2, 2.5)):
        write_run(tmp_path, "sophia-g", [loss], optimizer__lr=lr, optimizer__rho=rho)
    table = figure(monkeypatch, capsys, "sweep", tmp_path, "--x", "optimizer.lr")
    assert table[0] == ["run", "0.001", "0.01", "best"]
    assert table[2] == ["sophia-g", "1.9000", "1.8000 *", "1.8000"]
    table = figure(monkeypatch, capsys, "sweep", tmp_path, "--x", "optimizer.lr", "--y", "optimizer.rho")
    assert table[3] == ["sophia-g, rho 0.2", "1.9000 *", "2.5000", "1.9000"]
    assert (tmp_path / "sweep.png").exists()
    with pytest.raises(SystemExit):
        figure(monkeypatch, capsys, "sweep", tmp_path, "--x", "optimizer.speed")


def test_horizons_figure_has_the_mean_and_deviation_of_whole_schedules(tmp_path: Path, monkeypatch, capsys) -> None:
    for seed, loss in ((1, 2.0), (2, 2.2)):
        write_run(tmp_path, "adamw", [loss], train__seed=seed)
    write_run(tmp_path, "adamw", [1.5], train__max_steps=24)
    table = figure(monkeypatch, capsys, "horizons", tmp_path)
    assert table[0] == ["run", "12", "24"]
    assert table[2] == ["adamw", "2.1000 ± 0.1414", "1.5000"]
    assert (tmp_path / "horizons.png").exists()


def test_a_sweep_figure_never_mixes_horizons(tmp_path: Path, monkeypatch, capsys) -> None:
    for lr in (1e-3, 1e-2):
        write_run(tmp_path, "adamw", [2.0], optimizer__lr=lr)
    write_run(tmp_path, "adamw", [1.0], optimizer__lr=1e-3, train__max_steps=24)
    table = figure(monkeypatch, capsys, "sweep", tmp_path, "--x", "optimizer.lr")
    assert table[2] == ["adamw", "2.0000 *", "2.0000", "2.0000"]


def test_clipped_and_sizes_figures(tmp_path: Path, monkeypatch, capsys) -> None:
    write_run(tmp_path, "adamw", [2.0])
    write_run(tmp_path, "adamw", [1.5], model__n_layer=4)
    assert figure(monkeypatch, capsys, "clipped", tmp_path)[2] == ["tiny/adamw", "12", "50.0%"]
    table = figure(monkeypatch, capsys, "sizes", tmp_path)
    assert table[2] == ["adamw", "2.0000", "1.5000"]
    assert len(table[0]) == 3


def test_the_toy_ends_where_the_paper_says() -> None:
    ends = {name: toy.trajectory(step)[-1].tolist() for name, step in toy.methods().items()}
    assert ends["Sophia"] == pytest.approx([1, 4], abs=1e-6)
    assert ends["Newton"] == pytest.approx([0, 4], abs=1e-6)  # the saddle
    assert ends["gradient descent"][0] == pytest.approx(1, abs=1e-6)
    assert ends["gradient descent"][1] < 3  # hardly moved where it is flat
    assert 0.05 < max(abs(ends["SignGD"][0] - 1), abs(ends["SignGD"][1] - 4)) <= 0.3  # jumps to and fro
    assert 1e-3 < math.dist(ends["Adam"], (1, 4)) < 0.5
    curvature = toy.curvature(torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert curvature.tolist() == pytest.approx([68.8, 1])


def test_histogram_of_a_checkpoint(experiment: Path, run_train, tmp_path: Path, monkeypatch, capsys) -> None:
    run_train(experiment, "--run=adamw")
    arguments = ["histogram", str(tmp_path / "out/tiny/adamw"), "--probes=3", "--windows=4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["hessian.py", *arguments])
    run_main(hessian.main)
    assert "tiny/adamw" in capsys.readouterr().out
    assert (tmp_path / "histogram.png").exists()


def test_errors_of_estimates_are_relative_to_the_exact_diagonal() -> None:
    exact = torch.tensor([3.0, 4.0])
    samples = exact + torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    row = hessian.error_row("x", samples, exact)
    assert row["error of the mean"] == "0.000"
    assert row["deviation of one draw"] == "0.20"
    assert hessian.error_row("x", samples[:1], exact)["error of the mean"] == "0.200"
