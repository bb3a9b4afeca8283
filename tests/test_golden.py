"""The losses of 50 steps of each optimizer, stored. A change of numerics fails here and has to be declared:

    GOLDEN=write python -m pytest tests/test_golden.py    # and say in the commit why they changed

In float64, so that they are the same on every processor; the data are made from integers for the same reason.
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
    """5,000 tokens of a linear congruential generator, every other one twice the last."""
    folder.mkdir()
    state, tokens = 1, [0]
    for i in range(5000):
        state = (1103515245 * state + 12345) % 2**31
        tokens.append((2 * tokens[-1]) % 61 if i % 2 else (state >> 16) % 61)
    for split in ("train", "val"):
        np.array(tokens, "<u2").tofile(folder / f"{split}.bin")
    return folder


@pytest.mark.parametrize("run", OPTIMIZERS)
def test_losses_are_the_stored_ones(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path, float64: None
) -> None:
    arguments = ["--train.max_steps=50", "--train.eval_interval=50", f"--data.path={golden_data(tmp_path / 'golden')}"]
    run_train(experiment, f"--run={run}", "--train.micro_batch_size=4", *arguments)
    losses = [loss for _, loss in read_lines(tmp_path / "out/tiny" / run, "loss")]
    if os.environ.get("GOLDEN") == "write":
        stored = json.loads(STORED.read_text()) if STORED.exists() else {}
        STORED.write_text(json.dumps(stored | {run: losses}, indent=1) + "\n")
    assert losses == pytest.approx(json.loads(STORED.read_text())[run], rel=1e-9)
    assert losses[-1] < losses[0] - 0.1
