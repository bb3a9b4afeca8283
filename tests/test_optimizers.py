"""Test Sophia's ablations, AdaHessian, Muon and SOAP, and the masked objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import train
from optimizers import muon, soap
from optimizers.adahessian import AdaHessian
from optimizers.build import make_optimizer
from optimizers.sophia_ablation import SophiaAblation
from optimizers.state import skip_if
from runtime import cost
from runtime.experiment import load_experiment
from sophia import SophiaG
from tests.conftest import newest_state, read_lines
from tests.test_speed import NoSyncInDispatch, NoSyncInPython
from tests.test_train import Runner, torchrun

# The ablations: estimator, average, update.
ABLATIONS = {
    "empirical-fisher": ("empirical-fisher", "mean", "clip"),
    "adahessian-clip": ("hutchinson", "root-mean-square", "clip"),
    "gnb-unclipped": ("gnb", "mean", "divide"),
    "gnb-as-sophia": ("gnb", "mean", "clip"),
    "clip-only": ("none", "mean", "clip"),
    "normalize-only": ("none", "mean", "normalize"),
}
RUNS = (*ABLATIONS, "adahessian", "muon", "soap")
SHARED_KEYS = """\
lr = 1e-3
beta1 = 0.96
beta2 = 0.99
weight_decay = 0.2
"""
HESSIAN_KEYS = """\
hessian_interval = 3
hessian_batch_size = 4
"""


def optimizer_table(run: str) -> str:
    """Return the TOML of a run's optimizer."""
    if run in ABLATIONS:
        estimator, average, update = ABLATIONS[run]
        # Without clipping, only eps bounds the step where h is 0.
        eps = 1e-1 if run == "gnb-unclipped" else 1e-12
        keys = f'name = "sophia-ablation"\neps = {eps}\nrho = 0.05\n'
        keys += f'estimator = "{estimator}"\naverage = "{average}"\nupdate = "{update}"\n'
    else:
        estimator = "hutchinson" if run == "adahessian" else "none"
        keys = f'name = "{run}"\neps = 1e-4\n'

    if estimator != "none":
        keys += HESSIAN_KEYS
    return f"[runs.{run}.optimizer]\n{SHARED_KEYS}{keys}"


def add_runs(experiment: Path) -> Path:
    """Add the RUNS to the tiny experiment."""
    tables = "".join(optimizer_table(run) for run in RUNS)
    experiment.write_text(experiment.read_text() + tables)
    return experiment


@pytest.mark.parametrize("run", RUNS)
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(
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


def test_ablation_with_sophias_own_parts_is_sophia(
    experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    add_runs(experiment)
    for run in ("sophia-g", "gnb-as-sophia"):
        run_train(experiment, f"--run={run}")

    ablation = read_lines(tmp_path / "out/tiny/gnb-as-sophia", "loss")
    sophia = read_lines(tmp_path / "out/tiny/sophia-g", "loss")
    assert ablation == sophia


def test_muon_updates_the_linear_weights_and_adamw_the_rest(experiment: Path) -> None:
    config = load_experiment(add_runs(experiment), "muon")
    model = train.GPT(config.model)
    main, adamw = make_optimizer(config, model).parts
    assert "lr_scale" not in adamw.param_groups[0]
    names = {p: name for name, p in model.named_parameters()}

    for group in main.param_groups:
        assert all("blocks" in names[p] and p.ndim == 2 for p in group["params"])

    matrices = []
    for group in adamw.param_groups:
        matrices += [names[p] for p in group["params"] if p.ndim == 2]
    assert sorted(matrices) == ["wpe.weight", "wte.weight"]


def test_adamw_part_has_its_own_learning_rate_and_decay(
    experiment: Path, run_train: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float, float]] = []

    def step(run: train.Run, step: int) -> dict[str, Any]:
        record = original(run, step)
        matrices, others = run.optimizer.param_groups
        seen.append((record["lr"], matrices["lr"], others["lr"]))
        assert matrices["weight_decay"] == 0.2
        assert others["weight_decay"] == 0.05
        return record

    original = train.train_step
    monkeypatch.setattr(train, "train_step", step)
    keys = ("--optimizer.adamw_lr=3e-3", "--optimizer.adamw_weight_decay=0.05")
    run_train(add_runs(experiment), "--run=muon", *keys)
    for lr, matrices, others in seen:
        assert lr == matrices
        assert others == pytest.approx(3 * lr)


def test_non_finite_step_changes_nothing_with_muon_and_soap(experiment: Path) -> None:
    add_runs(experiment)
    for run in ("muon", "soap"):
        config = load_experiment(experiment, run)
        model = train.GPT(config.model)
        optimizer = make_optimizer(config, model)
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.full_like(p, torch.nan)
        skip_if(optimizer, torch.ones(()))
        optimizer.step()

        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("run", ["muon", "soap"])
def test_muon_and_soap_need_no_host_sync(
    run: str, experiment: Path, run_train: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = train.train_step

    def watched(this: train.Run, step: int) -> dict[str, Any]:
        with NoSyncInPython(), NoSyncInDispatch():
            return train_step(this, step)

    monkeypatch.setattr(train, "train_step", watched)
    run_train(add_runs(experiment), f"--run={run}")


@pytest.mark.parametrize("run", [pytest.param("muon", marks=pytest.mark.slow), "soap"])
def test_sharded_muon_and_soap_have_the_same_losses(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    """Each rank updates some of the matrices; a checkpoint has the state of all."""
    add_runs(experiment)
    keys = [f"--run={run}", "--train.micro_batch_size=4"]
    for sharded in ("false", "true"):
        out = f"--train.out_dir={tmp_path / sharded}"
        done = torchrun(2, experiment, *keys, out, f"--train.shard_optimizer={sharded}")
        assert done.returncode == 0, done.stderr
    whole, parts = tmp_path / "false/tiny" / run, tmp_path / "true/tiny" / run
    assert read_lines(parts, "loss") == read_lines(whole, "loss")

    def assert_same_state() -> None:
        ours, theirs = newest_state(parts)["optimizer"], newest_state(whole)["optimizer"]
        assert ours.keys() == theirs.keys()
        for name, state in theirs.items():
            assert state.keys() == ours[name].keys()
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(ours[name][key])), key

    assert_same_state()

    # It continues on two ranks, and on one that has all of the state.
    (parts / "step_00000012.pt").unlink()
    out = f"--train.out_dir={tmp_path / 'true'}"
    done = torchrun(2, experiment, *keys, out, "--train.shard_optimizer=true", "--resume")
    assert done.returncode == 0, done.stderr
    assert read_lines(parts, "loss") == read_lines(whole, "loss")
    assert_same_state()

    (parts / "step_00000012.pt").unlink()
    run_train(experiment, *keys, out, "--resume")
    resumed = dict(read_lines(parts, "loss"))
    assert resumed == pytest.approx(dict(read_lines(whole, "loss")), rel=1e-4)


@pytest.mark.parametrize("run", ["muon", "soap"])
def test_flops_of_muon_and_soap_are_those_of_their_products(run: str, experiment: Path) -> None:
    """Count them in a step on large matrices, where rounding to whole batches does not matter."""
    keys = {"model.n_embd": "64", "model.n_layer": "1"}
    config = load_experiment(add_runs(experiment), run, keys)
    model = train.GPT(config.model)
    optimizer = make_optimizer(config, model).parts[0]
    assert cost.MUON_ITERATIONS == muon.ITERATIONS
    assert cost.SOAP_FREQUENCY == soap.FREQUENCY
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()  # SOAP's first step is another one

    with FlopCounterMode(display=False) as counter:
        for _ in range(10):
            optimizer.step()
    factorizations = 0.0  # not counted by torch
    if run == "soap":
        sides = [side for p in optimizer.param_groups[0]["params"] for side in p.shape]
        factorizations = sum(8 / 3 * side**3 for side in sides)
    expected = 10 * cost.optimizer_flops(config)
    assert counter.get_total_flops() + factorizations == pytest.approx(expected)


def make_parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4))


@pytest.mark.parametrize("update", ["divide", "normalize"])
@pytest.mark.parametrize("average", ["mean", "root-mean-square"])
def test_ablations_equal_their_formulas(update: str, average: str) -> None:
    p = make_parameter()
    options = {"lr": 0.1, "betas": (0.9, 0.8), "rho": 0.5, "eps": 1e-3, "weight_decay": 0.1}
    optimizer = SophiaAblation([p], average=average, update=update, **options)
    theta, m, h = p.detach().numpy().copy(), np.zeros((3, 4)), np.zeros((3, 4))
    rng = np.random.default_rng(0)

    for _ in range(5):
        g, estimate = rng.normal(size=(2, 3, 4))
        optimizer.update_hessian({p: torch.from_numpy(estimate)})
        p.grad = torch.from_numpy(g)
        optimizer.step()

        if average == "mean":
            h = 0.8 * h + 0.2 * estimate
        else:
            h = np.sqrt(0.8 * h**2 + 0.2 * estimate**2)
        m = 0.9 * m + 0.1 * g
        if update == "normalize":
            step = m / np.sqrt((m**2).mean())
        else:
            step = m / np.maximum(0.5 * h, 1e-3)
        theta = theta * (1 - 0.1 * 0.1) - 0.1 * step
        np.testing.assert_allclose(p.detach().numpy(), theta, rtol=1e-10)


@pytest.mark.parametrize(("power", "interval"), [(1.0, 1), (0.5, 2)])
def test_adahessian_equals_its_formula(power: float, interval: int) -> None:
    p = make_parameter()
    optimizer = AdaHessian(
        [p], lr=0.1, betas=(0.9, 0.8), eps=1e-3, weight_decay=0.1, hessian_power=power
    )
    theta, m, v = p.detach().numpy().copy(), np.zeros((3, 4)), np.zeros((3, 4))
    n_estimates = 0
    rng = np.random.default_rng(0)

    for t in range(1, 7):
        g, estimate = rng.normal(size=(2, 3, 4))
        if (t - 1) % interval == 0:
            optimizer.update_hessian({p: torch.from_numpy(estimate)})
            v = 0.8 * v + 0.2 * estimate**2
            n_estimates += 1
        p.grad = torch.from_numpy(g)
        optimizer.step()

        m = 0.9 * m + 0.1 * g
        root = np.sqrt(v / (1 - 0.8**n_estimates)) ** power
        theta = theta * (1 - 0.1 * 0.1) - 0.1 * (m / (1 - 0.9**t)) / (root + 1e-3)
        # The tolerance is larger because AdaHessian's counters are float32.
        np.testing.assert_allclose(p.detach().numpy(), theta, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: AdaHessian(params),
        lambda params: SophiaAblation(params, update="divide"),
        lambda params: SophiaAblation(params, average="root-mean-square", update="normalize"),
    ],
)
def test_a_step_or_estimate_with_found_inf_changes_nothing(make) -> None:
    p = make_parameter()
    optimizer = make([p])
    optimizer.update_hessian({p: torch.ones_like(p)})
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = {key: value.clone() for key, value in optimizer.state[p].items()}
    before = p.detach().clone()

    found_inf = torch.ones(())
    optimizer.update_hessian({p: torch.full_like(p, torch.nan)}, found_inf=found_inf)
    optimizer.found_inf = found_inf
    p.grad = torch.full_like(p, torch.inf)
    optimizer.step()

    assert torch.equal(p, before)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state[p].items())


def test_step_without_an_estimate_and_invalid_arguments_are_refused() -> None:
    p = make_parameter()
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="update_hessian before the first step"):
        AdaHessian([p]).step()

    wrong: dict[str, Any] = {"lr": -1.0, "eps": 0.0, "weight_decay": -1.0, "hessian_power": 2.0}
    wrong["betas"] = (1.0, 0.9)
    for key, value in wrong.items():
        with pytest.raises(ValueError, match="Invalid"):
            AdaHessian([p], **{key: value})

    for key, value in {"average": "median", "update": "jump"}.items():
        with pytest.raises(ValueError, match=f"Invalid {key}"):
            SophiaAblation([p], **{key: value})


def test_empirical_fisher_is_n_times_the_squared_gradient(
    experiment: Path, run_train: Runner, monkeypatch
) -> None:
    """Compare norms: on the whole batch, the estimate uses the step's gradient before clipping."""
    estimated, stepped = [], []
    update = SophiaG.update_hessian_from_grad
    clip = torch.nn.utils.clip_grad_norm_

    def record_estimate(self: SophiaG, n_labels: int, found_inf: Tensor | None = None) -> None:
        grads: list[Tensor] = []
        for group in self.param_groups:
            grads += [p.grad for p in group["params"]]
        estimated.append((n_labels, torch.nn.utils.get_total_norm(grads).item()))
        update(self, n_labels, found_inf)

    def record_clip(*arguments: Any) -> Tensor:
        norm = clip(*arguments)
        stepped.append(norm.item())
        return norm

    monkeypatch.setattr(SophiaAblation, "update_hessian_from_grad", record_estimate)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record_clip)
    overrides = ["--optimizer.hessian_batch_size=8", "--train.max_steps=4"]
    run_train(add_runs(experiment), "--run=empirical-fisher", *overrides)

    assert [n for n, _ in estimated] == [8 * 16, 8 * 16]
    assert [norm for _, norm in estimated] == pytest.approx([stepped[0], stepped[3]], rel=1e-5)


@pytest.mark.parametrize("run", ["adamw", "sophia-g", "sophia-h"])
def test_masked_language_modelling_does_not_depend_on_the_micro_batch_size(
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


def test_earlier_logits_depend_on_later_tokens_only_without_the_causal_mask(
    experiment: Path,
) -> None:
    for causal in (True, False):
        config = load_experiment(experiment, "adamw", {"model.causal": str(causal).lower()})
        torch.manual_seed(0)
        model = train.GPT(config.model)

        x = torch.arange(16).view(1, 16)
        changed = x.clone()
        changed[0, -1] = 40
        difference = (model(x) - model(changed)).abs().amax(-1)[0, :-1]
        assert bool((difference > 0).all()) is not causal
