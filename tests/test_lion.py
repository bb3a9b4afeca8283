from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from optimizers.lion import Lion
from tests.test_sophia import follow, make_parameters


def test_step_equals_the_formula_in_numpy() -> None:
    lr, beta1, beta2, decay = 0.01, 0.95, 0.98, 0.1
    parameters = make_parameters(dtype=torch.float64)
    optimizer = Lion(parameters, lr, (beta1, beta2), decay)
    rng = np.random.default_rng(0)
    theta = [p.detach().numpy().copy() for p in parameters]
    m = [np.zeros_like(t) for t in theta]

    for _ in range(30):
        gradients = [rng.normal(size=t.shape) for t in theta]

        for i, g in enumerate(gradients):
            update = np.sign(beta1 * m[i] + (1 - beta1) * g)
            theta[i] = theta[i] - lr * (update + decay * theta[i])
            m[i] = beta2 * m[i] + (1 - beta2) * g

        for p, g in zip(parameters, gradients, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()

    for p, t in zip(parameters, theta, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), t, rtol=1e-12)


@pytest.mark.parametrize("path", [{"foreach": True}, {"fused": True}])
def test_fast_paths_equal_the_reference(path: dict) -> None:
    reference = follow(Lion, 100, torch.float32, foreach=False)
    fast = follow(Lion, 100, torch.float32, **path)
    for a, b in zip(reference, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -1.0}])
def test_constructor_refuses_invalid_arguments(wrong: dict) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        Lion(make_parameters(), **wrong)


def test_loaded_state_dict_continues_identically() -> None:
    parameters = make_parameters()
    optimizer = Lion(parameters, lr=0.1)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()

    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    loaded = Lion(copies, lr=0.5)
    # Without a copy, both optimizers would share the tensors of the state.
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    for p, q in zip(parameters, copies, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer.step()
    loaded.step()

    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
