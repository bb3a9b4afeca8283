"""Devices, ranks and signals: where this process runs, and how it coordinates with the others."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from runtime.cli import UserError
from runtime.config import TrainConfig

COMPILERS = ("g++", "clang++", "c++", "gcc", "clang", "cc")  # torch.compile calls one, on GPUs too

# Preemption (torchrun, SLURM, clouds), Ctrl-C, and the signal that SLURM can send before a job's
# time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Ranks:
    """This process's rank and the number of ranks."""

    rank: int = 0
    world_size: int = 1

    @staticmethod
    def from_environment() -> Ranks:
        """Return what torchrun has set, or a single rank."""
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        return Ranks(int(rank), int(world_size))


def find_device(train: TrainConfig) -> torch.device:
    """Return this process's device; under torchrun every local rank has a GPU of its own.

    Raises:
        UserError: if the device that the config asks for does not exist.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind: str = train.device
    if kind == "auto":
        kind = next(name for name, is_available in available.items() if is_available)
    if not available[kind]:
        raise UserError(f"train.device = {kind!r}, but this machine has no such device; use auto")
    if kind != "cuda":
        return torch.device(kind)

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"more processes than GPUs ({torch.cuda.device_count()}); lower --nproc_per_node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def check_device(train: TrainConfig, device: torch.device) -> None:
    """Refuse what the device or the machine cannot do: bfloat16, or torch.compile."""
    if train.compile and not any(shutil.which(name) for name in COMPILERS):
        raise UserError(
            f"train.compile needs a C compiler ({', '.join(COMPILERS)}); "
            f"install one or add --train.compile=false"
        )
    if device.type != "cuda" or train.dtype != "bfloat16":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{name} has no bfloat16; use --train.dtype=float16 or float32")


def start_process_group(ranks: Ranks, device: torch.device) -> None:
    """Connect the ranks, if there are several, and wait for all of them."""
    if ranks.world_size == 1:
        return
    # Small decisions use gloo, which never waits for a GPU; gradients use NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, _, _ = next(dist.rendezvous("env://"))
    store = _fresh_store(store, ranks)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size)
    # No rank may create the run's folder before every rank has looked at it.
    barrier()


def _fresh_store(store: dist.Store, ranks: Ranks) -> dist.Store:
    """Return a part of torchrun's key-value store that no earlier process has written to.

    torchrun 2.13 gives restarted ranks the same store again, which still holds the addresses of
    the dead ones. Its restart count cannot separate the two, because it differs between nodes.
    Instead, every rank asks rank 0 under a name of its own until rank 0 has answered with the
    name of a new part.
    """
    name = uuid.uuid4().hex
    if ranks.rank > 0:
        store.set(f"name of rank {ranks.rank}", name)
        name = store.get(f"answer to {name}").decode()
        store.set(f"{name} received by {ranks.rank}", "")
        return dist.PrefixStore(name, store)

    others = range(1, ranks.world_size)
    while not store.check([f"{name} received by {rank}" for rank in others]):
        for rank in others:
            # The name read may be a dead rank's. Then the next round reads the new one.
            asking = store.get(f"name of rank {rank}").decode()
            store.set(f"answer to {asking}", name)
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def catch_signals() -> list[int]:
    """Return a list to which received SIGNALS are appended.

    A second signal of the same kind ends the process.
    """
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in SIGNALS:
        signal.signal(number, handle)
    return received


def max_over_ranks(number: int) -> int:
    """Return the largest number of any rank, on all ranks. Runs on the CPU: no device sync."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def barrier() -> None:
    """Wait until all ranks have called this."""
    max_over_ranks(0)


def exit_process(ranks: Ranks, status: int) -> None:
    """Exit with `status`.

    With several ranks, skip the interpreter's cleanup: gloo's threads sometimes abort during it.
    """
    if ranks.world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)
