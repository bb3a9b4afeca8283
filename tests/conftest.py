"""A tiny data set, a tiny experiment with all four runs, and a trainer that runs in this process."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from model import GPT
from runtime.cli import run_main
from runtime.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = ("adamw", "lion", "sophia-g", "sophia-h")
TINY = (ROOT / "tests/tiny.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens 0 to 60 with some structure: each token is likely followed by its double."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20_000), ("val", 1_000)):
        tokens = np.zeros(count, "<u2")
        for i in range(1, count):
            tokens[i] = (2 * tokens[i - 1] + 1) % 61 if rng.random() < 0.7 else rng.integers(61)
        tokens.tofile(folder / f"{split}.bin")
    return folder


@pytest.fixture
def experiment(tmp_path: Path, tiny_data: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(data=tiny_data, out=tmp_path / "out"))
    return path


@pytest.fixture
def run_train(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """train.py with these arguments, in this process; a user's error raises SystemExit(2) as it does in a shell."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        run_main(train.main)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_wandb_left() -> Iterator[None]:
    """wandb's own process, once started, would serve all later tests and the processes that they start."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def read_lines(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of all lines of a run's metrics.jsonl that have the key."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r[key]) for r in records if key in r]


@pytest.fixture
def float64() -> Iterator[None]:
    """Sums in another order then agree to 1e-12 instead of 1e-6."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def tiny_gpt() -> GPT:
    """2,152 parameters in float64, of which 424 are padding rows of the embedding."""
    torch.manual_seed(0)
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=11)
    model = GPT(shape).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15)  # weights of 0.3: at GPT-2's own 0.02 all probabilities are nearly equal
    return model
