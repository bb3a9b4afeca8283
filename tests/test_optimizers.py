"""Optimizers beside the four: Sophia's variants, AdaHessian, Muon and SOAP; and the masked objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from optimizers.adahessian import AdaHessian
from optimizers.build import make_optimizer
from optimizers.sophia_ablation import SophiaAblation
from runtime.experiment import load_experiment
from sophia import SophiaG
from tests.conftest import read_lines
from tests.test_train import Runner

TABLES = {
    "empirical-fisher": ("sophia-ablation", 'estimator = "empirical-fisher"\naverage = "mean"\nupdate = "clip"'),
    "adahessian-clip": ("sophia-ablation", 'estimator = "hutchinson"\naverage = "root-mean-square"\nupdate = "clip"'),
    "gnb-unclipped": ("sophia-ablation", 'estimator = "gnb"\naverage = "mean"\nupdate = "divide"'),
    "gnb-as-sophia": ("sophia-ablation", 'estimator = "gnb"\naverage = "mean"\nupdate = "clip"'),
    "clip-only": ("sophia-ablation", 'estimator = "none"\naverage = "mean"\nupdate = "clip"'),
    "normalize-only": ("sophia-ablation", 'estimator = "none"\naverage = "mean"\nupdate = "normalize"'),
    "adahessian": ("adahessian", ""),
    "muon": ("muon", ""),
    "soap": ("soap", ""),
}


def add_runs(experiment: Path) -> Path:
    """The tiny experiment with a run of each of the tables."""
    text = experiment.read_text()
    for run, (name, keys) in TABLES.items():
        text += f'[runs.{run}.optimizer]\nname = "{name}"\nlr = 1e-3\nbeta1 = 0.96\nbeta2 = 0.99\nweight_decay = 0.2\n'
        # Without a clip nothing but eps bounds the step where h is 0.
        eps = 1e-4 if name != "sophia-ablation" else 1e-1 if run == "gnb-unclipped" else 1e-12
        text += f"eps = {eps}\n{keys}\n"
        text += "rho = 0.05\n" if name == "sophia-ablation" else ""
        if name in ("sophia-ablation", "adahessian") and '"none"' not in keys:
            text += "hessian_interval = 3\nhessian_batch_size = 4\n"
    experiment.write_text(text)
    return experiment


@pytest.mark.parametrize("run", TABLES)
def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    add_runs(experiment)
    run_train(experiment, f"--run={run}")
    folder = tmp_path / "out/tiny" / run
    whole = read_lines(folder, "loss")
    assert len(whole) == 12
    (folder / "step_00000012.pt").unlink()
    assert list(folder.glob("*.pt"))
    run_train(experiment, f"--run={run}", "--resume")
    assert read_lines(folder, "loss") == whole


def test_the_ablation_with_nothing_exchanged_is_sophia(experiment: Path, run_train: Runner, tmp_path: Path) -> None:
    add_runs(experiment)
    for run in ("sophia-g", "gnb-as-sophia"):
        run_train(experiment, f"--run={run}")
    ablation, sophia = (read_lines(tmp_path / "out/tiny" / run, "loss") for run in ("gnb-as-sophia", "sophia-g"))
    assert ablation == sophia


def test_muon_takes_the_decaying_matrices_and_adamw_the_rest(experiment: Path) -> None:
    config = load_experiment(add_runs(experiment), "muon")
    model = train.GPT(config.model)
    muon, adamw = make_optimizer(config, model).parts
    names = {p: name for name, p in model.named_parameters()}
    assert all("blocks" in names[p] and p.ndim == 2 for group in muon.param_groups for p in group["params"])
    assert sorted(names[p] for group in adamw.param_groups for p in group["params"] if p.ndim == 2) == [
        "wpe.weight",
        "wte.weight",
    ]


def test_a_bad_step_changes_nothing_under_muon_and_soap(experiment: Path) -> None:
    for run in ("muon", "soap"):
        config = load_experiment(add_runs(experiment) if run == "muon" else experiment, run)
        model = train.GPT(config.model)
        optimizer = make_optimizer(config, model)
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.full_like(p, torch.nan)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4))


@pytest.mark.parametrize("update", ["divide", "normalize"])
@pytest.mark.parametrize("average", ["mean", "root-mean-square"])
def test_ablations_equal_their_formulas(update: str, average: str) -> None:
    p = parameter()
    options = {"lr": 0.1, "betas": (0.9, 0.8), "rho": 0.5, "eps": 1e-3, "weight_decay": 0.1}
    optimizer = SophiaAblation([p], average=average, update=update, **options)
    theta, m, h = p.detach().numpy().copy(), np.zeros((3, 4)), np.zeros((3, 4))
    rng = np.random.default_rng(0)
    for _ in range(5):
        g, estimate = rng.normal(size=(2, 3, 4))
        optimizer.update_hessian({p: torch.from_numpy(estimate)})
        p.grad = torch.from_numpy(g)
        optimizer.step()
        h = 0.8 * h + 0.2 * estimate if average == "mean" else np.sqrt(0.8 * h**2 + 0.2 * estimate**2)
        m = 0.9 * m + 0.1 * g
        step = m / np.sqrt((m**2).mean()) if update == "normalize" else m / np.maximum(0.5 * h, 1e-3)
        theta = theta * (1 - 0.1 * 0.1) - 0.1 * step
        np.testing.assert_allclose(p.detach().numpy(), theta, rtol=1e-10)


@pytest.mark.parametrize(("power", "interval"), [(1.0, 1), (0.5, 2)])
def test_adahessian_equals_its_formula(power: float, interval: int) -> None:
    p = parameter()
    optimizer = AdaHessian([p], lr=0.1, betas=(0.9, 0.8), eps=1e-3, weight_decay=0.1, hessian_power=power)
    theta, m, v, estimates = p.detach().numpy().copy(), np.zeros((3, 4)), np.zeros((3, 4)), 0
    rng = np.random.default_rng(0)
    for t in range(1, 7):
        g, estimate = rng.normal(size=(2, 3, 4))
        if (t - 1) % interval == 0:
            optimizer.update_hessian({p: torch.from_numpy(estimate)})
            v, estimates = 0.8 * v + 0.2 * estimate**2, estimates + 1
        p.grad = torch.from_numpy(g)
        optimizer.step()
        m = 0.9 * m + 0.1 * g
        root = np.sqrt(v / (1 - 0.8**estimates)) ** power
        theta = theta * (1 - 0.1 * 0.1) - 0.1 * (m / (1 - 0.9**t)) / (root + 1e-3)
        np.testing.assert_allclose(p.detach().numpy(), theta, rtol=0, atol=1e-6)  # its counters are float32


@pytest.mark.parametrize(
    "make",
    [
        lambda params: AdaHessian(params),
        lambda params: SophiaAblation(params, update="divide"),
        lambda params: SophiaAblation(params, average="root-mean-square", update="normalize"),
    ],
)
def test_a_step_or_estimate_with_found_inf_changes_nothing(make) -> None:
    p = parameter()
    optimizer = make([p])
    optimizer.update_hessian({p: torch.ones_like(p)})
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = {key: value.clone() for key, value in optimizer.state[p].items()}
    before = p.detach().clone()
    bad = torch.ones(())
    optimizer.update_hessian({p: torch.full_like(p, torch.nan)}, found_inf=bad)
    optimizer.found_inf = bad
    p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    assert torch.equal(p, before)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state[p].items())


def test_adahessian_refuses_a_step_without_an_estimate_and_bad_settings() -> None:
    p = parameter()
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="update_hessian before the first step"):
        AdaHessian([p]).step()
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": 0.0}, {"weight_decay": -1.0}, {"hessian_power": 2.0}):
        with pytest.raises(ValueError, match="Invalid"):
            AdaHessian([p], **wrong)
    for key, value in {"average": "median", "update": "jump"}.items():
        with pytest.raises(ValueError, match=f"Invalid {key}"):
            SophiaAblation([p], **{key: value})


def test_the_empirical_fisher_is_n_times_the_squared_gradient(experiment: Path, run_train: Runner, monkeypatch) -> None:
    """On the whole batch its gradient is the step's own, before clipping."""
    estimated, stepped = [], []
    update = SophiaG.update_hessian_from_grad

    def spy(self: SophiaG, n_labels: int, found_inf: torch.Tensor | None = None) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        estimated.append((n_labels, torch.nn.utils.get_total_norm(grads).item()))
        update(self, n_labels, found_inf)

    monkeypatch.setattr(SophiaAblation, "update_hessian_from_grad", spy)
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_tell(*arguments: Any) -> torch.Tensor:
        norm = clip(*arguments)
        stepped.append(norm.item())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_tell)
    arguments = ["--run=empirical-fisher", "--optimizer.hessian_batch_size=8", "--train.max_steps=4"]
    run_train(add_runs(experiment), *arguments)
    assert [n for n, _ in estimated] == [8 * 16, 8 * 16]
    assert [norm for _, norm in estimated] == pytest.approx([stepped[0], stepped[3]], rel=1e-5)


@pytest.mark.parametrize("run", ["adamw", "sophia-g", "sophia-h"])
def test_masked_language_modelling_is_the_same_for_any_micro_batch(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path, float64: None
) -> None:
    losses = []
    for micro in (8, 2):
        out = tmp_path / f"out{micro}"
        arguments = ["--model.causal=false", "--model.vocab_size=62", f"--train.out_dir={out}"]
        run_train(experiment, f"--run={run}", f"--train.micro_batch_size={micro}", *arguments)
        losses.append([loss for _, loss in read_lines(out / "tiny" / run, "loss")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][0] == pytest.approx(np.log(62), abs=0.1)  # a mean over the masked tokens


def test_a_model_without_the_causal_mask_sees_both_sides(experiment: Path) -> None:
    for causal in (True, False):
        config = load_experiment(experiment, "adamw", {"model.causal": str(causal).lower()})
        torch.manual_seed(0)
        model = train.GPT(config.model)
        x = torch.arange(16).view(1, 16)
        changed = x.clone()
        changed[0, -1] = 40
        moved = (model(x) - model(changed)).abs().amax(-1)[0, :-1]
        assert bool((moved > 0).all()) is not causal
