"""Compare the memory rules of --dry-run with the live tensors, counted without computing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.peak_memory import PeakMemory
from model import GPT, ModelConfig, summed_loss
from optimizers.build import make_optimizer
from optimizers.state import ChainedOptimizer
from runtime import checkpoint, plan
from runtime.cli import UserError
from runtime.cost import activation_bytes, product_bytes, sharded_states, state_sizes
from runtime.distributed import Ranks
from runtime.experiment import as_text, load_experiment
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
    assert step == pytest.approx(activation_bytes(SHAPE, dtype, False, 1), rel=0.3)

    product = peak_bytes("hvp", 2, dtype) - peak_bytes("hvp", 1, dtype)
    assert product == pytest.approx(product_bytes(SHAPE, dtype, compiled=False), rel=0.1)


@pytest.mark.parametrize("size", ["30m", "125m", "355m", "540m", "770m", "1.5b"])
@pytest.mark.parametrize("run", ["adamw", "lion", "sophia-g", "sophia-h"])
def test_batches_of_the_experiments_divide_among_up_to_8_ranks(size: str, run: str) -> None:
    config = load_experiment(ROOT / f"configs/gpt2_{size}.toml", run)
    for ranks in (1, 2, 4, 8):
        plan.check_divisible(config, ranks)


def test_documented_commands_for_several_nodes_are_accepted() -> None:
    """Check the division of the batch in every command that starts ranks on two nodes of 8 GPUs."""
    found = 0
    for path in (ROOT / "docs/multi_node.md", ROOT / "scripts/slurm.sh"):
        text = re.sub(r"\\\n#?\s*", "", path.read_text(encoding="utf-8"))  # join continued lines
        for line in re.findall(r"^.*--n?nodes=2 .*$", text, re.MULTILINE):
            experiment = re.findall(r"configs/\S+", line)[0]
            options = dict(re.findall(r"--((?:train|optimizer)\.\w+)=(\S+)", line))
            run = re.findall(r"--run=(\S+)", line)[0]
            assert re.search(r"--(nproc_per_node|gpus-per-node)=8", line)
            plan.check_divisible(load_experiment(ROOT / experiment, run, options), 16)
            found += 1
    assert found == 3


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


@pytest.mark.parametrize(("run", "ranks"), [("adamw", 1), ("sophia-h", 1), ("lion", 8)])
def test_run_that_cannot_fit_is_refused_with_the_largest_that_does(
    run: str, ranks: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Give a rank less and less memory, and follow the advice."""
    path = ROOT / "configs/gpt2_125m.toml"

    def check(micro: int) -> str:
        """Return the advice of the error or warning, or nothing."""
        overrides = {"train.batch_size": "960", "train.micro_batch_size": str(micro)}
        config = load_experiment(path, run, overrides)
        try:
            plan.check_memory(config, Ranks(0, ranks), torch.device("cpu"))
        except UserError as error:
            return str(error)
        return capsys.readouterr().err

    config = load_experiment(path, run, {"train.batch_size": "960", "train.micro_batch_size": "60"})
    needed = sum(plan.memory_per_rank(config, ranks))
    monkeypatch.setattr(plan, "memory_of", lambda device: needed)
    assert check(60) == ""
    monkeypatch.setattr(plan, "memory_of", lambda device: int(0.8 * needed))
    assert check(60).startswith("warning: this may not fit: ")

    monkeypatch.setattr(plan, "memory_of", lambda device: needed // 4)
    message = check(60)
    assert message.startswith("train.micro_batch_size 60 needs about")
    advice = int(message.partition("use --train.micro_batch_size=")[2].partition(",")[0])
    assert 0 < advice < 60
    assert 960 % (advice * ranks) == 0
    assert check(advice) == ""

    # Not even a single sequence.
    monkeypatch.setattr(plan, "memory_of", lambda device: 10**9)
    assert "use a device with more memory or a smaller model" in check(60)
    assert "or --" not in check(60)


def test_checkpoints_that_do_not_fit_on_the_disk_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    path = ROOT / "configs/gpt2_125m.toml"
    overrides = {"train.out_dir": str(tmp_path / "missing"), "train.keep_checkpoints": "2"}
    config = load_experiment(path, "adamw", overrides)
    size = plan.checkpoint_bytes(config)

    def check(free: float) -> str:
        usage = SimpleNamespace(free=int(free))
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: usage)
        plan.check_disk(config)
        return capsys.readouterr().err

    # The newest two, the best, and the one being written.
    assert check(4 * size) == ""
    assert check(3.9 * size).startswith(f"warning: {tmp_path}: the disk may become full")

    # Those of an interrupted run are there already.
    config.run_dir.mkdir(parents=True)
    for step in (1000, 2000, 3000):
        checkpoint.path_of(config.run_dir, step).touch()
    assert check(size) == ""
    assert "the disk may become full" in check(0.9 * size)


@pytest.mark.parametrize(
    ("run", "ranks", "key", "value"),
    [
        ("adamw", 8, "train.shard_optimizer", "true"),
        ("adamw", 1, "train.loss_chunk", "2048"),
        ("sophia-h", 1, "optimizer.hessian_micro_batch_size", "1"),
    ],
)
def test_options_are_advised_if_they_make_the_run_fit(
    run: str, ranks: int, key: str, value: str
) -> None:
    """Give a run of 355M with one sequence the memory that it needs with one option."""
    keys = {"train.micro_batch_size": "1"}
    if run == "sophia-h":
        keys["optimizer.hessian_micro_batch_size"] = "4"
    path = ROOT / "configs/gpt2_355m.toml"
    config = load_experiment(path, run, keys)
    needed = sum(plan.memory_per_rank(load_experiment(path, run, keys | {key: value}), ranks))

    advice = plan._advise_less_memory(config, ranks, needed / plan.ROOM + 1)
    assert advice.endswith(f", or --{key}={value}")
    assert "or --" not in plan._advise_less_memory(config, ranks, 0.99 * needed / plan.ROOM)


def test_memory_rules_agree_with_the_counts_of_cuda_code() -> None:
    """Compare the rules with the peaks that tests/cuda_without_gpu/check.py has counted."""
    counted = json.loads((ROOT / "docs/performance/cuda_counted.json").read_text())
    for row in counted["rows"]:
        ranks = row["ranks"]
        keys = {key: row[key] for key in ("dtype", "compile", "micro_batch_size", "loss_chunk")}
        keys["shard_optimizer"] = row["shard_optimizer"]
        keys["batch_size"] = row["micro_batch_size"] * row["micro_batches"] * ranks
        text = {f"train.{key}": as_text(value) for key, value in keys.items()}
        if row["hessian_micro_batch_size"]:
            sequences = row["hessian_micro_batch_size"]
            text["optimizer.hessian_micro_batch_size"] = str(sequences)
            text["optimizer.hessian_batch_size"] = str(sequences * ranks)

        path = ROOT / f"configs/gpt2_{row['size']}.toml"
        config = load_experiment(path, row["run"], text)
        peak = max(row["build_peak"], row["step_peak"], row["estimate_peak"])
        assert sum(plan.memory_per_rank(config, ranks)) == pytest.approx(peak, rel=0.1), row


def test_table_has_what_a_reader_asks_first(capsys) -> None:
    config = load_experiment(ROOT / "configs/gpt2_125m.toml", "sophia-g")
    plan.print_plan(config, Ranks(0, 8), torch.device("cpu"), "at step 0")
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        rows[line[:17].strip()] = line[18:]
    assert rows["batch"].startswith("480 sequences of 1024 = 491,520 tokens; ")
    assert rows["batch"].endswith(": 8 × 1 × 60")
    assert rows["schedule"].startswith("100,000 steps, 49,152,000,000 tokens")
    assert " GB of " in rows["memory per rank"]
    assert rows["code"].startswith("commit ")
    assert rows["start"] == "at step 0"


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon", "soap"])
def test_fullest_rank_is_that_of_the_real_partition(
    optimizer: str, first_of_two_ranks: Ranks
) -> None:
    """Ask ZeroRedundancyOptimizer how it would divide the parameters among four ranks."""
    keys = {"train.shard_optimizer": "true", "model.block_size": "64"}  # no two sizes are equal
    if optimizer != "lion":
        keys["optimizer.name"] = optimizer
    run = "lion" if optimizer == "lion" else "adamw"
    config = load_experiment(ROOT / "configs/quickstart.toml", run, keys)
    made = make_optimizer(config, GPT(config.model))
    parts: tuple[Any, ...] = made.parts if isinstance(made, ChainedOptimizer) else (made,)

    ranks = 4
    states = [0] * ranks
    sizes = {size.parameters: size.states for size in state_sizes(config)}
    for part in parts:
        part.world_size = ranks
        part._partition_parameters_cache.clear()
        for rank, groups in enumerate(part._partition_parameters()):
            for group in groups:
                states[rank] += sum(sizes[p.numel()] for p in group["params"])
    assert sharded_states(config, ranks) == max(states)
