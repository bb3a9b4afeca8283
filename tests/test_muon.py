from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from optimizers import muon
from optimizers.muon import Muon, orthogonalize

SHAPES = ((12, 4), (4, 12), (12, 4), (6, 6))


def make_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def follow(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: int = 25
) -> list[Tensor]:
    """Return the parameters after some steps with a decreasing lr."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("at_once", [1, 2**26])
def test_equals_torch(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "AT_ONCE", at_once)
    ours, theirs = make_parameters(), make_parameters()
    own = Muon(ours, momentum=0.9, weight_decay=0.1)
    reference = torch.optim.Muon(
        theirs, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    before = make_parameters()
    for a, b, start in zip(follow(own, ours), follow(reference, theirs), before, strict=True):
        # Updates are in bfloat16, and products of several matrices at once round differently.
        torch.testing.assert_close(
            a, b, rtol=0, atol=2e-2 * float((b - start).detach().abs().max())
        )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            own.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"]
        )


@pytest.mark.parametrize("shape", [(3, 40, 10), (3, 10, 40), (1, 20, 20)])
def test_orthogonalized_matrices_have_singular_values_near_1(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    result = orthogonalize(matrices).float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3
    assert values.max() < 1.3

    # The singular vectors stay: U V' of the matrix itself is close by.
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    assert (result * (u @ vh)).sum(dim=(1, 2)) == pytest.approx(values.sum(dim=1), rel=0.1)


def test_a_step_with_found_inf_changes_nothing() -> None:
    parameters = make_parameters()
    optimizer = Muon(parameters)
    follow(optimizer, parameters)

    before = [p.detach().clone() for p in parameters]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for p in parameters:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    for index, tensors in optimizer.state_dict()["state"].items():
        assert torch.equal(tensors["momentum_buffer"], state[index]["momentum_buffer"])


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -1.0}])
def test_constructor_refuses_invalid_arguments(wrong: dict) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        Muon(make_parameters(), **wrong)
    with pytest.raises(ValueError, match="updates matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
