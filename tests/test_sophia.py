from __future__ import annotations

import copy
import functools
import math
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import sophia
from benchmarks.peak_memory import PeakMemory
from model import GPT, summed_loss
from optimizers.lion import Lion
from sophia import (
    SophiaG,
    SophiaH,
    convert_rho,
    gnb_estimate,
    hutchinson_estimate,
    sample_labels,
    sampled_label_loss,
)
from train import hutchinson_micro_batch

SHAPES = ((30, 5), (17,), (8, 4, 2))


def make_parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    return [torch.nn.Parameter(value) for value in values]


def follow(
    make: Callable[..., torch.optim.Optimizer], steps: int, dtype: torch.dtype, **options: object
) -> list[Tensor]:
    """Return the parameters after `steps` steps with a decreasing lr.

    The Hessian estimates range from 1e-14 to 10, with both signs and exact zeros.
    """
    parameters = make_parameters(dtype=dtype)
    optimizer = make(parameters, lr=1e-2, **options)
    generator = torch.Generator().manual_seed(1)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype) * 1e-2

        if isinstance(optimizer, sophia.Sophia) and step % 10 == 0:
            estimates = {}
            for p in parameters:
                size = 10.0 ** torch.randint(-14, 2, p.shape, generator=generator).to(dtype)
                sign = torch.randint(-1, 2, p.shape, generator=generator).to(dtype)
                estimates[p] = sign * size
            optimizer.update_hessian(estimates)

        optimizer.step()

    return [p.detach() for p in parameters]


def test_step_equals_the_formula_in_numpy() -> None:
    lr, beta1, beta2, rho, eps, decay = 0.01, 0.9, 0.8, 0.05, 1e-6, 0.1
    parameters = make_parameters(dtype=torch.float64)
    optimizer = SophiaG(parameters, lr, (beta1, beta2), rho, eps, decay)
    rng = np.random.default_rng(0)
    theta = [p.detach().numpy().copy() for p in parameters]
    m = [np.zeros_like(t) for t in theta]
    h = [np.zeros_like(t) for t in theta]

    for step in range(30):
        gradients = [rng.normal(size=t.shape) for t in theta]

        if step % 3 == 0:
            estimates = {}
            for i, p in enumerate(parameters):
                shape = theta[i].shape
                estimate = rng.normal(size=shape) * 10.0 ** rng.integers(-8, 3, shape)
                h[i] = beta2 * h[i] + (1 - beta2) * estimate
                estimates[p] = torch.tensor(estimate)
            optimizer.update_hessian(estimates)

        for i, g in enumerate(gradients):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            theta[i] = theta[i] - lr * decay * theta[i]
            theta[i] = theta[i] - lr * np.clip(m[i] / np.maximum(rho * h[i], eps), -1, 1)

        for p, g in zip(parameters, gradients, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()

    for p, t in zip(parameters, theta, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), t, rtol=1e-12)


@pytest.mark.parametrize("path", [{"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("make", [SophiaG, SophiaH])
def test_fast_paths_equal_the_reference(make: type, path: dict) -> None:
    reference = follow(make, 100, torch.float32, foreach=False)
    fast = follow(make, 100, torch.float32, **path)

    for a, b in zip(reference, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.equal(reference[0], make_parameters()[0])


@pytest.mark.parametrize("make", [SophiaG, Lion])
def test_multi_tensor_path_in_pieces_equals_the_reference(
    make: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Update the first parameter, with 150 entries, and then the two others together."""
    module = sys.modules[make.__module__]
    monkeypatch.setattr(module, "_pieces", functools.partial(module._pieces, entries=100))
    reference = follow(make, 100, torch.float32, foreach=False)
    in_pieces = follow(make, 100, torch.float32, foreach=True)
    for a, b in zip(reference, in_pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("make", [SophiaG, Lion])
def test_mixed_types_with_found_inf_use_the_same_lr(make: type, path: dict) -> None:
    """A bfloat16 parameter comes first: the lr of the others must not be rounded to its type."""

    def step(*types: torch.dtype) -> torch.Tensor:
        parameters = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in types]
        optimizer = make(parameters, lr=0.0123, weight_decay=0.1, **path)
        optimizer.found_inf = torch.zeros(())
        for p in parameters:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        return parameters[-1].detach()

    alone = step(torch.float32)
    assert torch.equal(step(torch.bfloat16, torch.float32), alone)
    assert alone[0] == pytest.approx((1 - 0.0123 * 0.1) - 0.0123, rel=1e-6)


@pytest.mark.parametrize("make", [SophiaG, Lion])
def test_temporaries_of_the_multi_tensor_path_are_bounded(make: type) -> None:
    """Count them for 2 GB of parameters, on tensors without storage."""
    with FakeTensorMode():
        parameters = [torch.nn.Parameter(torch.empty(2**25)) for _ in range(16)]
        for p in parameters:
            p.grad = torch.empty_like(p)
        optimizer = make(parameters, foreach=True)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()  # the first step allocates the state
        with PeakMemory() as memory:
            optimizer.step()
    assert 0 < memory.peak < 1e9


def test_fused_path_is_not_recompiled_for_a_new_lr(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    compile_with_counter = functools.partial(
        torch.compile, backend=counter, fullgraph=True, dynamic=False
    )
    monkeypatch.setattr(sophia, "_compiled", functools.cache(compile_with_counter))
    follow(SophiaG, 20, torch.float32, fused=True)
    assert counter.frame_count == 2  # the step, and the average of the estimates


def test_sign_momentum_before_the_first_estimate() -> None:
    (parameter,) = parameters = [torch.nn.Parameter(torch.randn(50))]
    optimizer = SophiaG(parameters, lr=0.1, weight_decay=0.0)
    m = torch.zeros(50)
    for _ in range(5):
        parameter.grad = torch.randn(50)
        m = 0.96 * m + 0.04 * parameter.grad
        before = parameter.detach().clone()
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), before - 0.1 * m.sign())


def test_no_entry_moves_further_than_lr() -> None:
    for make in (SophiaG, SophiaH):
        parameters = make_parameters()
        optimizer = make(parameters, lr=0.1, weight_decay=0.0)

        for _ in range(20):
            before = [p.detach().clone() for p in parameters]
            for p in parameters:
                p.grad = torch.randn_like(p) * 100
            optimizer.update_hessian({p: torch.randn_like(p) for p in parameters})
            optimizer.step()

            for p, b in zip(parameters, before, strict=True):
                assert ((p - b).abs() <= 0.1 * (1 + 1e-5)).all()


def test_step_uses_at_least_eps_but_the_average_keeps_negative_estimates() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = SophiaH([parameter], lr=1.0, betas=(0.0, 0.0), rho=1.0, eps=0.5, weight_decay=0.0)
    optimizer.update_hessian({parameter: torch.tensor([-4.0, 1e-9, 4.0])})
    parameter.grad = torch.tensor([0.25, 0.25, 1.0])
    optimizer.step()

    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.5, -0.5, -0.25]))
    assert (optimizer.state[parameter]["hessian"] == torch.tensor([-4.0, 1e-9, 4.0])).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"rho": 0.0},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"fused": True, "foreach": False},
    ],
)
def test_constructor_refuses_invalid_arguments(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"Invalid|fused"):
        SophiaG(make_parameters(), **wrong)


def test_loaded_state_dict_continues_identically() -> None:
    def advance(parameters: list, optimizer: SophiaG, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.update_hessian({p: torch.rand(p.shape, generator=generator) for p in parameters})
        optimizer.step()

    parameters = make_parameters()
    optimizer = SophiaG(parameters, lr=0.1)
    advance(parameters, optimizer, 1)

    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    loaded = SophiaG(copies, lr=0.5)
    # Without a copy, both optimizers would share the tensors of the state.
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    advance(parameters, optimizer, 2)
    advance(copies, loaded, 2)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))


def test_parameter_groups_have_their_own_settings_and_skip_parameters_without_grad() -> None:
    a, b, frozen = (torch.nn.Parameter(torch.ones(4)) for _ in range(3))
    groups = [{"params": [a], "lr": 0.1}, {"params": [b, frozen], "weight_decay": 0.5}]
    optimizer = SophiaG(groups, lr=0.2, weight_decay=0.0)
    a.grad, b.grad = torch.ones(4), torch.ones(4)
    optimizer.step()

    torch.testing.assert_close(a.detach(), torch.full((4,), 0.9))
    torch.testing.assert_close(b.detach(), torch.full((4,), 1 - 0.2 * 0.5 - 0.2))
    assert torch.equal(frozen.detach(), torch.ones(4))


@pytest.mark.parametrize("fused", [False, True])
def test_update_hessian_from_grad_equals_gnb_estimate_and_update(fused: bool) -> None:
    parameters = make_parameters(dtype=torch.float64)
    two_passes, one_pass = (SophiaG(parameters, betas=(0.9, 0.8), fused=fused) for _ in range(2))

    for scale in (1e-3, 1e-6, math.nan):
        for p in parameters:
            p.grad = torch.randn(p.shape, dtype=p.dtype) * scale
        found_inf = torch.tensor(float(math.isnan(scale)))
        two_passes.update_hessian(gnb_estimate(parameters, n_labels=77), found_inf)
        one_pass.update_hessian_from_grad(77, found_inf)

    for p in parameters:
        found, expected = one_pass.state[p]["hessian"], two_passes.state[p]["hessian"]
        assert (found > 0).all()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_estimate_of_an_unknown_tensor_is_refused() -> None:
    optimizer = SophiaG(make_parameters(), lr=0.1)
    with pytest.raises(ValueError, match="a tensor that this optimizer does not update"):
        optimizer.update_hessian({torch.zeros(3): torch.zeros(3)})


def test_statistics_are_the_sums_that_their_names_say() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = SophiaH([parameter], lr=1.0, betas=(0.0, 0.0), rho=0.5, weight_decay=0.0)
    optimizer.update_hessian({parameter: torch.tensor([4.0, 4.0, -3.0, 0.0])})
    # rho * h is 2, 2, -1.5, 0: only the first entry is not clipped.
    parameter.grad = torch.tensor([1.0, 3.0, 1.0, 1.0])
    optimizer.step()

    statistics = {name: value.item() for name, value in optimizer.statistics().items()}
    assert statistics == {"entries": 4, "unclipped": 1, "negative": 1, "hessian_squares": 41}


def test_convert_rho_reproduces_the_released_step() -> None:
    """Compare with clip(|m| / (rho · bs · EMA(ĝ²) + 1e-15), 1), the step of the released code.

    The estimates are made on 240 sequences, with bs = 480 × 1024.
    """
    bs, labels, released = 480 * 1024, 240 * 1024, 0.05
    rho = convert_rho(released, counted=bs, labels=labels)
    assert rho == pytest.approx(0.1)
    assert convert_rho(rho, counted=labels, labels=bs) == pytest.approx(released)
    # Sophia-G as in version 1 of the paper.
    assert convert_rho(20, counted=480, labels=bs) == pytest.approx(20 / 1024)

    parameter = torch.nn.Parameter(torch.zeros(1000, dtype=torch.float64))
    optimizer = SophiaG([parameter], lr=0.3, betas=(0.9, 0.8), rho=rho, weight_decay=0.0)
    g_hat = torch.randn(1000, dtype=torch.float64) * 1e-3
    g = torch.randn(1000, dtype=torch.float64) * 0.03
    parameter.grad = g_hat
    optimizer.update_hessian(gnb_estimate([parameter], n_labels=labels))
    parameter.grad = g
    optimizer.step()

    m, h = 0.1 * g, 0.2 * g_hat**2
    ratio = (m.abs() / (released * bs * h + 1e-15)).clamp(max=1)
    assert 0.2 < (ratio < 1).double().mean() < 0.8
    torch.testing.assert_close(parameter.detach(), -0.3 * m.sign() * ratio)


@pytest.mark.parametrize("block", [3, 256])
def test_sampled_labels_follow_the_softmax(block: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7).mul(2)
    n = 200_000
    labels = sophia._sample_rows(logits.expand(n, 7), torch.rand(n), block)

    p = logits.double().softmax(-1)
    chi2 = ((labels.bincount(minlength=7) - n * p) ** 2 / (n * p)).sum().item()
    assert chi2 < 22.5  # 0.999 quantile for 6 degrees of freedom


def test_sampled_labels_invert_the_cumulative_distribution() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2000, 1000, dtype=torch.float64)
    uniforms = torch.rand(2000, dtype=torch.float64)
    expected = (logits.softmax(-1).cumsum(-1) <= uniforms.unsqueeze(-1)).sum(-1)

    assert torch.equal(sample_labels(logits, uniforms), expected)
    compiled = torch.compile(sample_labels, dynamic=False)(logits, uniforms)
    assert torch.equal(compiled, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sampled_labels_at_the_edges_of_the_distribution(dtype: torch.dtype) -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf], dtype=dtype)
    uniforms = torch.tensor([0.0, 0.499, 0.501, 1 - 2**-24])
    assert sample_labels(logits.expand(4, 5), uniforms).tolist() == [1, 1, 3, 3]

    wide = torch.zeros(1, 50257, dtype=dtype)
    assert sample_labels(wide, torch.tensor([1 - 2**-24])).item() in (50255, 50256)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_logits_still_give_valid_labels(value: float) -> None:
    """Check the range: on a GPU, a label outside it is a device-side assert, which ends the run."""
    for classes in (257, 1000):
        logits = torch.randn(8, classes)
        logits[:, 3] = value
        logits[4:] = value
        labels = sample_labels(logits, torch.rand(8))
        assert ((labels >= 0) & (labels < classes)).all()


def standard_scores(
    estimates: Callable[[int], dict[Tensor, Tensor]], count: int, exact: Tensor
) -> Tensor:
    """Return (mean of `count` estimates − exact) / standard error of the entries that vary."""
    total, squares = torch.zeros_like(exact), torch.zeros_like(exact)

    for index in range(count):
        estimate = torch.cat([e.flatten() for e in estimates(index).values()])
        total += estimate
        squares += estimate**2

    mean = total / count
    error = ((squares / count - mean**2) / count).sqrt()
    varies = error > 1e-12
    # The other entries are the padding rows; mean and exact value are 0.
    torch.testing.assert_close(mean[~varies], exact[~varies], atol=1e-12, rtol=0)
    assert varies.sum() > 1500
    return ((mean - exact) / error)[varies]


def assert_unbiased(scores: Tensor, largest: float) -> None:
    """Check that the mean square of the standard scores is near 1 and that none is an outlier.

    The bounds are wide because the entries are correlated.
    """
    assert 0.5 < scores.square().mean().item() < 1.6
    assert scores.abs().max().item() < largest


def test_gnb_mean_equals_the_exact_gauss_newton_diagonal(tiny_gpt: GPT) -> None:
    tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(1))
    parameters = list(tiny_gpt.parameters())
    logits = tiny_gpt(tokens).flatten(0, 1)  # (12, 11)
    p = logits.detach().softmax(-1)
    exact = torch.zeros(sum(q.numel() for q in parameters), dtype=torch.float64)

    # The mean over the tokens of diag(Jᵀ (diag(p) − p pᵀ) J).
    for n in range(12):
        rows = []
        for v in range(11):
            gradients = torch.autograd.grad(logits[n, v], parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradients]))
        jacobian = torch.stack(rows)  # (11, parameters)
        exact += (p[n] @ jacobian**2 - (p[n] @ jacobian) ** 2) / 12

    generator = torch.Generator().manual_seed(2)

    def estimate(_: int) -> dict[Tensor, Tensor]:
        tiny_gpt.zero_grad()
        tiny_gpt(tokens, sampled_label_loss, torch.rand(2, 6, generator=generator)).backward()
        return gnb_estimate(parameters, n_labels=12)

    assert_unbiased(standard_scores(estimate, 2500, exact), largest=6)


def exact_hessian_diagonal(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    parameters = list(model.parameters())
    entries = []
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(tokens, summed_loss, targets) / 12
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            for index, entry in enumerate(gradient.flatten()):
                second = torch.autograd.grad(entry, parameter, retain_graph=True)[0]
                entries.append(second.flatten()[index])
    return torch.stack(entries)


def test_hutchinson_mean_equals_the_exact_hessian_diagonal(tiny_gpt: GPT) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(11, (2, 2, 6), generator=generator)
    exact = exact_hessian_diagonal(tiny_gpt, tokens, targets)
    assert (exact < -1e-4).any()  # otherwise the test would not detect a lost sign
    params = {name: p.detach() for name, p in tiny_gpt.named_parameters()}

    def estimate(_: int) -> dict[Tensor, Tensor]:
        probes = {}
        for name, p in params.items():
            probes[name] = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        estimates = hutchinson_micro_batch(tiny_gpt, params, probes, tokens, targets)
        return dict(zip(tiny_gpt.parameters(), estimates.values(), strict=True))

    assert_unbiased(standard_scores(estimate, 600, exact), largest=6)


# The short tests compare a compiled run of Sophia-H with an eager one.
@pytest.mark.slow
def test_compiled_hessian_vector_product_equals_the_eager_one(tiny_gpt: GPT) -> None:
    model = tiny_gpt.float()
    tokens, targets = torch.randint(11, (2, 2, 6), generator=torch.Generator().manual_seed(1))
    params = {name: p.detach() for name, p in model.named_parameters()}
    probes = {name: torch.randn_like(p) for name, p in params.items()}

    eager = hutchinson_micro_batch(model, params, probes, tokens, targets)
    compiled_function = torch.compile(hutchinson_micro_batch, dynamic=False)
    compiled = compiled_function(model, params, probes, tokens, targets)

    assert max(e.abs().max().item() for e in eager.values()) > 0.1
    for name, estimate in eager.items():
        torch.testing.assert_close(compiled[name], estimate, atol=1e-5, rtol=1e-5)


def test_hutchinson_estimate_of_a_quadratic() -> None:
    matrix = torch.tensor([[2.0, 1.0], [1.0, -3.0]])
    params = {"x": torch.tensor([1.0, 2.0])}
    probes = {"x": torch.tensor([1.0, -1.0])}
    estimate = hutchinson_estimate(lambda p: 0.5 * p["x"] @ matrix @ p["x"], params, probes)
    torch.testing.assert_close(estimate["x"], probes["x"] * (matrix @ probes["x"]))


def test_functional_call_replaces_the_weight_of_the_tied_head(tiny_gpt: GPT) -> None:
    """Check that the head is tied: with a copy of the embedding, the Hessian would be wrong."""
    tokens = torch.randint(11, (1, 6))
    params = {name: p.detach().clone() for name, p in tiny_gpt.named_parameters()}
    params["wte.weight"] *= 2
    assert not torch.allclose(functional_call(tiny_gpt, params, (tokens,)), tiny_gpt(tokens))
    tiny_gpt.load_state_dict(params)
    torch.testing.assert_close(functional_call(tiny_gpt, params, (tokens,)), tiny_gpt(tokens))


@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("make", [SophiaG, Lion])
def test_a_step_with_found_inf_changes_nothing(make: type, path: dict) -> None:
    parameters = make_parameters()
    optimizer = make(parameters, lr=0.1, weight_decay=0.1, **path)

    for found_inf, gradient in ((0.0, 1.0), (1.0, float("nan")), (0.0, 1.0)):
        before = copy.deepcopy((parameters, optimizer.state_dict()["state"]))
        for p in parameters:
            p.grad = torch.full_like(p, gradient)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()

        same = all(torch.equal(a, b) for a, b in zip(before[0], parameters, strict=True))
        assert same == bool(found_inf)
        if found_inf:
            after = optimizer.state_dict()["state"]
            for i, state in before[1].items():
                assert all(torch.equal(value, after[i][key]) for key, value in state.items())


def test_misuse_is_reported() -> None:
    """Warn of steps without estimates, and refuse an estimate from gradients that are not there."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = SophiaG([w], lr=0.1, weight_decay=0.0)
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.update_hessian_from_grad(n_labels=1)

    w.grad = torch.tensor([1e-6, 1.0, 100.0])
    with pytest.warns(UserWarning, match="before any estimate of the Hessian") as warned:
        optimizer.step()
    assert warned[0].filename == __file__
    assert torch.allclose(w, torch.full((3,), 0.9))

    # One estimate, or a state that was loaded, is enough.
    other = SophiaG([w], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        other.load_state_dict(optimizer.state_dict())
        other.step()
        third = SophiaG([w], lr=0.1)
        third.update_hessian_from_grad(n_labels=1)
        third.step()


def test_compiled_loss_of_sampled_labels_stores_nothing_larger_than_the_logits() -> None:
    """The log-probabilities in fp32 would be twice as large as logits in bfloat16."""
    stored = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tensor.nbytes)
        return tensor

    weight = torch.randn(1000, 32, requires_grad=True)

    def loss(x: Tensor, uniforms: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return sampled_label_loss(F.linear(x, weight), uniforms, reduction="sum")

    torch._dynamo.reset()
    # The compiler's division into forward and backward, without the slow generation of code.
    compiled = torch.compile(loss, backend="aot_eager_decomp_partition", dynamic=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compiled(torch.randn(4, 16, 32), torch.rand(4, 16)).backward()
    assert max(stored) == 2 * 64 * 1000
