from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from optimizers.soap import SOAP
from tests.test_muon import follow, make_parameters


def test_equals_pytorch_optimizer() -> None:
    """Over two updates of the eigenbases; the packages decay weights in another order."""
    library = pytest.importorskip("pytorch_optimizer")
    ours, theirs = make_parameters(), make_parameters()
    follow(SOAP(ours, betas=(0.9, 0.95), weight_decay=0.0), ours)
    reference = library.SOAP(theirs, betas=(0.9, 0.95), shampoo_beta=0.95, weight_decay=0.0)
    follow(reference, theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_quadratic_in_turned_axes_is_minimized_faster_than_by_adam() -> None:
    """SOAP is Adam in the eigenbasis, so it is as fast as Adam would be in the best axes."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(8, 8))[0] for _ in range(2))
    curvature = torch.logspace(-1, 1, 8)
    start = torch.randn(8, 8)

    def minimize(make: Any) -> float:
        """Return the loss after 100 steps with noisy gradients."""
        generator = torch.Generator().manual_seed(1)
        w = torch.nn.Parameter(left @ start @ right.T)
        optimizer = make([w], lr=0.03, betas=(0.9, 0.95), weight_decay=0.0)
        for _ in range(100):
            turned = left.T @ w @ right + torch.randn(8, 8, generator=generator)
            loss = (curvature[:, None] * curvature * turned.square()).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        turned = left.T @ w.detach() @ right
        return (curvature[:, None] * curvature * turned.square()).sum().item()

    assert minimize(SOAP) < 0.8 * minimize(torch.optim.AdamW)


def test_weight_decay_is_decoupled() -> None:
    parameters, before = make_parameters(), make_parameters()
    optimizer = SOAP(parameters, lr=0.1, weight_decay=0.5)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # initializes
    optimizer.step()
    for p, start in zip(parameters, before, strict=True):
        torch.testing.assert_close(p, start * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("steps", [1, 9, 20])
def test_a_step_with_found_inf_changes_no_tensor(steps: int) -> None:
    """Also when it is the first, or updates the eigenbases."""
    parameters = make_parameters()
    optimizer = SOAP(parameters)
    follow(optimizer, parameters, steps)

    before = [p.detach().clone() for p in parameters]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for p in parameters:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    for _ in range(2):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    for index, tensors in optimizer.state_dict()["state"].items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, state[index][key]), key


def test_a_first_gradient_that_is_not_finite_does_no_harm() -> None:
    parameters = make_parameters()
    optimizer = SOAP(parameters)
    for p in parameters:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    assert all(p.isfinite().all() for p in follow(optimizer, parameters))


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -1.0}, {"frequency": 0}],
)
def test_constructor_refuses_invalid_arguments(wrong: dict) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        SOAP(make_parameters(), **wrong)
    with pytest.raises(ValueError, match="updates matrices"):
        SOAP([torch.nn.Parameter(torch.zeros(3))])
