"""Provide a tiny data set, a tiny experiment with four runs, and the trainer in this process."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import train
from model import GPT, ModelConfig
from runtime import checkpoint
from runtime.cli import run_main
from runtime.distributed import Ranks

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = ("adamw", "lion", "sophia-g", "sophia-h")
TINY = (ROOT / "tests/tiny.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write tokens from 0 to 60 in which t is usually followed by 2t + 1 (mod 61)."""
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
    """Write tests/tiny.toml with the paths of this test filled in."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(data=tiny_data, out=tmp_path / "out"))
    return path


@pytest.fixture
def run_train(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Run train.py in this process; a UserError raises SystemExit(2), as on the command line."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        run_main(train.main)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield run

    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def first_of_two_ranks() -> Iterator[Ranks]:
    """Make this process rank 0 of 2, whose process group has no second rank to wait for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 2)
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_wandb_left() -> Iterator[None]:
    """Stop wandb's service process, which would otherwise outlive the test that started it."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def load_script(name: str) -> Any:
    """Import scripts/NAME.py as a module. Scripts are commands; only their tests import them."""
    path = ROOT / f"scripts/{name}.py"
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    assert spec is not None
    assert spec.loader is not None

    module = importlib.util.module_from_spec(spec)
    # Register it first: dataclasses look their module up while it is executed.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def newest_state(run_dir: Path) -> dict[str, Any]:
    """Return the content of a run's newest checkpoint."""
    found = checkpoint.load_newest(run_dir)
    assert found is not None
    return found[1]


def read_lines(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """Return (step, value) for every line of a run's metrics.jsonl that has the key."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r[key]) for r in records if key in r]


@pytest.fixture
def float64() -> Iterator[None]:
    """Use float64, in which sums in a different order agree to 1e-12 instead of 1e-6."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def tiny_gpt() -> GPT:
    """Return a GPT with 2,152 parameters in float64, 424 of them padding rows of the embedding."""
    torch.manual_seed(0)
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=11)
    model = GPT(shape).double()

    # Weights of 0.3: at GPT-2's own 0.02 all probabilities are nearly equal.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15)

    return model
