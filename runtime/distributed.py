"""Devices, ranks and signals: where this process runs, and how it coordinates with the others."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._inductor import config as inductor

from runtime.cli import SharedError, UserError, describe, reason, warn
from runtime.config import KEYS, LOCAL_KEYS, Config, TrainConfig, value_of
from runtime.cost import step_flops
from runtime.run_folder import describe_code

COMPILERS = ("g++", "clang++", "c++", "gcc", "clang", "cc")  # torch.compile calls one, on GPUs too

# What "auto" means on a CPU. With AMX, bfloat16 makes matrix products several times faster, but
# below this width autocast's conversions take more time than it saves. Compiling takes up to a
# minute and saves a tenth: a quarter of an hour's training at 100 GFLOP/s. See docs/performance.md.
AMX_WIDTH = 192
COMPILED_FLOPS = 1e14

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

# Preemption (torchrun, SLURM, clouds), Ctrl-C, and the signal that SLURM can send before a job's
# time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEATED_S = 5.0  # a signal that comes again within these seconds is the same one


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
        if kind == "cpu":
            _warn_about_unused_gpu()
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


def resolve_number_format(
    config: Config, device: torch.device, stored: dict[str, Any] | None = None
) -> Config:
    """Replace "auto" in train.dtype and train.compile by what is fast on this device.

    Args:
        config: the run.
        device: where it is trained.
        stored: the config of the checkpoint to continue from, whose choices are kept.
    """
    train = config.train
    changes: dict[str, Any] = {}
    if train.dtype == "auto":
        changes["train.dtype"] = fast_dtype(config.model.n_embd, device)
    if train.compile == "auto":
        changes["train.compile"] = is_worth_compiling(config, device)
    if stored is not None:
        changes = {key: value_of(stored, key) for key in changes}
    update = {key.removeprefix("train."): value for key, value in changes.items()}
    return config.model_copy(update={"train": train.model_copy(update=update)})


def fast_dtype(n_embd: int, device: torch.device) -> str:
    """Return the number format in which a model of this width trains fastest on the device."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu" and n_embd >= AMX_WIDTH:
        return "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16") else "float32"
    return "float32"


def is_worth_compiling(config: Config, device: torch.device) -> bool:
    """Return whether the whole run takes long enough that compiling saves time."""
    if device.type != "cpu":
        return device.type == "cuda"
    has_compiler = any(shutil.which(name) for name in COMPILERS)
    return has_compiler and config.train.max_steps * step_flops(config) > COMPILED_FLOPS


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


def set_deterministic(enabled: bool) -> None:
    """Let equal runs on equal GPUs give equal bits, or not.

    cuBLAS gets a fixed workspace, attention another backward pass, kernels with atomics are
    replaced or refused, and the compiler does not choose kernels by measuring them.
    """
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    inductor.deterministic = enabled
    if enabled:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it is first used


def memory_of(device: torch.device) -> int | None:
    """Return the bytes of memory that this rank has on its device, or None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None

    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP_LIMIT.exists() and CGROUP_LIMIT.read_text().strip().isdigit():  # a container's
        machine = min(machine, int(CGROUP_LIMIT.read_text()))
    return machine // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _warn_about_unused_gpu() -> None:
    """Warn if training is about to run on the CPU of a machine that has an NVIDIA card."""
    was_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if was_hidden or not NVIDIA_DRIVER.exists():
        return
    problem = f"torch {torch.__version__} is a build without CUDA"
    if torch.version.cuda is not None:
        problem = f"torch {torch.__version__}, for CUDA {torch.version.cuda}, cannot use it"
        problem += ", or this job was given none"
    warn(
        f"TRAINING ON THE CPU, although this machine has an NVIDIA card: {problem}; install a "
        f"build of torch that fits the driver, or add --train.device=cpu if this is intended"
    )


def start_process_group(ranks: Ranks) -> None:
    """Connect the ranks, if there are several, and wait for all of them.

    Raises:
        UserError: if the other ranks cannot be reached.
    """
    if ranks.world_size == 1:
        return
    # Small decisions use gloo, which never waits for a GPU; gradients use NCCL.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, _, _ = next(dist.rendezvous("env://"))
        store = _fresh_store(store, ranks)
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size)
    except dist.DistError as error:
        raise UserError(
            f"the other ranks cannot be reached ({reason(error)}); check that every node runs "
            f"torchrun, and can reach the rendezvous endpoint's host and port"
        ) from error


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

    A second signal ends the process, but not within REPEATED_S of the first: torchrun and SLURM
    both pass on the same one.
    """
    received: list[int] = []
    first: list[float] = []

    def handle(number: int, _: Any) -> None:
        if first and time.monotonic() - first[0] > REPEATED_S:
            release_signals()
            os.kill(os.getpid(), number)
        first.append(time.monotonic())
        received.append(number)

    for number in SIGNALS:
        signal.signal(number, handle)
    return received


def release_signals() -> None:
    """Let SIGNALS end the process at once."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


# ---- Coordination --------------------------------------------------------------------------------


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


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Raise a UserError of any rank on all ranks, so that none waits for one that has exited.

    All ranks must enter the block. The first rank with an error counts.

    Raises:
        SharedError: with the rank in front of the message if it is not rank 0.
    """
    if not dist.is_initialized():
        yield
        return

    own: UserError | OSError | None = None
    try:
        yield
    except (UserError, OSError) as error:
        own = error
    if not max_over_ranks(own is not None):
        return

    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, describe(own) if own else None)
    rank = next(rank for rank, message in enumerate(messages) if message is not None)
    _raise_on_all_ranks(f"rank {rank}: {messages[rank]}" if rank else str(messages[0]), own)


def _raise_on_all_ranks(message: str, cause: Exception | None = None) -> NoReturn:
    """Print an error on rank 0, then raise it on all ranks.

    The others wait until it is printed, because torchrun ends all ranks once one of them has ended.
    """
    if dist.get_rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    barrier()
    raise SharedError(message) from cause


def check_same_on_all_ranks(
    config: Config, device: torch.device, fingerprints: dict[str, str], start: tuple[int, int]
) -> None:
    """Refuse ranks that differ, such as a node with another config, other data or other code.

    Args:
        config: the run; paths may differ.
        device: this rank's; its kind must be the same.
        fingerprints: of the token file of each split.
        start: the step to start from, and the step that was validated last. They differ if the
            output folder is not shared.

    Raises:
        SharedError: on all ranks, naming a rank that differs from rank 0, its host and the fact.
    """
    if not dist.is_initialized():
        return
    tree = config.model_dump()
    facts = describe_code() | {"device": device.type}
    facts |= {key: value_of(tree, key) for key in KEYS if key not in LOCAL_KEYS}
    facts |= {f"{split}.bin": fingerprint[:12] for split, fingerprint in fingerprints.items()}
    facts |= {"the step to start from": start[0], "the last validation at step": start[1]}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), facts))

    first_host, first_facts = everyone[0]
    for rank, (host, own_facts) in enumerate(everyone):
        for name, value in own_facts.items():
            expected = first_facts.get(name)
            is_known = name != "commit" or None not in (value, expected)
            if value != expected and is_known:
                _raise_on_all_ranks(
                    f"rank {rank} on {host} has {name} = {value!r}, rank 0 on {first_host} has "
                    f"{expected!r}; all nodes need the same command, code, versions and data, and "
                    f"train.out_dir on storage that they share"
                )


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
