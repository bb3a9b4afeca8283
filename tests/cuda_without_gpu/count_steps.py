"""Make steps of one run on the GPU that computes nothing, and print what they did as JSON.

    bash tests/cuda_without_gpu/run.sh python tests/cuda_without_gpu/count_steps.py \
        configs/gpt2_125m.toml --run=sophia-g --ranks=8 --train.micro_batch_size=12

With several ranks this process is rank 0 of them: NCCL's stand-in needs no others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import train
from runtime import plan
from runtime.cli import Parser
from runtime.config import Config
from runtime.cost import num_parameters
from runtime.distributed import Ranks
from runtime.experiment import load_experiment
from tests.cuda_without_gpu.stand_in import StandIn

# Two steps with an estimate, of which the second can be compared with the plain steps around it.
# DistributedDataParallel times its first ten iterations, and the first eight steps wait for that.
STEPS = 13


def main() -> None:
    arguments, config = parse()
    if torch.cuda.get_device_capability() == (9, 0):
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN itself is not replaced
    torch.cuda.set_device(0)
    if arguments.ranks > 1:
        store = dist.HashStore()
        dist.init_process_group("nccl", store=store, rank=0, world_size=arguments.ranks)

    stand_in = StandIn()
    started = time.monotonic()
    run = build(config, arguments.ranks)
    built = torch.cuda.max_memory_allocated()
    steps = [count_step(run, step, stand_in) for step in range(arguments.steps)]

    fixed, activations = plan.memory_per_rank(config, arguments.ranks)
    result = {
        "experiment": config.experiment,
        "run": config.run,
        "ranks": arguments.ranks,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "dtype": config.train.dtype,
        "compile": config.train.compile,
        "micro_batch_size": config.train.micro_batch_size,
        "hessian_micro_batch_size": run.hessian_micro_batch_size,
        "micro_batches": config.train.batch_size
        // config.train.micro_batch_size
        // arguments.ranks,
        "layers": config.model.n_layer,
        "loss_chunk": config.train.loss_chunk,
        "shard_optimizer": config.train.shard_optimizer,
        "build_peak": built,
        "parameters": num_parameters(config.model),
        "fixed_bytes": fixed,
        "activation_bytes": activations,
        "estimate_steps": [step for step in range(arguments.steps) if has_estimate(config, step)],
        "seconds": time.monotonic() - started,
        "steps": steps,
    }
    print(json.dumps(result), flush=True)
    os._exit(0)  # process groups and compiler threads need no orderly end here


def parse() -> tuple[argparse.Namespace, Config]:
    parser = Parser(__doc__)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--run", required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments, others = parser.parse_known_args()
    keys = {"train.device": "cuda"}
    for argument in others:
        key, _, value = argument.removeprefix("--").partition("=")
        keys[key] = value
    return arguments, load_experiment(arguments.experiment, arguments.run, keys)


def has_estimate(config: Config, step: int) -> bool:
    interval = config.hessian_interval
    return bool(interval and step % interval == 0)


def build(config: Config, ranks: int) -> train.Run:
    """Return the run as train.py builds it, on random tokens and without initial weights."""
    torch.nn.Linear.reset_parameters = lambda self: None  # type: ignore[method-assign]
    torch.nn.Embedding.reset_parameters = lambda self: None  # type: ignore[method-assign]
    torch.nn.init.normal_ = lambda tensor, *args, **kwargs: tensor

    vocab_size = config.model.text_vocab_size
    tokens = {}
    for split in ("train", "val"):
        size = 64 * config.model.block_size
        tokens[split] = np.random.default_rng(0).integers(vocab_size, size=size).astype("<u2")
    return train.build_run(config, Ranks(0, ranks), torch.device("cuda", 0), tokens)


def count_step(run: train.Run, step: int, stand_in: StandIn) -> dict[str, Any]:
    """Make one step and return its counts, its peak memory in bytes, and who waited.

    "estimate_peak" is that of the Hessian's estimate, and "peak" that of the rest.
    """
    estimate_peaks: list[int] = []

    def watched(run: train.Run, step: int) -> None:
        update_hessian(run, step)
        estimate_peaks.append(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    update_hessian, train.update_hessian = train.update_hessian, watched
    torch.cuda.reset_peak_memory_stats()
    stand_in.reset()
    train.train_step(run, step)
    train.update_hessian = update_hessian
    return stand_in.counts() | {
        "peak": torch.cuda.max_memory_allocated(),
        "estimate_peak": max(estimate_peaks, default=0),
        "reserved": torch.cuda.max_memory_reserved(),
        "left": torch.cuda.memory_allocated(),
        "graphs": counters["stats"]["unique_graphs"],
        "waits": dict(stand_in.waits),
    }


if __name__ == "__main__":
    main()
