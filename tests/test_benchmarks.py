"""Test bench.py: its table, its errors, and the GPU benchmark with a substitute for the GPU."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench, cpu_parts, nanogpt_loop, parts
from runtime.cli import run_main
from runtime.cost import num_parameters


def test_bench_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "b/bench.json"
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--parts", "data", "--json", str(path)])
    run_main(bench.main)

    written = json.loads(path.read_text())
    assert written["torch"] == torch.__version__
    assert written["commit"]
    (row,) = written["rows"]
    assert 0 < row["ratio"] < 0.05

    printed = capsys.readouterr().out.splitlines()
    table = [line for line in printed if line.startswith("| data")]
    value, ratio = f"{row['value']:,.4g} ms", f"{row['ratio']:.3f}"
    assert table == [f"| data | {row['what']} | {value} | a step | {ratio} | < 0.005 |"]


def test_parts_skipped_by_the_time_limit_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench.time, "monotonic", iter([0.0, 1e6, 1e6]).__next__)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--parts", "data", "start"])
    run_main(bench.main)
    assert "not run: data\nnot run: start\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--parts prepare --files nowhere/*.parquet",
            "--files 'nowhere/*.parquet': no file matches",
        ),
        (
            "--parts trainer --micro 12 25",
            "--micro 25: does not divide the 120 sequences of a step",
        ),
    ],
)
def test_bench_checks_its_arguments_before_it_measures(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments.split()])
    with pytest.raises(SystemExit):
        run_main(bench.main)

    assert f"error: {message}" in capsys.readouterr().err


def test_a_failed_part_keeps_the_other_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel\nmore")

    row = bench.Row("data", "it", 1.0, "ms")
    monkeypatch.setattr(bench, "data_loading", lambda *_: iter([row]))
    monkeypatch.setattr(bench, "start", fail)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--parts", "data", "start", "ddp"])
    run_main(bench.main)

    printed = capsys.readouterr().out
    assert "| data | it | 1 ms |" in printed
    start, ddp = "start (RuntimeError: no such kernel more)", "ddp (needs torchrun)"
    assert f"not run: {start}\nnot run: {ddp}\n" in printed


def test_gpu_table_is_complete_with_a_simulated_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the real loops on the CPU, eagerly and with the quickstart's small model.

    Only CUDA's memory functions are replaced.
    """
    shape, configure = parts.shape_of("quickstart"), parts.configure
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    monkeypatch.setattr(parts, "GPU_BATCH", 4)
    monkeypatch.setattr(parts, "shape_of", lambda _: shape)
    monkeypatch.setattr(parts, "configure", lambda _, *rest: configure("quickstart", *rest))
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    # Two micro-batches, 2 and 4, for each competitor: 1 GB per sequence, and 6 GB besides.
    peaks = itertools.cycle([8 * 10**9, 10 * 10**9])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))

    data, device = bench.make_data(tmp_path), torch.device("cpu")
    rows = list(parts.gpu_trainer("125m", [2, 4], data, device))

    assert [row.part for row in rows] == ["trainer"] * 6 + ["memory"] * 6
    assert rows[0].ratio == 1
    assert [row.value for row in rows[6:]] == [16, 32] * 3  # (0.95 × 24 - 6) / 1, and for 40 GB
    assert all(row.ratio is not None and row.ratio > 0 for row in rows)


def test_reference_model_is_as_large_as_ours() -> None:
    for size in parts.SIZES:
        shape = parts.shape_of(size)
        with torch.device("meta"):
            reference = nanogpt_loop.Model(shape)
        count = sum(p.numel() for p in reference.parameters())
        assert count == num_parameters(shape)


def test_profile_attributes_time_to_the_operations_that_take_it() -> None:
    matrix, vector = torch.randn(400, 400), torch.randn(100)
    labels = torch.randint(400, (400,))

    def step() -> None:
        torch.mm(matrix, matrix)
        torch.mm(matrix, matrix)
        torch.nn.functional.cross_entropy(matrix, labels)
        vector.sin()

    milliseconds = cpu_parts.milliseconds_by_part(step)
    others = {part: value for part, value in milliseconds.items() if part != "matrix products"}
    assert milliseconds["matrix products"] > sum(others.values())
    assert others["loss"] > 0
    assert others["other"] > 0
    assert others["attention"] == others["optimizer"] == 0
