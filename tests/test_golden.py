"""Compare the losses of 50 steps of each optimizer with stored ones.

A change of numerics fails here. If it is intended, store the new losses and explain them in the
commit message:

    GOLDEN=write python -m pytest tests/test_golden.py

The runs are in float64 and the data come from integer arithmetic, so that the losses are the same
on every processor.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import OPTIMIZERS, read_lines
from tests.test_train import Runner

STORED = Path(__file__).with_name("golden_losses.json")


def golden_data(folder: Path) -> Path:
    """Write tokens of a linear congruential generator; every other one is twice the last."""
    folder.mkdir()
    state, tokens = 1, [0]
    for i in range(5000):
        state = (1103515245 * state + 12345) % 2**31
        tokens.append((2 * tokens[-1]) % 61 if i % 2 else (state >> 16) % 61)

    for split in ("train", "val"):
        np.array(tokens, "<u2").tofile(folder / f"{split}.bin")
    return folder


@pytest.mark.parametrize("run", OPTIMIZERS)
def test_losses_match_the_stored_ones(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path, float64: None
) -> None:
    data = golden_data(tmp_path / "golden")
    arguments = [experiment, f"--run={run}", f"--data.path={data}", "--train.micro_batch_size=4"]
    run_train(*arguments, "--train.max_steps=50", "--train.eval_interval=50")
    losses = [loss for _, loss in read_lines(tmp_path / "out/tiny" / run, "loss")]

    if os.environ.get("GOLDEN") == "write":
        stored = json.loads(STORED.read_text()) if STORED.exists() else {}
        STORED.write_text(json.dumps(stored | {run: losses}, indent=1) + "\n")

    assert losses == pytest.approx(json.loads(STORED.read_text())[run], rel=1e-9)
    assert losses[-1] < losses[0] - 0.1
