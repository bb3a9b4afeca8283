"""Count what a compiled step must compute and move, and how long that takes at least on some GPUs.

    bash tests/cuda_without_gpu/run.sh python tests/cuda_without_gpu/roofline.py

Matrix products are counted at the calls of cuBLAS, and memory traffic at the launches of Triton's
kernels: every tensor argument once, twice if the kernel also reads what it overwrites. A lookup
counts as the whole table, so that traffic is an upper bound. Attention is arithmetic: 2 T² C
operations per sequence and layer forward, and 5 T² C backward (causal, with recomputation).

Models of two and three layers are compiled, and the rest follows: all layers do the same.
"""

from __future__ import annotations

import collections
import functools
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.select_algorithm import extern_kernels

import train
from benchmarks.nanogpt_loop import make_reference_step
from model import padding_rows
from runtime import plan
from runtime.cli import Parser
from runtime.config import Config
from runtime.cost import flops_per_token, num_parameters
from runtime.experiment import load_experiment
from runtime.files import write_json
from runtime.run_folder import describe_commit
from tests.cuda_without_gpu.count_steps import build
from tests.cuda_without_gpu.stand_in import ROOT

# Parts of a micro-batch. The first two are matrix products, the others are kernels by Triton.
PARTS = ("blocks", "head", "activations", "loss", "weights", "optimizer")


@dataclass
class Traffic:
    """FLOPs and bytes of each part, and launches."""

    flops: collections.Counter[str] = field(default_factory=collections.Counter)
    bytes: collections.Counter[str] = field(default_factory=collections.Counter)
    launches: collections.Counter[str] = field(default_factory=collections.Counter)


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def watch_triton(traffic: Traffic, config: Config) -> Iterator[None]:
    """Add up the sizes of the tensors that each Triton kernel gets."""
    tokens = config.train.micro_batch_size * config.model.block_size
    run = CachingAutotuner.run

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.inductor_meta.get("kernel_name", self.fn.__name__)
        moved = largest = 0
        for parameter, value in zip(self.fn.arg_names, args, strict=False):
            if isinstance(value, torch.Tensor):
                moved += nbytes(value) * (2 if parameter.startswith("in_out") else 1)
                largest = max(largest, value.numel())

        part = "weights"
        if name.startswith("triton_for") or "_lerp_" in name:
            part = "optimizer"  # its step, or the average of the estimates
        elif largest >= tokens * config.model.vocab_size:
            part = "loss"
        elif largest >= tokens * config.model.n_embd:
            part = "activations"
        traffic.bytes[part] += moved
        traffic.launches[part] += 1
        return run(self, *args, **kwargs)

    CachingAutotuner.run = watched  # type: ignore[method-assign]
    yield
    CachingAutotuner.run = run  # type: ignore[method-assign]


@contextmanager
def watch_products(traffic: Traffic, config: Config) -> Iterator[None]:
    """Count the matrix products that compiled code leaves to cuBLAS."""
    rows = config.model.vocab_size + padding_rows(config.model)

    def watch(function: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            a, b = args[-2:]
            part = "head" if rows in (*a.shape, *b.shape) else "blocks"
            traffic.flops[part] += 2 * a.numel() * b.shape[-1]
            traffic.bytes[part] += nbytes(a) + nbytes(b) + nbytes(kwargs["out"])
            traffic.launches[part] += 1
            return function(*args, **kwargs)

        return watched

    functions = {name: getattr(extern_kernels, name) for name in ("mm", "bmm", "addmm", "baddbmm")}
    for name, function in functions.items():
        setattr(extern_kernels, name, watch(function))
    yield
    for name, function in functions.items():
        setattr(extern_kernels, name, function)


def count_micro_batch(size: str, run_name: str, micro: int) -> Traffic:
    """Return the traffic of a training micro-batch, or of a Hessian estimate's for Sophia."""
    two, three = (count_layers(size, run_name, micro, layers) for layers in (2, 3))
    layers = load_experiment(ROOT / f"configs/gpt2_{size}.toml", "adamw", {}).model.n_layer
    total = Traffic()
    for name in ("flops", "bytes", "launches"):
        small, large = getattr(two, name), getattr(three, name)
        for part in PARTS:
            per_layer = large[part] - small[part]
            getattr(total, name)[part] = small[part] + (layers - 2) * per_layer
    return total


def count_layers(size: str, run_name: str, micro: int, layers: int) -> Traffic:
    torch._dynamo.reset()
    gc.collect()
    keys = {
        "train.device": "cuda",
        "train.micro_batch_size": str(micro),
        "train.batch_size": str(micro),
        "model.n_layer": str(layers),
    }
    if run_name.startswith("sophia"):
        keys |= {
            "optimizer.hessian_batch_size": str(micro),
            "optimizer.hessian_micro_batch_size": str(micro),
        }
    path = ROOT / f"configs/gpt2_{size}.toml"
    config = load_experiment(path, "adamw" if run_name == "reference" else run_name, keys)
    step: Callable[[], Any]
    if run_name == "reference":
        device = torch.device("cuda", 0)
        folder = make_tokens(config)
        step = make_reference_step(config.model, folder, micro, micro, device, compiled=True)
    else:
        run = build(config, ranks=1)
        step = functools.partial(train.train_step, run, 1)
        if run_name.startswith("sophia"):
            train.update_hessian(run, 0)
            step = functools.partial(train.update_hessian, run, 0)
    step()

    traffic = Traffic()
    with watch_triton(traffic, config), watch_products(traffic, config):
        step()
    return traffic


def make_tokens(config: Config) -> Path:
    folder = Path(os.environ["STAND_IN"]).parent.parent / "counts"
    tokens = np.random.default_rng(0).integers(config.model.text_vocab_size, size=100_000)
    tokens.astype("<u2").tofile(folder / "train.bin")
    return folder


# ---- GPUs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A card's data sheet: dense bf16 FLOP/s, bytes/s of memory, bytes/s to the other GPUs."""

    name: str
    flops: float
    bandwidth: float
    link: float


GPUS = (
    Gpu("A5000", 111.1e12, 768e9, 32e9),  # PCIe 4.0 × 16
    Gpu("A100-40", 312e12, 1555e9, 300e9),  # NVLink 3
    Gpu("H100", 989.4e12, 3350e9, 450e9),  # SXM, NVLink 4
)


# Shares of the data sheet's numbers that real kernels may reach. Assumptions, not measurements.
PRODUCTS, ATTENTION, MEMORY = 0.75, 0.45, 0.85


def seconds(
    gpu: Gpu, traffic: Traffic, attention: float, others: float, efficiency: tuple[float, ...]
) -> float:
    """Return the least time of a micro-batch: products, attention and kernels one after another.

    Args:
        gpu: the card.
        traffic: of the micro-batch.
        attention: its FLOPs of fused attention.
        others: bytes of kernels that are not Triton's.
        efficiency: shares of the data sheet for products, attention and memory.
    """
    products, fused, memory = efficiency
    total = attention / (fused * gpu.flops)
    for part in ("blocks", "head"):
        compute = traffic.flops[part] / (products * gpu.flops)
        total += max(compute, traffic.bytes[part] / (memory * gpu.bandwidth))
    moved = sum(traffic.bytes[part] for part in ("activations", "loss", "weights")) + others
    return total + moved / (memory * gpu.bandwidth)


def main() -> None:
    parser = Parser(__doc__)
    sizes = {"30m": 60, "125m": 30, "355m": 15, "540m": 6, "770m": 4, "1.5b": 3}
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=list(sizes))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to a file")
    arguments = parser.parse_args()
    torch.cuda.set_device(0)

    # Sizes that were counted at the same commit are not counted again.
    code = describe_commit()
    rows: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        before = json.loads(arguments.json.read_text(encoding="utf-8"))
        rows = before["rows"] if before["code"] == code else {}
    for size in arguments.sizes:
        if size not in rows:
            rows[size] = count_size(size, sizes[size])
            print(f"… {size}", file=sys.stderr, flush=True)
        if arguments.json:
            write_json(arguments.json, {"code": code, "rows": rows})
    print_tables({size: rows[size] for size in arguments.sizes})


def print_tables(rows: dict[str, Any]) -> None:
    """Print what a training micro-batch takes, and the bounds for each GPU, as Markdown."""
    print("| size | batch | products | attention | product bytes | activations | loss | weights |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for size, row in rows.items():
        flops, moved = row["adamw flops"], row["adamw bytes"]
        cells = [f"{(flops['blocks'] + flops['head']) / 1e12:.1f} TFLOP"]
        cells.append(f"{row['attention flops'] / 1e12:.1f} TFLOP")
        cells.append(f"{(moved['blocks'] + moved['head']) / 1e9:.0f} GB")
        cells += [f"{moved[part] / 1e9:.1f} GB" for part in ("activations", "loss", "weights")]
        print(f"| {size} | {row['micro_batch_size']} | {' | '.join(cells)} |")

    print("\n| size | GPU | MFU | Gauss-Newton-Bartlett | Hutchinson | exchange |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for size, row in rows.items():
        for gpu in GPUS:
            bound, assumed = row[f"{gpu.name} bound"], row[f"{gpu.name} assumed"]
            cells = []
            for name in ("mfu", "gnb", "hutchinson", "exchange"):
                cells.append(f"{bound[name]:.1%} ({assumed[name]:.1%})")
            print(f"| {size} | {gpu.name} | {' | '.join(cells)} |")


def count_size(size: str, micro: int) -> dict[str, Any]:
    """Return the counts of a size and the bounds that follow from them."""
    config = load_experiment(ROOT / f"configs/gpt2_{size}.toml", "adamw", {})
    model, n = config.model, num_parameters(config.model)
    T = model.block_size
    attention = 7 * micro * T**2 * model.n_embd * model.n_layer
    accumulated = 12 * n  # torch adds each gradient to the sum: two reads and a write
    per_rank = 480 // 8
    result: dict[str, Any] = {"micro_batch_size": micro, "attention flops": attention}
    counts = {}
    keys = {"train.micro_batch_size": str(micro), "train.device": "cuda"}
    config = load_experiment(ROOT / f"configs/gpt2_{size}.toml", "sophia-h", keys)
    product_size = plan.hessian_micro_batch_size(config, world_size=8)
    for run_name in ("adamw", "reference", "sophia-g", "sophia-h"):
        sequences = product_size if run_name == "sophia-h" else micro
        traffic = counts[run_name] = count_micro_batch(size, run_name, sequences)
        for name in ("flops", "bytes", "launches"):
            result[f"{run_name} {name}"] = dict(getattr(traffic, name))
    result["product_size"] = product_size

    for gpu in GPUS:
        for label, shares in (("bound", (1, 1, 1)), ("assumed", (PRODUCTS, ATTENTION, MEMORY))):
            memory = shares[2] * gpu.bandwidth
            step = seconds(gpu, counts["adamw"], attention, accumulated, shares)
            update = 40 * n / memory  # clipping 12 bytes a parameter, AdamW 28
            whole = step * per_rank / micro + update
            useful = flops_per_token(model) * per_rank * T
            gradient = seconds(gpu, counts["sophia-g"], attention, accumulated, shares)
            average = counts["sophia-g"].bytes["optimizer"] / memory
            estimate = gradient * per_rank / 2 / micro + average
            product = seconds(gpu, counts["sophia-h"], 0, 0, shares)
            products = 32 // 8 / product_size * product + average
            result[f"{gpu.name} {label}"] = {
                "mfu": useful / whole / gpu.flops,
                "gnb": estimate / 10 / whole,
                "hutchinson": products / 10 / whole,
                "exchange": 2 * 7 / 8 * 4 * n / gpu.link / whole,
                "tokens_per_second_to_reference": seconds(
                    gpu, counts["reference"], attention, accumulated, shares
                )
                / step,
            }
    return result


if __name__ == "__main__":
    main()
