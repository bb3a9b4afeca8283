"""Test compare.py, figures.py and the statistics behind them, on runs with known losses."""

from __future__ import annotations

import functools
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from analysis import plots
from analysis import runs as analysis
from analysis.report import make_report
from analysis.statistics import POWER, compare_losses, detectable_difference, holm, paired_test
from model import GPT, summed_loss
from runtime.cli import UserError, run_main
from runtime.cost import GRADIENTS_PER_HVP
from runtime.experiment import load_experiment
from runtime.run_folder import to_line
from tests.conftest import TINY, load_script
from tests.wandb_file import read_history

compare, figures = load_script("compare"), load_script("figures")
hessian, toy = load_script("hessian"), load_script("toy")


def write_run(out: Path, run: str, losses: list[float], **overrides: object) -> Path:
    """Write a run's folder as train.py would, and return it.

    The validation losses are spread evenly over the steps, up to max_steps or `done`.
    An override such as train__seed=2 sets the key train.seed.
    """
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
        record: dict[str, Any] = {"step": step, "tokens": 128 * step, "seconds": 0.5 * step}
        record |= {"loss": 3.0, "step_ms": 10.0, "clipped": step % 2 == 0}
        if run.startswith("sophia") and step % 3 == 1:
            record["hessian_ms"] = 6.0
        lines.append(to_line(record))
    for index, loss in enumerate(losses, start=1):
        step = done * index // len(losses)
        record = {"step": step, "tokens": 128 * step, "seconds": 0.5 * step, "val_loss": loss}
        lines.append(to_line(record))
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def report(out: Path, reference: str | None = None, target: float | None = None) -> str:
    """Return the report on all runs below a folder."""
    return make_report(analysis.find_runs([out]), reference, target).as_markdown()


def read_table(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table, one list per line."""
    lines = []
    for line in text.splitlines():
        if "|" in line:
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
    return lines


def rows(text: str, title: str) -> list[dict[str, str]]:
    """Return the rows of the table below a title, each as {column: cell}."""
    table = text.split(title)[1].strip().split("\n\n")[0]
    columns, _, *lines = read_table(table)
    return [dict(zip(columns, cells, strict=True)) for cells in lines]


def test_seeds_give_a_mean_a_deviation_and_a_paired_test(tmp_path: Path) -> None:
    for seed, (adamw, sophia) in enumerate([(2.0, 1.9), (2.2, 2.0), (2.4, 2.4)], start=1):
        write_run(tmp_path, "adamw", [3.0, adamw], train__seed=seed)
        write_run(tmp_path, "sophia-g", [3.0, sophia], train__seed=seed)

    text = report(tmp_path)
    adamw_row, sophia_row = rows(text, "Final losses")
    shown = [adamw_row[column] for column in ("run", "seeds", "val loss")]
    assert shown == ["tiny/adamw", "3", "2.2000 ± 0.2000"]

    # Differences -0.1, -0.2, 0: t = -0.1 / (0.1 / √3) = -√3, two degrees of freedom.
    p = 1 - math.sqrt(3) / math.sqrt(3 + 2)
    assert (sophia_row["minus reference"], sophia_row["p"]) == ("-0.1000", f"{p:.3f}")
    groups = analysis.group_runs(analysis.find_runs([tmp_path]))
    difference = compare_losses(groups[1], groups[0])
    assert difference is not None
    assert difference.test is not None
    assert difference.test.p == pytest.approx(p)
    assert difference.pairs == 3

    # The 97.5 % quantile of t with two degrees of freedom is 4.3027.
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert sophia_row["95 % interval"] == f"{-0.1 - half:+.4f} to {-0.1 + half:+.4f}"
    assert sophia_row["verdict"] == "not resolved"
    assert "verdict: tiny/sophia-g against tiny/adamw, 1.54K tokens: not resolved (-0.1000" in text

    adamw_row, _ = rows(report(tmp_path, "sophia-g"), "Final losses")
    assert adamw_row["minus reference"] == "+0.1000"


def test_only_common_seeds_are_compared_and_one_pair_has_no_p(tmp_path: Path) -> None:
    for seed, loss in enumerate([2.0, 2.1, 9.0], start=1):
        write_run(tmp_path, "adamw", [loss], train__seed=seed)
    for seed, loss in enumerate([2.1, 2.3], start=1):
        write_run(tmp_path, "lion", [loss], train__seed=seed)
    write_run(tmp_path, "sophia-g", [1.9], train__seed=1)

    _, lion, sophia = rows(report(tmp_path), "Final losses")
    assert (lion["minus reference"], lion["pairs"]) == ("+0.1500", "2")
    assert (sophia["minus reference"], sophia["p"], sophia["pairs"]) == ("-0.1000", "–", "1")


def test_other_data_make_another_group_but_a_new_config_key_does_not(tmp_path: Path) -> None:
    # The first run was written before model.causal existed.
    old = write_run(tmp_path, "adamw", [2.0], train__seed=1) / "config.json"
    config = json.loads(old.read_text())
    del config["model"]["causal"]
    old.write_text(json.dumps(config))
    write_run(tmp_path, "adamw", [2.2], train__seed=2)
    (row,) = rows(report(tmp_path), "Final losses")
    assert (row["seeds"], row["val loss"]) == ("2", "2.1000 ± 0.1414")

    write_run(tmp_path, "adamw", [3.0], train__seed=3, data__path="elsewhere")
    text = report(tmp_path)
    assert len(rows(text, "Final losses")) == 2
    warning = "warning: the runs differ in more than the optimizer."
    assert f'{warning} data.path: "data", "elsewhere"' in text


def test_the_same_settings_and_seed_twice_are_kept_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "adamw", [2.0], train__seed=1)
    write_run(tmp_path / "b", "adamw", [2.5], train__seed=1)
    write_run(tmp_path / "b", "adamw", [2.1], train__seed=2)
    text = report(tmp_path)
    folders = [f"{tmp_path}/{name}/adamw,seed=1" for name in ("a", "b")]
    assert f"warning: the same settings and seed, kept apart: {', '.join(folders)}" in text
    names = {row["run"]: row["val loss"] for row in rows(text, "Final losses")}
    assert names == {
        "a/adamw": "2.0500 ± 0.0707",
        "b/adamw": "2.5000",
    }


def test_reference_has_equal_tokens_and_the_same_batch(tmp_path: Path) -> None:
    write_run(tmp_path, "adamw", [2.0])
    write_run(tmp_path, "lion", [1.9])
    # Half the batch for twice the steps: as many tokens, but another experiment.
    write_run(tmp_path, "lion", [1.7], train__batch_size=4, train__max_steps=24)
    same, other = rows(report(tmp_path), "Final losses")[1:]
    assert same["minus reference"] == "-0.1000"
    assert other["minus reference"] == "–"

    write_run(tmp_path, "adamw", [1.8], train__batch_size=4, train__max_steps=24)
    found = {row["run"]: row for row in rows(report(tmp_path), "Final losses")}
    assert found["tiny/lion,batch_size=4,max_steps=24"]["minus reference"] == "-0.1000"


# ---- Diverged runs -------------------------------------------------------------------------------


def test_diverged_runs_are_counted_and_have_no_mean(tmp_path: Path) -> None:
    for seed, losses in enumerate([2.0, 2.1, math.nan], start=1):
        write_run(tmp_path, "adamw", [3.0, losses], train__seed=seed)
        write_run(tmp_path, "lion", [3.0, 2.0 + seed / 10], train__seed=seed)
    write_run(tmp_path, "sophia-g", [3.0, math.nan], train__seed=1)

    text = report(tmp_path, reference="lion")
    assert "note: tiny/adamw,seed=3 has diverged, step 12" in text
    adamw, lion, sophia = rows(text, "Final losses")
    assert adamw["val loss"] == "1 of 3 diverged, median 2.1000"
    assert adamw["verdict"] == sophia["verdict"] == "diverged"
    assert "minus reference" not in adamw
    assert sophia["val loss"] == "1 of 1 diverged"
    assert lion["val loss"].startswith("2.2000 ± ")

    # As the reference, it is compared with nothing.
    assert rows(report(tmp_path), "Final losses")[1]["verdict"] == "reference diverged"


def test_a_run_that_stopped_after_bad_steps_has_diverged(tmp_path: Path) -> None:
    write_run(tmp_path, "adamw", [2.0])
    for name, steps in (("lion", range(5, 7)), ("sophia-g", range(3, 4))):
        folder = write_run(tmp_path, name, [2.2], done=6 if name == "lion" else 12)
        path = folder / "metrics.jsonl"
        lines = []
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["step"] in steps and "loss" in record:
                record |= {"loss": None, "skipped": 1}
            lines.append(json.dumps(record) + "\n")
        path.write_text("".join(lines))

    text = report(tmp_path)
    assert "note: tiny/lion has diverged, step 6, 2 steps skipped" in text
    assert "note: tiny/sophia-g has diverged, step 12, 1 steps skipped" in text
    assert [row["verdict"] for row in rows(text, "Final losses")] == ["–", "diverged", "diverged"]


def test_a_diverged_setting_is_never_the_reference(tmp_path: Path) -> None:
    for lr, loss in ((1e-3, math.nan), (2e-3, 2.0), (3e-3, 1.9)):
        write_run(tmp_path, "adamw", [loss], optimizer__lr=lr)
    write_run(tmp_path, "lion", [1.8])
    found = {row["run"]: row for row in rows(report(tmp_path), "Final losses")}
    assert found["tiny/lion"]["minus reference"] == "-0.1000"


# ---- Statistics ----------------------------------------------------------------------------------


def test_holm_is_the_published_procedure() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([None]) == [None]


def test_equivalence_needs_both_one_sided_tests() -> None:
    close = [0.001, -0.002, 0.003, -0.001, 0.0]
    assert paired_test(close).p_equal < 0.001
    assert paired_test([value + 0.02 for value in close]).p_equal > 0.4
    assert paired_test([value - 0.02 for value in close]).p_equal > 0.4
    assert paired_test([-1.0, -1.001, -0.999]).p_not_worse < 0.001
    wide = paired_test([0.2, -0.2, 0.1, -0.1])
    assert wide.p_equal > 0.3
    assert wide.p > 0.3  # neither different nor equal

    # With scipy's own test, on shifted differences.
    from scipy import stats

    expected = max(
        stats.ttest_1samp(close, -0.002, alternative="greater").pvalue,
        stats.ttest_1samp(close, 0.002, alternative="less").pvalue,
    )
    assert paired_test(close, margin=0.002).p_equal == pytest.approx(expected)
    assert paired_test(close).p == pytest.approx(stats.ttest_1samp(close, 0.0).pvalue)


def test_detectable_difference_is_found_with_80_percent_power() -> None:
    """Simulated: 20,000 experiments of six pairs."""
    from scipy import stats

    true = detectable_difference(deviation=0.02, n=6)
    draws = np.random.default_rng(0).normal(true, 0.02, (20_000, 6))
    found = stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(POWER, abs=0.01)


def test_differences_that_do_not_vary_are_not_tested(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path, "adamw", [2.0], train__seed=seed)
        write_run(tmp_path, "lion", [1.9999], train__seed=seed)
    _, lion = rows(report(tmp_path), "Final losses")
    assert lion["verdict"] == "the same for all seeds"
    assert "p" not in lion


def test_as_good_as_2t_is_a_one_sided_test(tmp_path: Path) -> None:
    for seed in range(1, 5):
        noise = seed / 1000
        write_run(tmp_path, "adamw", [2.5 + noise], train__seed=seed)
        write_run(tmp_path, "adamw", [2.2 - noise], train__seed=seed, train__max_steps=24)
        write_run(tmp_path, "sophia-g", [2.201 + noise], train__seed=seed)
        write_run(tmp_path, "sophia-h", [2.3], train__seed=seed)
        write_run(tmp_path, "lion", [2.2 + 0.1 * (-1) ** seed], train__seed=seed)
    found = {row["run"]: row for row in rows(report(tmp_path), "own decayed schedule")}
    verdicts = {name.split("/")[1]: row["as good as 2T"] for name, row in found.items()}
    assert verdicts == {"sophia-g": "yes", "sophia-h": "no", "lion": "not shown"}
    assert found["tiny/sophia-h"]["minus 2T"] == "+0.1025"
    assert found["tiny/sophia-h"]["p"] == "1.000"


def test_data_efficiency_has_an_interval_and_doubts(tmp_path: Path) -> None:
    for seed, noise in enumerate([-0.002, 0.001, 0.0, 0.002, -0.001], start=1):
        for steps in (12, 24, 48):
            loss = 1.5 + 0.8 * (steps / 12) ** -0.4 + noise
            write_run(tmp_path, "adamw", [loss], train__max_steps=steps, train__seed=seed)
        loss = 1.5 + 0.8 * 3**-0.4 - noise
        write_run(tmp_path, "lion", [loss], train__max_steps=24, train__seed=seed)
    text = report(tmp_path)
    (row,) = rows(text, "over horizons")
    low, high = map(float, row["95 % interval"].split(" to "))
    assert low < 1.5 < high
    assert low > 1.3
    assert high < 1.8
    assert "three horizons leave no degree of freedom" in text


def test_as_good_as_2t_needs_a_reference_that_gains_more_than_the_margin(tmp_path: Path) -> None:
    for seed in range(1, 5):
        noise = seed / 10_000
        write_run(tmp_path, "adamw", [2.215 + noise], train__seed=seed)
        write_run(tmp_path, "adamw", [2.2 - noise], train__seed=seed, train__max_steps=24)
        write_run(tmp_path, "sophia-g", [2.2155], train__seed=seed)
    (row,) = rows(report(tmp_path), "own decayed schedule")
    assert row["as good as 2T"] == "margin too wide"


def test_models_of_different_sizes_are_never_compared(tmp_path: Path) -> None:
    for width, loss in ((16, 2.0), (32, 1.8)):
        write_run(tmp_path, "adamw", [loss], model__n_embd=width)
        write_run(tmp_path, "lion", [loss - 0.1], model__n_embd=width)
    text = report(tmp_path)
    found = {row["run"]: row for row in rows(text, "Final losses")}
    assert found["tiny/lion,n_embd=16"]["minus reference"] == "-0.1000"
    assert found["tiny/lion,n_embd=32"]["minus reference"] == "-0.1000"
    assert text.count("verdict: ") == 2
    targets = [row["target"] for row in rows(text, "To the target")]
    assert targets == ["2.0000", "2.0000", "1.8000", "1.8000"]
    assert len(plots.curves(analysis.find_runs([tmp_path]))) == 4


def test_reference_setting_has_many_seeds_and_none_that_diverged(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path, "adamw", [2.0 + seed / 100], train__seed=seed, optimizer__lr=0.01)
        loss = 1.9 if seed < 3 else math.nan
        write_run(tmp_path, "adamw", [loss], train__seed=seed, optimizer__lr=0.05)
        write_run(tmp_path, "lion", [2.1 + seed / 50], train__seed=seed)
    write_run(tmp_path, "adamw", [1.8], train__seed=1, optimizer__lr=0.02)  # a lucky seed
    text = report(tmp_path)
    found = {row["run"]: row for row in rows(text, "Final losses")}
    assert found["tiny/lion"]["minus reference"] == "+0.1200"
    assert "warning: more settings were tried for some than for others: adamw 3, lion 1" in text
    assert "1 of 3 diverged" in text
    reached = {row["run"]: row["steps"] for row in rows(text, "To the target")}
    assert reached == {"adamw": "12", "lion": "not reached"}


def test_without_adamw_the_report_says_what_is_missing(tmp_path: Path) -> None:
    write_run(tmp_path, "lion", [2.0])
    text = report(tmp_path)
    assert "name a run by --reference" in text
    assert rows(text, "Final losses")[0]["verdict"] == "no reference"


def test_drawn_losses_are_those_of_the_table(tmp_path: Path) -> None:
    """A run that is unfinished, or has a loss that is not finite on the way, changes no other."""
    for seed in (1, 2):
        write_run(tmp_path, "adamw", [3.0, 2.0], train__seed=seed, optimizer__lr=0.01)
    write_run(tmp_path, "adamw", [3.0], train__seed=3, optimizer__lr=0.01, done=4)
    write_run(tmp_path, "adamw", [3.0, 2.3], train__seed=1, optimizer__lr=0.5)
    write_run(tmp_path, "lion", [3.0, math.nan, 1.8])
    adamw, lion = plots.curves(analysis.find_runs([tmp_path]))
    assert (adamw.label, adamw.losses) == ("adamw  2.000", [3.0, 2.0])
    assert (lion.label, lion.losses) == ("lion  1.800", [3.0, 1.8])


# ---- Costs, targets, files -----------------------------------------------------------------------


def test_cost_table_includes_hessian_estimates(tmp_path: Path) -> None:
    for run in ("adamw", "sophia-g", "sophia-h"):
        write_run(tmp_path, run, [2.0])

    adamw, g, h = rows(report(tmp_path), "Cost")
    shown = [g[column] for column in ("T(step) ms", "T(Hessian) ms", "overhead", "clipped")]
    assert shown == ["10.0", "6.0", "20.0%", "50.0%"]
    assert (adamw["T(Hessian) ms"], adamw["overhead"]) == ("–", "–")

    # 4 of 8 sequences every 3 steps: a sixth of a gradient; a Hessian-vector product is three.
    flops = [float(row["FLOPs"]) for row in (adamw, g, h)]
    assert flops[1] / flops[0] == pytest.approx(1 + 1 / 6, abs=0.01)
    assert flops[2] / flops[0] == pytest.approx(1 + 3 / 6, abs=0.01)


def test_a_hessian_vector_product_costs_three_gradients(tiny_gpt: GPT) -> None:
    model = tiny_gpt.float()
    x, y = torch.randint(11, (2, 4, 6))
    with FlopCounterMode(display=False) as gradient:
        model(x, summed_loss, y).backward()
    with FlopCounterMode(display=False) as product:
        hessian.hutchinson(model, x, y, torch.randn_like)
    ratio = product.get_total_flops() / gradient.get_total_flops()
    assert ratio == pytest.approx(GRADIENTS_PER_HVP, rel=0.15)


def test_unfinished_runs_and_other_differences_are_reported(tmp_path: Path) -> None:
    write_run(tmp_path, "adamw", [2.0])
    write_run(tmp_path, "lion", [1.0], done=6)
    write_run(tmp_path, "sophia-g", [1.9], train__grad_clip=0.5)

    text = report(tmp_path)
    assert "note: tiny/lion is unfinished, step 6 of 12: left out" in text
    assert "warning: the runs differ in more than the optimizer. train.grad_clip: 0.5, 1.0" in text
    names = [row["run"] for row in rows(text, "Final losses")]
    assert names == ["tiny/adamw", "tiny/sophia-g,grad_clip=0.5"]
    assert "lion" not in text.split("Final losses")[1]
    assert "nothing to compare" in report(tmp_path / "lion")


def test_only_whole_schedules_reach_a_target(tmp_path: Path) -> None:
    write_run(tmp_path, "adamw", [2.0])
    write_run(tmp_path, "adamw", [1.8], train__max_steps=24)
    # Below the target halfway, but not at its end.
    write_run(tmp_path, "sophia-g", [1.7, 1.9])
    write_run(tmp_path, "sophia-g", [1.75], train__max_steps=24)
    write_run(tmp_path, "lion", [2.1])

    text = report(tmp_path)
    found = {row["run"]: row for row in rows(text, "To the target")}
    steps = {name: row["steps"] for name, row in found.items()}
    assert steps == {"adamw": "24", "sophia-g": "24", "lion": "not reached"}
    assert found["adamw"]["target"] == "1.8000"
    assert found["sophia-g"]["seconds"] == "12"

    table = rows(report(tmp_path, target=1.95), "To the target")
    steps = {row["run"]: row["steps"] for row in table}
    assert steps == {"adamw": "24", "sophia-g": "12", "lion": "not reached"}

    doubled = {row["run"]: row["as good as 2T"] for row in rows(text, "own decayed schedule")}
    assert doubled == {"tiny/sophia-g": "not tested", "tiny/lion": "not tested"}  # one seed

    with pytest.raises(UserError, match="--reference=x: no such finished run"):
        report(tmp_path, reference="x")


def test_data_efficiency_matches_a_known_power_law(tmp_path: Path) -> None:
    def law(steps: float) -> float:
        return 1.5 + 0.8 * (steps / 12) ** -0.4

    for steps in (12, 24, 48, 96):
        write_run(tmp_path, "adamw", [law(steps)], train__max_steps=steps)
    write_run(tmp_path, "sophia-g", [law(1.5 * 24)], train__max_steps=24)
    write_run(tmp_path, "lion", [law(3 * 96)], train__max_steps=96)
    write_run(tmp_path, "sophia-h", [1.4], train__max_steps=96)

    found = {}
    for row in rows(report(tmp_path), "over horizons"):
        name = row["run"].split("/")[1].split(",")[0]
        found[name] = row
    assert float(found["sophia-g"]["D_eff / D"]) == pytest.approx(1.5, abs=0.02)
    assert found["sophia-g"]["within the fit"] == "yes"
    assert float(found["lion"]["D_eff / D"]) == pytest.approx(3, abs=0.1)
    assert found["lion"]["within the fit"] == "no, extrapolated"
    assert found["sophia-h"]["D_eff / D"] == "below the fit's floor"


def test_compare_writes_markdown_csv_json_figures_and_a_standalone_page(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    write_run(tmp_path, "adamw", [3.0, 2.0])
    write_run(tmp_path, "sophia-g", [3.0, math.nan])
    out = tmp_path / "new/results"

    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path), "--out", str(out)])
    run_main(compare.main)

    assert (out / "compare.md").read_text().strip() in capsys.readouterr().out
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "compare.svg").read_text()

    page = (out / "compare.html").read_text()
    assert "tiny/adamw" in page
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page

    adamw, sophia = json.loads((out / "compare.json").read_text())
    assert adamw["val_loss"] == 2.0
    assert adamw["environment"] == {"commit": "abc"}
    assert adamw["curve"] == [[6, 3.0], [12, 2.0]]
    assert sophia["val_loss"] is None

    header = (out / "compare.csv").read_text().splitlines()[0]
    assert header.startswith("name,finished,diverged,step,val_loss,seed")


def test_wandb_runs_give_the_same_report_as_folders(tmp_path: Path, monkeypatch) -> None:
    import wandb

    write_run(tmp_path, "adamw", [3.0, 2.0])
    write_run(tmp_path, "lion", [3.0, math.nan])
    write_run(tmp_path, "sophia-g", [3.0, 1.9])
    local = analysis.find_runs([tmp_path])

    class StoredOnline:
        """A run as wandb returns it: missing values are None, and NaN is a string."""

        def __init__(self, run: analysis.StoredRun) -> None:
            self.config = run.config | {"environment": run.environment}
            self.id = run.name
            self.rows = []
            for row in [*run.records, *run.validations]:
                copy = {key: "NaN" if value != value else value for key, value in row.items()}
                self.rows.append({"val_loss": None} | copy)

        def scan_history(self, use_cache: bool) -> list[dict[str, Any]]:
            assert not use_cache  # the run may have grown since it was cached
            return self.rows

    class Api:
        def runs(self, path: str, filters: dict[str, str]) -> list[Any]:
            if path != "me/project":
                raise ValueError(f"could not find {path}")
            if filters != {"group": "tiny"}:
                return []
            history = [{"curves": "an image"}]
            uploaded = types.SimpleNamespace(config={}, scan_history=lambda: history)
            return [*(StoredOnline(run) for run in local), uploaded]

    monkeypatch.setattr(wandb, "Api", Api)
    found = analysis.wandb_runs("me/project/tiny")
    assert make_report(found, None, None) == make_report(local, None, None)

    errors = {
        "me/project": "must be ENTITY/PROJECT/GROUP",
        "me/x/tiny": "could not find",
        "me/project/x": "no run",
    }
    for path, message in errors.items():
        with pytest.raises(UserError, match=message):
            analysis.wandb_runs(path)

    out = tmp_path / "out"
    arguments = ["--wandb=me/project/tiny", "--upload", f"--out={out}"]
    monkeypatch.setattr(wandb, "init", functools.partial(wandb.init, mode="offline"))
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    run_main(compare.main)
    (stored,) = out.rglob("run-*.wandb")
    run, history = read_history(stored)
    assert (run.entity, run.project) == ("me", "project")
    assert (run.run_group, run.job_type) == ("tiny", "compare")
    assert [row["curves._type"] for row in history] == ["image-file"]


def figure(monkeypatch, capsys, *arguments: object) -> list[list[str]]:
    """Run figures.py and return the cells of the table that it prints."""
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, arguments)])
    run_main(figures.main)
    return read_table(capsys.readouterr().out)


def test_sweep_figure_shows_the_best_over_hidden_axes(tmp_path: Path, monkeypatch, capsys) -> None:
    for lr, rho, loss in ((1e-3, 0.1, 2.0), (1e-3, 0.2, 1.9), (1e-2, 0.1, 1.8), (1e-2, 0.2, 2.5)):
        write_run(tmp_path, "sophia-g", [loss], optimizer__lr=lr, optimizer__rho=rho)
    arguments = ("sweep", tmp_path, "--x", "optimizer.lr")

    table = figure(monkeypatch, capsys, *arguments)
    assert table[0] == ["run", "0.001", "0.01", "best"]
    assert table[2] == ["sophia-g", "1.9000", "1.8000 *", "1.8000"]

    table = figure(monkeypatch, capsys, *arguments, "--y", "optimizer.rho")
    assert table[3] == ["sophia-g, rho 0.2", "1.9000 *", "2.5000", "1.9000"]
    assert (tmp_path / "sweep.png").exists()

    with pytest.raises(SystemExit):
        figure(monkeypatch, capsys, "sweep", tmp_path, "--x", "optimizer.speed")


def test_horizons_figure_shows_mean_and_deviation_of_whole_schedules(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    for seed, loss in ((1, 2.0), (2, 2.2)):
        write_run(tmp_path, "adamw", [loss], train__seed=seed)
    write_run(tmp_path, "adamw", [1.5], train__max_steps=24)
    table = figure(monkeypatch, capsys, "horizons", tmp_path)
    assert table[0] == ["run", "12", "24"]
    assert table[2] == ["adamw", "2.1000 ± 0.1414", "1.5000"]
    assert (tmp_path / "horizons.png").exists()


def test_differences_figure_shows_paired_intervals_per_horizon(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    for seed, loss in enumerate([1.9, 2.0, 2.4], start=1):
        write_run(tmp_path, "sophia-g", [loss], train__seed=seed)
    write_run(tmp_path, "sophia-g", [1.5], train__max_steps=24)
    with pytest.raises(SystemExit):
        figure(monkeypatch, capsys, "differences", tmp_path)

    for seed, loss in enumerate([2.0, 2.2, 2.4], start=1):
        write_run(tmp_path, "adamw", [loss], train__seed=seed)
    table = figure(monkeypatch, capsys, "differences", tmp_path)

    # Differences -0.1, -0.2, 0: the 97.5 % quantile of t with two degrees of freedom is 4.3027.
    half = 4.3027 * 0.1 / math.sqrt(3)
    interval = f"{-0.1 - half:+.4f} to {-0.1 + half:+.4f}"
    assert table[2:] == [["sophia-g, 12 steps", "-0.1000", interval, "3", "not resolved"]]
    assert (tmp_path / "differences.png").exists()


def test_sweep_figure_never_mixes_horizons(tmp_path: Path, monkeypatch, capsys) -> None:
    for lr in (1e-3, 1e-2):
        write_run(tmp_path, "adamw", [2.0], optimizer__lr=lr)
    write_run(tmp_path, "adamw", [1.0], optimizer__lr=1e-3, train__max_steps=24)
    table = figure(monkeypatch, capsys, "sweep", tmp_path, "--x", "optimizer.lr")
    assert table[2] == ["adamw", "2.0000 *", "2.0000", "2.0000"]


def test_clipped_and_sizes_figures(tmp_path: Path, monkeypatch, capsys) -> None:
    write_run(tmp_path, "adamw", [2.0])
    write_run(tmp_path, "adamw", [1.5], model__n_layer=4)

    table = figure(monkeypatch, capsys, "clipped", tmp_path)
    assert table[2] == ["tiny/adamw", "12", "50.0%"]

    table = figure(monkeypatch, capsys, "sizes", tmp_path)
    assert table[2] == ["adamw", "2.0000", "1.5000"]
    assert len(table[0]) == 3


def test_toy_optimizers_end_where_the_paper_says() -> None:
    ends = {name: toy.trajectory(step)[-1].tolist() for name, step in toy.methods().items()}
    assert ends["Sophia"] == pytest.approx([1, 4], abs=1e-6)
    # A saddle point.
    assert ends["Newton"] == pytest.approx([0, 4], abs=1e-6)

    # Gradient descent barely moves along the flat direction.
    x, y = ends["gradient descent"]
    assert x == pytest.approx(1, abs=1e-6)
    assert y < 3

    # SignGD oscillates around the minimum.
    x, y = ends["SignGD"]
    assert 0.05 < max(abs(x - 1), abs(y - 4)) <= 0.3
    assert 1e-3 < math.dist(ends["Adam"], (1, 4)) < 0.5

    curvature = toy.curvature(torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert curvature.tolist() == pytest.approx([68.8, 1])


def test_histogram_of_a_checkpoint(
    experiment: Path, run_train, tmp_path: Path, monkeypatch, capsys
) -> None:
    run_train(experiment, "--run=adamw")

    arguments = ["histogram", str(tmp_path / "out/tiny/adamw")]
    arguments += ["--probes=3", "--windows=4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["hessian.py", *arguments])
    run_main(hessian.main)

    assert "tiny/adamw" in capsys.readouterr().out
    assert (tmp_path / "histogram.png").exists()


def test_estimate_errors_are_relative_to_the_exact_diagonal() -> None:
    exact = torch.tensor([3.0, 4.0])
    samples = exact + torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    row = hessian.error_row("x", samples, exact)
    assert row["error of the mean"] == "0.000"
    assert row["deviation of one draw"] == "0.20"
    assert hessian.error_row("x", samples[:1], exact)["error of the mean"] == "0.200"
