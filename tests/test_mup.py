"""Test model.mup_base_width: learning rates that fit one width fit others (arXiv 2203.03466)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train
from model import GPT, summed_loss
from optimizers.build import make_optimizer
from runtime.experiment import load_experiment
from runtime.hugging_face import to_hugging_face
from sophia import sampled_label_loss
from tests.conftest import OPTIMIZERS

WIDTHS = (32, 64, 128)
HEAD_SIZE = 16
LR = {"adamw": 4e-3, "lion": 1e-3, "sophia-g": 1e-3, "sophia-h": 1e-3}


def load(experiment: Path, run: str, width: int, base_width: int) -> train.Config:
    keys = {"model.n_embd": width, "model.n_head": width // HEAD_SIZE, "optimizer.lr": LR[run]}
    keys["model.mup_base_width"] = base_width
    return load_experiment(experiment, run, {key: str(value) for key, value in keys.items()})


def estimate_hessian(run: str, model: GPT, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    if run == "sophia-g":
        sampled_label_loss(model(x), torch.rand(x.shape)).backward()
        optimizer.update_hessian_from_grad(n_labels=x.numel())  # type: ignore[attr-defined]
        optimizer.zero_grad()
    elif run == "sophia-h":
        named = dict(model.named_parameters())
        params = {name: p.detach() for name, p in named.items()}
        probes = {name: torch.randn(p.shape) for name, p in params.items()}
        estimates = train.hutchinson_micro_batch(model, params, probes, x, x)
        by_parameter = {p: estimates[name] for name, p in named.items()}
        optimizer.update_hessian(by_parameter)  # type: ignore[attr-defined]


def changes(config: train.Config, run: str, seed: int) -> dict[str, float]:
    """Return by how much six updates change the activations on a batch: root mean squares."""
    torch.manual_seed(seed)
    model = GPT(config.model)
    optimizer = make_optimizer(config, model)
    x = torch.randint(config.model.vocab_size, (8, config.model.block_size))

    before = activations(model, x)
    for _ in range(6):
        estimate_hessian(run, model, optimizer, x)
        (summed_loss(model(x), x) / x.numel()).backward()
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * group.get("lr_scale", 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = activations(model, x)
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in before}


@torch.no_grad()
def activations(model: GPT, x: Tensor) -> dict[str, Tensor]:
    """Return the activations behind each block, and the logits."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
            found[name] = output

        return hook

    hooks = [
        block.register_forward_hook(watch(f"block {index}"))
        for index, block in enumerate(model.blocks)
    ]
    found["logits"] = model(x)
    for hook in hooks:
        hook.remove()
    return found


def growth(experiment: Path, run: str, with_mup: bool) -> dict[str, float]:
    """Return the exponents of the changes as powers of the width, fitted over all WIDTHS."""
    sizes = []
    for width in WIDTHS:
        config = load(experiment, run, width, WIDTHS[0] if with_mup else 0)
        seeds = [changes(config, run, seed) for seed in range(2)]
        sizes.append({name: math.log(np.mean([s[name] for s in seeds])) for name in seeds[0]})
    logs = np.log(WIDTHS)
    return {name: float(np.polyfit(logs, [s[name] for s in sizes], 1)[0]) for name in sizes[0]}


@pytest.mark.parametrize("run", OPTIMIZERS)
def test_coordinate_check(run: str, experiment: Path) -> None:
    """With muP, updates change the activations by as much at every width; without, by more."""
    exponents = growth(experiment, run, with_mup=True)
    assert max(exponents.values()) < 0.1, exponents
    plain = growth(experiment, run, with_mup=False)
    assert min(plain.values()) > 0.5, plain


@pytest.mark.parametrize("run", OPTIMIZERS)
def test_nothing_changes_at_the_base_width(run: str, experiment: Path) -> None:
    results = [changes(load(experiment, run, 32, base), run, 0) for base in (0, 32)]
    assert results[0] == results[1]


def test_export_gives_the_same_logits(experiment: Path) -> None:
    """The factor of the logits goes into the last norm."""
    wide = GPT(load(experiment, "adamw", 64, 32).model)
    tensors = to_hugging_face(wide)
    tokens = torch.arange(8)[None]
    found: list[Tensor] = []
    wide.ln_f.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    expected = wide(tokens)

    weight, bias = tensors["transformer.ln_f.weight"], tensors["transformer.ln_f.bias"]
    hidden = F.layer_norm(found[0], (64,), weight, bias)
    torch.testing.assert_close(hidden @ tensors["transformer.wte.weight"].T, expected)
