"""Compare the memory rules of --dry-run with the live tensors, counted without computing."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.peak_memory import PeakMemory
from model import GPT, ModelConfig, summed_loss
from runtime.cost import activation_bytes, hvp_bytes
from runtime.experiment import load_experiment
from runtime.plan import hessian_micro_batch_size
from tests.conftest import ROOT
from train import hutchinson_micro_batch, summed_sampled_loss

SHAPE = ModelConfig(n_layer=12, n_head=12, n_embd=768)  # GPT-2 small


def peak_bytes(what: str, sequences: int, dtype: str, loss_chunk: int = 0) -> int:
    """Return the peak memory of a step ("step") or an estimate ("gnb" or "hvp")."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(SHAPE, loss_chunk)
        tokens = torch.randint(SHAPE.vocab_size, (sequences, SHAPE.block_size))
        params = {name: p.detach() for name, p in model.named_parameters()}
        probes = {name: torch.randn_like(p) for name, p in params.items()}
        uniforms = torch.rand(tokens.shape)

        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        with PeakMemory() as memory, autocast:
            if what == "hvp":
                hutchinson_micro_batch(model, params, probes, tokens, tokens)
            elif what == "gnb":
                model(tokens, summed_sampled_loss, uniforms).backward()
            else:
                model(tokens, summed_loss, tokens).backward()

    return memory.peak


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_rules_hold_for_each_additional_sequence(dtype: str) -> None:
    step = peak_bytes("step", 3, dtype) - peak_bytes("step", 2, dtype)
    assert step == pytest.approx(activation_bytes(SHAPE, dtype, 1), rel=0.3)

    product = peak_bytes("hvp", 2, dtype) - peak_bytes("hvp", 1, dtype)
    assert product == pytest.approx(hvp_bytes(SHAPE, dtype, compiled=False), rel=0.1)


def test_estimates_need_no_more_memory_than_the_step() -> None:
    """Check GNB on the step's micro-batch, and Hutchinson on the largest that the rule allows."""
    assert peak_bytes("gnb", 2, "bfloat16") <= peak_bytes("step", 2, "bfloat16")

    path = ROOT / "configs/gpt2_125m.toml"
    config = load_experiment(path, "sophia-h", {"train.compile": "false"})
    size = hessian_micro_batch_size(config, 8)
    assert 1 < size < config.train.micro_batch_size
    step = peak_bytes("step", config.train.micro_batch_size, "bfloat16")
    assert peak_bytes("hvp", size, "bfloat16") <= step


def test_chunked_loss_needs_a_third_less_memory_per_sequence() -> None:
    per_sequence = []
    for loss_chunk in (0, 1024):
        larger = peak_bytes("step", 3, "bfloat16", loss_chunk)
        smaller = peak_bytes("step", 2, "bfloat16", loss_chunk)
        per_sequence.append(larger - smaller)
    assert per_sequence[0] / per_sequence[1] > 1.5
