"""Nothing waits for the device, everything is compiled once, and what a run does not use is not imported."""

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
import step
import train
from tests.conftest import OPTIMIZERS, ROOT, read_lines
from tests.test_train import Runner


def test_what_a_run_does_not_use_is_not_imported() -> None:
    unused = {"wandb", "datasets", "matplotlib", "pyarrow", "torch.distributed.optim"}
    code = f"import sys, train; print(*{unused} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(("run", "graphs"), [("sophia-g", 7), ("sophia-h", 7)])
def test_compiled_training_follows_the_eager_losses_and_compiles_each_graph_once(
    run: str, graphs: int, experiment: Path, run_train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven graphs: training, validation, the estimate, and for both parameter groups the step and h's average."""
    run_train(experiment, f"--run={run}", "--model.n_layer=1", f"--train.out_dir={tmp_path / 'eager'}")
    for cached in (step.compiled, sophia._compiled):
        cached.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    make_step, counts = train.make_step, []

    def count(this: train.Run, step: int) -> dict:
        done = make_step(this, step)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return done

    monkeypatch.setattr(train, "make_step", count)
    run_train(experiment, f"--run={run}", "--model.n_layer=1", "--train.compile=true")
    assert counts == [graphs] * 12  # all in the first step, although lr is another one in each
    eager = dict(read_lines(tmp_path / "eager/tiny" / run, "loss"))
    assert dict(read_lines(tmp_path / "out/tiny" / run, "loss")) == pytest.approx(eager, rel=1e-4)


class NoWaitInside(TorchDispatchMode):
    """Raises where an operation asks for a number that may still be on its way: the host would wait for the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError("waits for the device")
        return function(*args, **(kwargs or {}))


class NoWait(TorchFunctionMode):
    """The same where Python asks."""

    asking = (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__bool__)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.asking:
            raise AssertionError("waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("run", OPTIMIZERS)
def test_no_step_and_no_estimate_waits_for_the_device(
    run: str, experiment: Path, run_train: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(function: Callable) -> Callable:
        def watched(*arguments: Any) -> Any:
            with NoWait(), NoWaitInside():
                return function(*arguments)

        return watched

    monkeypatch.setattr(train, "make_step", watch(train.make_step))
    run_train(experiment, f"--run={run}")
    monkeypatch.setattr(train, "write_steps", watch(train.write_steps))  # where the waiting is
    with pytest.raises(AssertionError, match="waits for the device"):
        run_train(experiment, f"--run={run}", f"--train.out_dir={experiment.parent / 'other'}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("run", OPTIMIZERS)
def test_no_step_and_no_estimate_waits_for_the_gpu(
    run: str, compiled: str, experiment: Path, run_train: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_step = train.make_step

    def watched(this: train.Run, step: int) -> dict:
        if step > 3:  # the compiler itself waits, and there is nothing left for it to do
            torch.cuda.set_sync_debug_mode("error")
        try:
            return make_step(this, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "make_step", watched)
    run_train(experiment, f"--run={run}", "--train.device=cuda", f"--train.compile={compiled}")
