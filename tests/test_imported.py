"""Test optimizers that a config names as package.module:Class."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from optimizers.imported import skipping
from tests.conftest import newest_state, read_lines
from tests.test_train import Runner, refuse, torchrun

OWN = """
from torch.optim import SGD

class Heavy(SGD):
    def __init__(self, params, lr, weight_decay=0.0, mass=0.9):
        super().__init__(params, 100 * lr, momentum=mass, weight_decay=weight_decay)

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] *= 100
        return super().step(closure)

class NotAnOptimizer:
    pass
"""
# Named like Sophia, without a closure, with an attribute that ZeroRedundancyOptimizer has too, and
# with a state in its parameter groups.
SOPHIA_LIKE = """
from torch.optim import Optimizer

class Growing(Optimizer):
    def __init__(self, params, **settings):
        super().__init__(params, {"size": 1.0} | settings)
        self.optim = object()

    def step(self):
        for group in self.param_groups:
            group["size"] *= 1.1
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["size"] * group["lr"])

class Named(Growing):
    def __init__(self, params, lr, size=1.0, weight_decay=0.0, **others):
        super().__init__(params, lr=lr, size=size, weight_decay=weight_decay, **others)
"""
CASES = {
    "torch.optim:NAdam": "betas = [0.8, 0.9]\ndecoupled_weight_decay = true",
    "torch.optim:RMSprop": "momentum = 0.5",
    "pytorch_optimizer:AdaBelief": "",
    "own_file:Heavy": "mass = 0.5",
    "torch.optim:SGD": "",  # has no state without momentum
    "sophia_like:Named": "",
}


@pytest.fixture
def imported(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the tiny experiment with a run for each of the cases, in a folder with own_file.py."""
    text = experiment.read_text()
    for name, options in CASES.items():
        run = name.split(":")[1].lower()
        lr = 0.1 if run in ("sgd", "named") else 1e-3
        text += f'[runs.{run}.optimizer]\nname = "{name}"\nlr = {lr}\nweight_decay = 0.01\n'
        text += f"[runs.{run}.optimizer.options]\n{options}\n"
    experiment.write_text(text)
    (tmp_path / "own_file.py").write_text(OWN)
    (tmp_path / "sophia_like.py").write_text(SOPHIA_LIKE)
    monkeypatch.chdir(tmp_path)
    return experiment


@pytest.mark.parametrize("run", ["nadam", "rmsprop", "adabelief", "heavy", "sgd", "named"])
def test_imported_optimizers_learn_and_resume(
    run: str, imported: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    if run == "adabelief":
        pytest.importorskip("pytorch_optimizer")
    run_train(imported, f"--run={run}")
    assert "every step waits for it" in capsys.readouterr().err
    folder = tmp_path / "out/tiny" / run
    whole = read_lines(folder, "loss")
    assert whole[-1][1] < whole[0][1]

    (folder / "step_00000012.pt").unlink()
    run_train(imported, f"--run={run}", "--resume")
    assert read_lines(folder, "loss") == whole


def test_arguments_reach_the_constructor(
    imported: Path, run_train: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options come from the file and the command line; embeddings and norms do not decay."""
    made: list[Any] = []
    make = train.make_optimizer

    def watch(*arguments: Any) -> Any:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(train, "make_optimizer", watch)
    run_train(imported, "--run=nadam", "--optimizer.options={betas = [0.7, 0.9], eps = 1e-6}")
    matrices, others = made[0].param_groups
    assert matrices["betas"] == (0.7, 0.9)
    assert matrices["eps"] == 1e-6
    assert matrices["decoupled_weight_decay"]  # from the file
    assert matrices["weight_decay"] == 0.01
    assert others["weight_decay"] == 0.0


@pytest.mark.slow
def test_sharded_imported_optimizer_has_the_same_losses(imported: Path, tmp_path: Path) -> None:
    keys = ["--run=nadam", "--train.micro_batch_size=4"]
    for sharded in ("false", "true"):
        out = f"--train.out_dir={tmp_path / sharded}"
        done = torchrun(2, imported, *keys, out, f"--train.shard_optimizer={sharded}")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("every step waits for it") == 1
    whole, parts = tmp_path / "false/tiny/nadam", tmp_path / "true/tiny/nadam"
    assert read_lines(parts, "loss") == read_lines(whole, "loss")

    ours, theirs = newest_state(parts)["optimizer"], newest_state(whole)["optimizer"]
    assert ours.keys() == theirs.keys()
    for name, state in theirs.items():
        assert state.keys() == ours[name].keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(ours[name][key]))


@pytest.mark.parametrize("fused", [False, True])
def test_step_that_is_not_finite_changes_nothing(fused: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer: Any = skipping(torch.optim.Adam)([parameter], lr=0.1, fused=fused)

    def step(gradient: float, found_inf: float) -> tuple[Tensor, dict]:
        parameter.grad = torch.full((3,), gradient)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        return parameter.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])

    before = step(0.5, 0.0)
    after = step(float("nan"), 1.0)
    assert torch.equal(after[0], before[0])
    for key, value in before[1][0].items():
        assert torch.equal(after[1][0][key], value)
    assert not torch.equal(step(0.5, 0.0)[0], before[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optimizer.name=nowhere.at_all:X", "nowhere.at_all cannot be imported (No module named"),
        ("--optimizer.name=torch.optim:NAdan", "torch.optim has no torch.optim.Optimizer of this"),
        ("--optimizer.name=own_file:NotAnOptimizer", "own_file has no torch.optim.Optimizer"),
        (
            "--optimizer.options={beta=1}",
            "NAdam has no argument beta; it has lr, betas",
        ),
        ("--optimizer.options={eps=-1.0}", "torch.optim:NAdam refuses its arguments: Invalid eps"),
        ("--optimizer.options={betas=[0.9]}", "torch.optim:NAdam refuses its arguments: tuple"),
        ("--dry-run --optimizer.options={eps=-1.0}", "NAdam refuses its arguments: Invalid eps"),
        ("--optimizer.options={eps=2024-01-01}", "optimizer.options"),
        ("--optimizer.options={lr=0.5}", "lr is not an option; use optimizer.lr and"),
        ("--optimizer.options={weight_decay=0.5}", "weight_decay is not an option; use"),
        (
            "--run=named --optimizer.options={siez=2}",
            "sophia_like:Named has no argument siez; it has",
        ),
        ("--optimizer.beta1=0.9", "optimizer.beta1 is not a key of an imported optimizer, which"),
        ("--optimizer.name=torch.optim.NAdam", "should be one of adamw, lion,"),
    ],
)
def test_mistakes_are_one_line(
    arguments: str, message: str, imported: Path, run_train: Runner, capsys
) -> None:
    run = [] if "--run" in arguments else ["--run=nadam"]
    assert message in refuse(run_train, capsys, imported, *run, *arguments.split())


def test_help_names_imported_optimizers(capsys, run_train: Runner) -> None:
    with pytest.raises(SystemExit):
        run_train("--help")
    printed = capsys.readouterr().out
    assert "package.module:Class" in printed
    assert "--optimizer.options" in printed
