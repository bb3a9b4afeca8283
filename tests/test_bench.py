from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from errors import run_main
from model import num_parameters
from scripts import bench, nanogpt_recipe


def test_bench_prints_a_table_and_writes_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.0)
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


def test_bench_refuses_files_that_are_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--parts", "prepare", "--files", "nowhere/*.parquet"])
    with pytest.raises(SystemExit):
        run_main(bench.main)
    assert "error: --files 'nowhere/*.parquet': no file matches" in capsys.readouterr().err


def test_the_reference_model_is_as_large_as_ours() -> None:
    for size in bench.SIZES:
        with torch.device("meta"):
            reference = nanogpt_recipe.Model(bench.shape_of(size))
        assert sum(p.numel() for p in reference.parameters()) == num_parameters(bench.shape_of(size))
