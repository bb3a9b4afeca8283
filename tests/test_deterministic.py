"""Test train.deterministic. Equal bits on a GPU need a GPU: see the last test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor

import train
from runtime.distributed import set_deterministic
from sophia import sampled_label_loss
from tests.conftest import OPTIMIZERS, newest_state, read_lines
from tests.test_train import Runner


@pytest.fixture(autouse=True)
def off_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    set_deterministic(False)


@pytest.mark.parametrize("run", OPTIMIZERS)
def test_every_step_runs_in_strict_mode(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strict: an operation that has no deterministic form raises. The losses are the same here."""
    train_step, seen = train.train_step, []

    def watched(this: train.Run, step: int) -> dict[str, Any]:
        record = train_step(this, step)  # with the estimate, which must not switch the mode off
        strict = not torch.is_deterministic_algorithms_warn_only_enabled()
        seen.append(torch.are_deterministic_algorithms_enabled() and strict)
        assert inductor.deterministic == seen[-1]
        assert (os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8") == seen[-1]
        return record

    monkeypatch.setattr(train, "train_step", watched)
    arguments = [experiment, f"--run={run}"]
    run_train(*arguments, "--train.deterministic=false", f"--train.out_dir={tmp_path / 'plain'}")
    assert not any(seen)

    seen.clear()
    run_train(*arguments, "--train.deterministic=true")
    assert len(seen) == 12
    assert all(seen)
    plain = read_lines(tmp_path / "plain/tiny" / run, "loss")
    assert read_lines(tmp_path / "out/tiny" / run, "loss") == plain


@pytest.mark.parametrize("mode", ["off", "strict", "warn"])
def test_sampling_labels_leaves_the_mode_as_it_is(mode: str) -> None:
    torch.use_deterministic_algorithms(mode != "off", warn_only=mode == "warn")
    sampled_label_loss(torch.randn(2, 3, 600), torch.rand(2, 3))
    assert torch.are_deterministic_algorithms_enabled() == (mode != "off")
    assert torch.is_deterministic_algorithms_warn_only_enabled() == (mode == "warn")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("run", OPTIMIZERS)
def test_two_runs_on_a_gpu_have_the_same_bits(
    run: str, compiled: str, experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    states = []
    for name in ("a", "b"):
        keys = ["--train.device=cuda", f"--train.compile={compiled}", "--train.deterministic=true"]
        run_train(experiment, f"--run={run}", *keys, f"--name={name}")
        states.append(newest_state(tmp_path / "out/tiny" / name)["model"])
    for key, weight in states[0].items():
        assert torch.equal(weight, states[1][key])
