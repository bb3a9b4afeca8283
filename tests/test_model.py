from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, ModelConfig, summed_loss
from optimizers.build import weight_decay_groups
from runtime.cost import flops_per_token, num_parameters
from runtime.experiment import load_experiment
from tests.conftest import ROOT
from train import summed_sampled_loss

SHAPE = ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=301)


@pytest.mark.parametrize("scaling", [True, False])
def test_logits_equal_transformers_gpt2(scaling: bool) -> None:
    torch.manual_seed(0)
    model = GPT(SHAPE.model_copy(update={"scale_attn_by_inverse_layer_idx": scaling})).eval()
    # Also the norms' weights, so that none of them is the identity.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)

    config = GPT2Config(
        vocab_size=301,
        n_positions=32,
        n_embd=64,
        n_layer=3,
        n_head=4,
        scale_attn_by_inverse_layer_idx=scaling,
    )
    reference = GPT2LMHeadModel(config).eval()
    copy_into_transformers(model, reference)

    tokens = torch.randint(301, (2, 32))
    with torch.no_grad():
        ours, theirs = model(tokens), reference(tokens).logits

    assert ours.shape == (2, 32, 301)
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def copy_into_transformers(model: GPT, reference: GPT2LMHeadModel) -> None:
    """Copy our weights into theirs, whose linear layers are transposed; set their biases to 0."""
    theirs = dict(reference.named_parameters())
    with torch.no_grad():
        for parameter in theirs.values():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            is_linear = parameter.ndim == 2 and name.startswith("blocks")
            target = theirs["transformer." + name.replace("blocks", "h")]
            # The slice removes the embedding's padding rows.
            target.copy_(parameter.T if is_linear else parameter[: len(target)])


def test_later_tokens_do_not_change_earlier_logits() -> None:
    torch.manual_seed(0)
    model = GPT(SHAPE)
    tokens = torch.randint(301, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (tokens[0, 20] + 1) % 301
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], atol=0, rtol=0)
    assert (before[:, 20:] != after[:, 20:]).any(-1).all()


def test_initialization_is_that_of_gpt2() -> None:
    torch.manual_seed(0)
    model = GPT(SHAPE.model_copy(update={"n_embd": 256}))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all()
            continue
        std = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        assert parameter.mean().item() == pytest.approx(0, abs=std / 10), name


def test_padding_rows_have_no_gradient() -> None:
    model = GPT(SHAPE)
    assert model.wte.weight.shape[0] == 320
    tokens = torch.randint(301, (2, 32))
    model(tokens, summed_loss, tokens).backward()

    assert model.wte.weight.grad is not None
    assert (model.wte.weight.grad[301:] == 0).all()
    assert (model.wte.weight.grad[:301] != 0).any(-1).all()


@pytest.mark.parametrize(
    ("criterion", "compiled"),
    [
        (summed_loss, False),
        (summed_sampled_loss, False),
        pytest.param(summed_sampled_loss, True, marks=pytest.mark.slow),
    ],
)
def test_chunked_loss_and_its_gradient_equal_the_unchunked(
    criterion: Callable[..., Tensor], compiled: bool
) -> None:
    """Compare with chunks of 24 of the 64 tokens, so that the last chunk is smaller."""
    torch.manual_seed(0)
    shape = SHAPE.model_copy(update={"n_layer": 1})
    whole, chunked = GPT(shape).double(), GPT(shape, loss_chunk=24).double()
    chunked.load_state_dict(whole.state_dict())
    tokens, labels = torch.randint(301, (2, 32)), torch.randint(301, (2, 32))
    if criterion is summed_sampled_loss:
        labels = torch.rand(2, 32, dtype=torch.float64)

    expected = whole(tokens, criterion, labels)
    model = torch.compile(chunked, dynamic=False) if compiled else chunked
    loss = model(tokens, criterion, labels)
    torch.testing.assert_close(loss, expected)

    expected.backward()
    loss.backward()
    for p, q in zip(whole.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_only_linear_weights_decay() -> None:
    model = GPT(SHAPE)
    decayed, others = weight_decay_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}

    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {"c_attn", "c_proj", "c_fc"}
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert len(decayed["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize(
    ("name", "millions", "gflops"),
    [
        ("30m", 30.33, 0.208),
        ("125m", 124.4, 0.855),
        ("355m", 354.6, 2.423),
        ("770m", 773.6, 5.199),
        ("1.5b", 1557, 10.27),
    ],
)
def test_sizes_and_flops(name: str, millions: float, gflops: float) -> None:
    """Compare with known values.

    The sizes are GPT-2's with the padded embedding and without biases; the FLOPs follow nanoGPT's
    formula, computed by hand.
    """
    shape = load_experiment(ROOT / f"configs/gpt2_{name}.toml", "adamw").model
    assert num_parameters(shape) / 1e6 == pytest.approx(millions, rel=1e-3)
    assert flops_per_token(shape) / 1e9 == pytest.approx(gflops, rel=1e-3)


def test_summed_loss_is_in_nats_and_float32_and_ignores_targets_of_minus_one() -> None:
    logits = torch.zeros(2, 3, 7)
    targets = torch.tensor([[0, 1, 2], [3, -1, -1]])
    assert summed_loss(logits, targets).item() == pytest.approx(4 * math.log(7))
    assert summed_loss(logits.bfloat16(), targets).dtype == torch.float32
