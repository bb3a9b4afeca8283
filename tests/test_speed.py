"""Test that steps need no host sync, that graphs are compiled once, and that imports are lazy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sophia
import train
from tests.conftest import OPTIMIZERS, ROOT, read_lines
from tests.test_train import Runner


def test_unused_packages_are_not_imported() -> None:
    unused = {"wandb", "datasets", "matplotlib", "pyarrow", "torch.distributed.optim"}
    code = f"import sys, train; print(*{unused} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(("run", "graphs"), [("sophia-g", 7), ("sophia-h", 7)])
def test_compiled_training_matches_eager_and_compiles_each_graph_once(
    run: str,
    graphs: int,
    experiment: Path,
    run_train: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Expect seven graphs: training, validation, the estimate, and two for each parameter group.

    The two are the step and the moving average of the Hessian estimate.
    """
    arguments = [experiment, f"--run={run}", "--model.n_layer=1"]
    run_train(*arguments, f"--train.out_dir={tmp_path / 'eager'}")

    # Start with empty caches.
    for cached in (train.compiled, sophia._compiled):
        cached.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    # Count the graphs after each step.
    train_step = train.train_step
    counts = []

    def count(this: train.Run, step: int) -> dict:
        done = train_step(this, step)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return done

    monkeypatch.setattr(train, "train_step", count)
    run_train(*arguments, "--train.compile=true")

    # All graphs are compiled in the first step, although the learning rate changes in every step.
    assert counts == [graphs] * 12
    eager = dict(read_lines(tmp_path / "eager/tiny" / run, "loss"))
    compiled = dict(read_lines(tmp_path / "out/tiny" / run, "loss"))
    assert compiled == pytest.approx(eager, rel=1e-4)


class NoSyncInDispatch(TorchDispatchMode):
    """Raises if an operation copies a value to the host, which would wait for the device."""

    syncing = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in self.syncing:
            raise AssertionError("waits for the device")
        return function(*args, **(kwargs or {}))


class NoSyncInPython(TorchFunctionMode):
    """Raises if Python code reads the value of a tensor."""

    syncing = (
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.cpu,
        torch.Tensor.numpy,
        torch.Tensor.__bool__,
    )

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in self.syncing:
            raise AssertionError("waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("run", OPTIMIZERS)
def test_steps_and_estimates_need_no_host_sync(
    run: str, experiment: Path, run_train: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(function: Callable) -> Callable:
        def watched(*arguments: Any) -> Any:
            with NoSyncInPython(), NoSyncInDispatch():
                return function(*arguments)

        return watched

    monkeypatch.setattr(train, "train_step", watch(train.train_step))
    run_train(experiment, f"--run={run}")

    # log_steps does sync: the watch must find that.
    monkeypatch.setattr(train, "log_steps", watch(train.log_steps))
    with pytest.raises(AssertionError, match="waits for the device"):
        run_train(experiment, f"--run={run}", f"--train.out_dir={experiment.parent / 'other'}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("run", OPTIMIZERS)
def test_steps_and_estimates_need_no_host_sync_on_a_gpu(
    run: str, compiled: str, experiment: Path, run_train: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = train.train_step

    def watched(this: train.Run, step: int) -> dict:
        # The compiler syncs, but is done after the first steps.
        if step > 3:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return train_step(this, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "train_step", watched)
    run_train(experiment, f"--run={run}", "--train.device=cuda", f"--train.compile={compiled}")
