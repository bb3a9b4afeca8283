"""Test that the examples learn, and that code for the released SophiaG can be migrated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from sophia import SophiaG, gnb_estimate, sampled_label_loss
from tests.conftest import ROOT

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]


@pytest.mark.parametrize(
    ("launcher", "example", "arguments", "pattern", "limit"),
    [
        ([], "plain.py", [], r"step 200  loss (\S+)", 3.0),  # ln 256 is 5.5
        ([], "vision.py", [], r"Sophia-H  errors (\S+)%", 15.0),  # chance: 90
        ([], "huggingface_trainer.py", ["--steps=30"], r"^loss (\S+)", 5.2),
        pytest.param(
            *(TORCHRUN, "huggingface_trainer.py", ["--steps=30", "--bf16"], r"^loss (\S+)", 5.2),
            marks=pytest.mark.slow,
        ),
        ([], "lightning_module.py", [], r"loss (\S+)", 0.5),  # ln 4 is 1.39
        (TORCHRUN, "fsdp2.py", [], r"step 60  loss (\S+)", 4.0),
    ],
)
def test_an_example_learns(
    launcher: list[str], example: str, arguments: list[str], pattern: str, limit: float, tmp_path
) -> None:
    command = [sys.executable, *launcher, str(ROOT / "examples" / example), *arguments]
    if example.startswith("huggingface"):
        command.append(f"--out={tmp_path}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    found = re.search(pattern, done.stdout, re.MULTILINE)
    assert found, done.stdout
    assert float(found[1]) < limit


def test_fsdp2_equals_one_process() -> None:
    command = [sys.executable, *TORCHRUN, "tests/fsdp2_equals_plain.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def test_trainer_callback_estimates_as_in_the_formula() -> None:
    """Pad two sequences of different lengths: only labels that count in the loss are sampled."""
    from examples.huggingface_trainer import SophiaCallback

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval().double()
    tokens = torch.randint(11, (2, 8))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    loader: Any = [{"input_ids": tokens, "attention_mask": mask, "labels": labels}]
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0))

    settings = {"device": "cpu", "fp16": False, "world_size": 1, "seed": 3, "process_index": 0}
    arguments: Any = SimpleNamespace(**settings)
    SophiaCallback(optimizer, loader).estimate(model, arguments)
    assert all(p.grad is None for p in model.parameters())

    # 7 + 4 labels
    uniforms = torch.rand(11, generator=torch.Generator().manual_seed(3))
    logits = model(input_ids=tokens, attention_mask=mask).logits
    predicting = torch.cat([logits[0, :7], logits[1, :4]])
    sampled_label_loss(predicting, uniforms).backward()
    for parameter, expected in gnb_estimate(model.parameters(), n_labels=11).items():
        torch.testing.assert_close(optimizer.state[parameter]["hessian"], expected)


def released_step(
    theta: Tensor, m: Tensor, h: Tensor, lr: float, beta1: float, rho_bs: float, decay: float
) -> None:
    """Update as the released code does; written from its formula.

    Decay the weights, then subtract lr · sign(m) · min(|m| / (rho · bs · h + 1e-15), 1).
    """
    assert theta.grad is not None
    theta.mul_(1 - lr * decay)
    m.mul_(beta1).add_(theta.grad, alpha=1 - beta1)
    theta.sub_(lr * m.sign() * (m.abs() / (rho_bs * h + 1e-15)).clamp(max=1))


def test_migrating_from_the_released_sophia_gives_the_same_parameters() -> None:
    """Follow docs/migrating.md for 200 steps: n_labels=1, and rho · bs in place of bs."""
    torch.manual_seed(0)
    lr, beta1, beta2, rho, bs, wd = 1e-3, 0.965, 0.99, 0.04, 5120, 0.1
    theirs = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    ours = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    ours.load_state_dict(theirs.state_dict())

    states = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in theirs.parameters()}
    optimizer = SophiaG(
        ours.parameters(), lr=lr, betas=(beta1, beta2), rho=rho * bs, eps=1e-15, weight_decay=wd
    )

    for step in range(200):
        x = torch.randn(32, 8)
        y = torch.randint(4, (32,))

        for model in (theirs, ours):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, (m, h) in states.items():
                released_step(p, m, h, lr, beta1, rho * bs, wd)
        optimizer.step()

        # The released code estimates after the step.
        if step % 10 == 9:
            labels = torch.distributions.Categorical(logits=theirs(x).detach()).sample()
            for model in (theirs, ours):
                model.zero_grad()
                nn.functional.cross_entropy(model(x), labels).backward()
            for p, (_, h) in states.items():
                assert p.grad is not None
                h.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            optimizer.update_hessian_from_grad(n_labels=1)

    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q, p, atol=1e-5, rtol=0)
        # Some elements are not clipped.
        state = optimizer.state[q]
        assert (state["exp_avg"].abs() < state["hessian"] * rho * bs).any()
