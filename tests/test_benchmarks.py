from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench, nanogpt_loop, parts
from model import num_parameters
from runtime.cli import run_main


def test_bench_prints_a_table_and_writes_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--parts", "data", "--json", str(tmp_path / "b/bench.json")])
    run_main(bench.main)
    written = json.loads((tmp_path / "b/bench.json").read_text())
    assert written["torch"] == torch.__version__
    assert written["commit"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| data")]
    (row,) = written["rows"]
    assert 0 < row["ratio"] < 0.05
    assert table == [
        f"| data | {row['what']} | {row['value']:,.4g} ms | a step | {row['ratio']:.3f} | < 0.005 |",
    ]


def test_what_the_time_limit_leaves_no_room_for_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench.time, "monotonic", iter([0.0, 1e6, 1e6]).__next__)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--parts", "data", "start"])
    run_main(bench.main)
    assert "not run: data\nnot run: start\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--parts prepare --files nowhere/*.parquet", "--files 'nowhere/*.parquet': no file matches"),
        ("--parts trainer --micro 12 25", "--micro 25: does not divide the 120 sequences of a step"),
    ],
)
def test_bench_refuses_before_it_measures(
    arguments: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments.split()])
    with pytest.raises(SystemExit):
        run_main(bench.main)
    assert f"error: {said}" in capsys.readouterr().err


def test_a_failure_loses_nothing_that_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(bench, "data_loading", lambda *_: iter([bench.Row("data", "it", 1.0, "ms")]))
    monkeypatch.setattr(bench, "start", fail)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--parts", "data", "start", "ddp"])
    run_main(bench.main)
    out = capsys.readouterr().out
    assert "| data | it | 1 ms |" in out
    assert "not run: start (RuntimeError: no such kernel more)\nnot run: ddp (needs torchrun)\n" in out


def test_the_gpu_table_is_complete_with_a_stand_in_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's memory functions alone are replaced; the loops are real, eager, with the quickstart's shape."""
    shape, configure = parts.shape_of("quickstart"), parts.configure
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    monkeypatch.setattr(parts, "GPU_BATCH", 4)
    monkeypatch.setattr(parts, "shape_of", lambda _: shape)
    monkeypatch.setattr(parts, "configure", lambda _, *rest, **keys: configure("quickstart", *rest, **keys))
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**10)
    rows = list(parts.gpu_trainer("125m", [2, 4], bench.make_data(tmp_path), torch.device("cpu")))
    assert [row.part for row in rows] == ["trainer"] * 6 + ["memory"] * 6
    assert rows[0].ratio == 1
    assert all(row.ratio is not None and row.ratio > 0 for row in rows)


def test_the_reference_model_is_as_large_as_ours() -> None:
    for size in parts.SIZES:
        with torch.device("meta"):
            reference = nanogpt_loop.Model(parts.shape_of(size))
        assert sum(p.numel() for p in reference.parameters()) == num_parameters(parts.shape_of(size))
