"""Where this process runs, and what it agrees on with the others: device, ranks, signals."""

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
from runtime.config import Config

COMPILERS = ("g++", "clang++", "c++", "gcc", "clang", "cc")  # torch.compile calls one, on GPUs too


# Preemption (torchrun, SLURM, clouds), Ctrl-C, and the signal that SLURM is asked for ahead of its time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Place:
    """Where this process runs: its rank among all, and its device."""

    rank: int
    world_size: int
    device: torch.device


def find_place(config: Config) -> Place:
    """Rank and device, from torchrun's environment and from what the machine has."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind: str = config.train.device
    if kind == "auto":
        kind = next(name for name, there in available.items() if there)
    if not available[kind]:
        raise UserError(f"train.device = {kind!r}, but this machine has none; use auto")
    if config.train.compile and not any(map(shutil.which, COMPILERS)):
        raise UserError(f"train.compile needs a C compiler ({', '.join(COMPILERS)}); install one or set it to false")
    device = torch.device(kind)
    if kind == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{torch.cuda.device_count()} GPUs for more processes; lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if config.train.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"{torch.cuda.get_device_name(device)} has no bfloat16; use --train.dtype=float16 or float32"
            )
    return Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)


def start_process_group(place: Place) -> None:
    if place.world_size > 1:
        # Small decisions travel between the hosts by gloo and never wait for a GPU; gradients travel by NCCL.
        backend = "cpu:gloo,cuda:nccl" if place.device.type == "cuda" else "gloo"
        store, _, _ = next(dist.rendezvous("env://"))
        store = clean_store(store, place)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size)
        agree(0)  # a barrier: nobody creates the run's folder before everybody has looked at it


def clean_store(store: dist.Store, place: Place) -> dist.Store:
    """A part of torchrun's key-value store in which the ranks of this start, and no earlier ones, have written.

    torchrun (2.13) hands the ranks that it restarts the same store again, with addresses of the dead in it: they
    would connect to those, or wait for them. Its restart count cannot tell the parts apart; it differs between nodes.
    So each other rank asks rank 0 under a name that is new, and rank 0 answers until all have heard it.
    """
    name = uuid.uuid4().hex
    if place.rank > 0:
        store.set(f"name of rank {place.rank}", name)
        name = store.get(f"answer to {name}").decode()
        store.set(f"{name} heard by {place.rank}", "")
    else:
        others = range(1, place.world_size)
        while not store.check([f"{name} heard by {rank}" for rank in others]):
            for rank in others:  # what is read may be from a dead rank; then the next time round it is not
                store.set(f"answer to {store.get(f'name of rank {rank}').decode()}", name)
            time.sleep(0.02)
    return dist.PrefixStore(name, store)


def catch_signals() -> list[int]:
    """A list that the first of SIGNALS appears in: the loop then saves and leaves. A second one ends at once."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in SIGNALS:
        signal.signal(number, handle)
    return received


def agree(number: int) -> int:
    """The largest number of any rank, on all ranks. Between the hosts alone: no device is waited for."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def leave(place: Place, status: int) -> None:
    """End with this exit status. Ranks skip the interpreter's own end, where gloo's threads were seen to abort."""
    if place.world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)
