"""Check train.py on a GPU that computes nothing: waits, compilations, launches, exchanges, memory.

    bash tests/cuda_without_gpu/run.sh python tests/cuda_without_gpu/check.py
    bash tests/cuda_without_gpu/run.sh python tests/cuda_without_gpu/check.py --only eager

Every case is a process of its own (count_steps.py). What has been counted for the same code is not
counted again, so an interrupted check goes on where it was. Compiled cases take minutes each on one
core. Prints a line per case and a table; exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from runtime.cli import Parser, number, run_main
from runtime.files import write_json
from runtime.run_folder import describe_commit
from tests.cuda_without_gpu.stand_in import ROOT

HERE = Path(__file__).resolve().parent
OPTIMIZERS = ("adamw", "lion", "sophia-g", "sophia-h")
SIZES = ("30m", "125m", "355m", "540m", "770m", "1.5b")
CODE = ("train.py", "model.py", "sophia.py", "optimizers", "runtime", "configs", "data")

# Bytes that a run can use of cards that are sold as 24, 40 and 80 GB, after CUDA's context and
# NCCL: an estimate, half a GB less than the smallest total that such cards report.
USABLE = {24: 24.9e9, 40: 41.5e9, 80: 83.5e9}
MARGIN = 0.95  # the share of it that a run may fill
TOLERANCE = 0.10  # between --dry-run's estimate and the counted peak


@dataclass(frozen=True)
class Case:
    """A run to count, with what --ranks and the config's keys are to be."""

    group: str
    size: str
    run: str
    ranks: int = 1
    capability: int = 80
    card: int = 0  # the card's GB that it must fit; 0: no limit
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        arguments = [f"configs/gpt2_{self.size}.toml", f"--run={self.run}", f"--ranks={self.ranks}"]
        return arguments + [f"--{key}={value}" for key, value in self.keys.items()]

    @property
    def name(self) -> str:
        card = f" in {self.card} GB" if self.card else ""
        return f"{self.group}: sm_{self.capability} {' '.join(self.command)}{card}"


# ---- Cases ---------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """Yield all cases, quick ones first."""
    eager = {"train.compile": "false"}
    for size in SIZES:
        for run in OPTIMIZERS:
            for ranks in (1, 8):
                yield Case("eager", size, run, ranks, keys=eager | small_batch(size, run, ranks))
    for dtype in ("float32", "float16"):
        for run in OPTIMIZERS:
            keys = eager | small_batch("125m", run, 1) | {"train.dtype": dtype}
            yield Case("eager", "125m", run, keys=keys)
    for key, value in (("train.loss_chunk", "8192"), ("train.shard_optimizer", "true")):
        for run in ("adamw", "sophia-g"):
            keys = eager | small_batch("770m", run, 8) | {key: value}
            yield Case("eager", "770m", run, 8, keys=keys)

    for capability in (80, 86, 90):
        for run in OPTIMIZERS:
            keys = small_batch("125m", run, 1)
            yield Case("compiled", "125m", run, capability=capability, keys=keys)
    for dtype in ("float32", "float16"):
        keys = small_batch("125m", "sophia-g", 1) | {"train.dtype": dtype}
        yield Case("compiled", "125m", "sophia-g", keys=keys)
    for key, value in (("train.loss_chunk", "8192"), ("train.shard_optimizer", "true")):
        keys = small_batch("125m", "sophia-g", 8) | {key: value}
        yield Case("compiled", "125m", "sophia-g", 8, keys=keys)

    # Sophia-G needs no more memory than AdamW and no less than Lion. Sophia-H's products are
    # checked on the smallest card.
    for size in SIZES:
        for card, micro in promises(size):
            keys = {"train.micro_batch_size": str(micro)}
            yield Case("card", size, "sophia-g", 8, card=card, keys=keys)
            if card == max(smallest_card_for_products(size), min(promises(size))[0]):
                yield Case("card", size, "sophia-h", 8, card=card, keys=keys)


def small_batch(size: str, run: str, ranks: int) -> dict[str, str]:
    """Return keys for steps of two micro-batches, and estimates of one.

    The micro-batch is the one that the experiment's file names.
    """
    text = (ROOT / f"configs/gpt2_{size}.toml").read_text(encoding="utf-8")
    found = re.search(r"^micro_batch_size = (\d+)", text, re.MULTILINE)
    assert found is not None
    sequences = int(found[1]) * ranks
    keys = {"train.batch_size": str(2 * sequences)}
    if run.startswith("sophia"):
        estimated = min(sequences, 32) if run == "sophia-h" else sequences
        keys["optimizer.hessian_batch_size"] = str(estimated)
    return keys


def promises(size: str) -> list[tuple[int, int]]:
    """Return (GB of the card, micro-batch) of the comments in an experiment's file."""
    text = (ROOT / f"configs/gpt2_{size}.toml").read_text(encoding="utf-8")
    found = re.findall(r"(\d+) fits? (\d+) GB", text)
    return [(int(card), int(micro)) for micro, card in found]


def smallest_card_for_products(size: str) -> int:
    """Return the GB of the smallest card on which Sophia-H is said to run."""
    text = (ROOT / f"configs/gpt2_{size}.toml").read_text(encoding="utf-8")
    found = re.search(r"Sophia-H needs (\d+) GB", text)
    return int(found[1]) if found else 0


# ---- Counting ------------------------------------------------------------------------------------


def count(case: Case, folder: Path) -> dict[str, Any]:
    """Run a case in a process of its own and return what count_steps.py prints.

    {"error": last lines} if it fails.
    """
    path = folder / f"{hashlib.sha256(f'{case} {code_digest()}'.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))

    gigabytes = USABLE[case.card] / 1e9 if case.card else 400
    environment = os.environ | {
        "STAND_IN_SM": str(case.capability),
        "STAND_IN_GB": str(gigabytes),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "count_steps.py"), *case.command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"error": "\n".join(done.stderr.splitlines()[-5:])}
    write_json(path, json.loads(lines[-1]))
    return json.loads(lines[-1])


@functools.cache
def code_digest() -> str:
    """Return a digest of all that the counts depend on, except for the case."""
    digest = hashlib.sha256(f"{torch.__version__} {USABLE}".encode())
    for name in CODE:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(path.glob("**/*.*"))
        for file in files:
            if file.suffix in (".py", ".toml"):
                digest.update(file.read_bytes())
    for file in (HERE / "count_steps.py", HERE / "stand_in.py", *sorted(HERE.glob("stand_in/*"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()


# ---- Checks --------------------------------------------------------------------------------------


def failures(case: Case, counted: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a case."""
    if "error" in counted:
        yield counted["error"]
        return
    steps, float16 = counted["steps"], counted["dtype"] == "float16"
    plain, with_estimate = steps[-1], steps[-3]

    for name, step in (("step", plain), ("step with estimate", with_estimate)):
        waits = sum(step["waits"].values())
        if waits and not float16:
            yield f"a {name} waits for the device: {step['waits']}"

    if steps[-1]["graphs"] != steps[1]["graphs"]:
        yield f"compiled again after the first steps: {[step['graphs'] for step in steps]} graphs"

    launches = plain["kernels"] + plain["triton"] + plain["gemms"]
    bound = most_launches(case, counted)
    if launches > bound:
        yield f"{launches} launches per step, more than {bound}"

    # One exchange of the gradient, and one number: the loss.
    if case.ranks > 1:
        exchanged = plain["all_reduced_bytes"] - 4
        if exchanged != 4 * counted["parameters"]:
            yield f"{exchanged} bytes exchanged per step, instead of {4 * counted['parameters']}"

    peak, estimated = peak_bytes(counted), counted["fixed_bytes"] + counted["activation_bytes"]
    if abs(estimated / peak - 1) > TOLERANCE:
        yield f"--dry-run says {estimated / 1e9:.1f} GB, counted {peak / 1e9:.1f} GB"
    if case.card and peak > MARGIN * USABLE[case.card]:
        yield f"{peak / 1e9:.1f} GB of a card with {case.card} GB"


def most_launches(case: Case, counted: dict[str, Any]) -> int:
    """Return a bound on the launches of a step.

    It has launches per layer and micro-batch, per micro-batch, and per layer. It is 3 to 45 % above
    what was counted in bfloat16 at commit 3b4f549.
    """
    both, per_micro_batch, per_layer = (46, 40, 20) if counted["compile"] else (45, 90, 40)
    layers = counted["layers"]
    if counted["loss_chunk"]:
        per_micro_batch += 30 * counted["micro_batch_size"] * 1024 // counted["loss_chunk"]
    return counted["micro_batches"] * (layers * both + per_micro_batch) + per_layer * layers


def peak_bytes(counted: dict[str, Any]) -> int:
    """Return the peak memory of the start, the steps and the estimates."""
    peaks = [max(step["peak"], step["estimate_peak"]) for step in counted["steps"]]
    return max(counted["build_peak"], *peaks)


# ---- The whole trainer ---------------------------------------------------------------------------


def check_resume_on_a_full_gpu(folder: Path) -> list[str]:
    """Make a checkpoint on the CPU and resume it on a GPU that is too small for it."""
    make_tokens(folder)
    command = [sys.executable, "train.py", "configs/gpt2_30m.toml", "--run=adamw"]
    command += [f"--data.path={folder}", f"--train.out_dir={folder / 'runs'}", "--model.n_layer=2"]
    command += ["--model.block_size=16", "--train.compile=false", "--train.dtype=float32"]
    command += ["--train.batch_size=2", "--train.micro_batch_size=2", "--train.warmup_steps=1"]
    command += ["--train.eval_windows=1", "--train.checkpoint_interval=2"]
    shutil.rmtree(folder / "runs", ignore_errors=True)
    started = [*command, "--train.device=cpu", "--train.max_steps=4"]
    subprocess.run(started, cwd=ROOT, check=True, capture_output=True)
    checkpoints = sorted((folder / "runs").glob("**/*.pt"))
    checkpoints.pop().unlink()  # the last: a finished run does not resume

    resumed = [*command, "--train.device=cuda", "--train.max_steps=4", "--resume"]
    small = os.environ | {"STAND_IN_GB": "0.15"}
    done = subprocess.run(resumed, cwd=ROOT, env=small, capture_output=True, text=True)

    problems = []
    if done.returncode != 2 or "out of memory" not in done.stderr:
        problems.append(f"status {done.returncode}, no word of memory: {done.stderr[-300:]}")
    if "not a checkpoint" in done.stderr or "Traceback" in done.stderr:
        problems.append(f"a checkpoint is blamed, or a traceback: {done.stderr[-300:]}")
    if sorted((folder / "runs").glob("**/*.pt")) != checkpoints:
        problems.append("the checkpoints have changed")
    return problems


def check_two_ranks(folder: Path) -> list[str]:
    """Train on two ranks with torchrun, from the start through validation to the end."""
    make_tokens(folder)
    command = [sys.executable, "scripts/torchrun.py", "--standalone", "--nproc_per_node=2", "--"]
    command += ["train.py", "configs/gpt2_30m.toml", "--run=sophia-g", "--train.compile=false"]
    command += [f"--data.path={folder}", f"--train.out_dir={folder / 'ranks'}"]
    command += ["--train.batch_size=8", "--train.micro_batch_size=2", "--train.warmup_steps=1"]
    command += ["--optimizer.hessian_batch_size=4", "--train.eval_windows=4"]
    command += ["--train.max_steps=12", "--train.eval_interval=6"]
    shutil.rmtree(folder / "ranks", ignore_errors=True)
    environment = os.environ | {"STAND_IN_DEVICES": "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode or "step 12/12  validation loss" not in done.stdout:
        return [f"status {done.returncode}: {done.stdout[-200:]} {done.stderr[-300:]}"]
    return []


def make_tokens(folder: Path) -> None:
    for split in ("train", "val"):
        tokens = np.random.default_rng(0).integers(50256, size=100_000)
        tokens.astype("<u2").tofile(folder / f"{split}.bin")


# ---- Main ----------------------------------------------------------------------------------------


def main() -> None:
    arguments = make_parser().parse_args()
    folder = Path(os.environ["STAND_IN"]).parent.parent / "counts"
    folder.mkdir(exist_ok=True)
    chosen = [case for case in cases() if arguments.only in (None, case.group)]

    failed = 0
    results = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        counts = pool.map(lambda case: count(case, folder), chosen)
        for case, counted in zip(chosen, counts, strict=True):
            problems = list(failures(case, counted))
            failed += bool(problems)
            print(f"{'FAILED' if problems else 'ok':6} {case.name}", flush=True)
            for problem in problems:
                print(f"       {problem}", flush=True)
            if "error" not in counted:
                results.append(summary(case, counted))

    if arguments.only in (None, "trainer"):
        for check in (check_resume_on_a_full_gpu, check_two_ranks):
            problems = check(folder)
            failed += bool(problems)
            print(f"{'FAILED' if problems else 'ok':6} trainer: {check.__doc__}", flush=True)
            for problem in problems:
                print(f"       {problem}", flush=True)

    print_table(results)
    if arguments.json:
        write_json(arguments.json, {"code": describe_commit(), "rows": results})
        print(f"\nwrote {arguments.json}")
    if failed:
        sys.exit(f"{failed} cases failed")


def summary(case: Case, counted: dict[str, Any]) -> dict[str, Any]:
    """Return what the table shows of a case."""
    plain = counted["steps"][-1]
    keys = ("dtype", "compile", "micro_batch_size", "hessian_micro_batch_size", "micro_batches")
    result = {"group": case.group, "size": case.size, "run": case.run, "ranks": case.ranks}
    result |= {"capability": case.capability, "card": case.card}
    result |= {key: counted[key] for key in (*keys, "loss_chunk", "shard_optimizer")}
    result |= {key: plain[key] for key in ("kernels", "triton", "gemms", "all_reduced_bytes")}
    result["graphs"] = plain["graphs"]
    result["build_peak"] = counted["build_peak"]
    result["step_peak"] = max(step["peak"] for step in counted["steps"])
    result["estimate_peak"] = max(step["estimate_peak"] for step in counted["steps"])
    result["reserved"] = max(step["reserved"] for step in counted["steps"])
    result["dry_run"] = counted["fixed_bytes"] + counted["activation_bytes"]
    result["seconds"] = counted["seconds"]
    return result


def print_table(results: list[dict[str, Any]]) -> None:
    print("\n| run | GPU | ranks | | micro-batch | launches | step | estimate | --dry-run |")
    print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for r in results:
        kind = "compiled" if r["compile"] else "eager"
        kind += f", {r['dtype']}" if r["dtype"] != "bfloat16" else ""
        kind += f", loss_chunk {r['loss_chunk']}" if r["loss_chunk"] else ""
        kind += ", sharded" if r["shard_optimizer"] else ""
        gpu = f"sm_{r['capability']}" + (f", {r['card']} GB" if r["card"] else "")
        launches = (r["kernels"] + r["triton"] + r["gemms"]) / r["micro_batches"]
        estimate = f"{r['estimate_peak'] / 1e9:.1f} GB" if r["estimate_peak"] else ""
        print(
            f"| {r['size']} {r['run']} | {gpu} | {r['ranks']} | {kind} | {r['micro_batch_size']} "
            f"| {launches:.0f} | {r['step_peak'] / 1e9:.1f} GB | {estimate} "
            f"| {r['dry_run'] / 1e9:.1f} GB |"
        )


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    groups = ("eager", "compiled", "card", "trainer")
    parser.add_argument("--only", choices=groups, help="check only this group of cases")
    jobs = "processes at a time"
    parser.add_argument("--jobs", type=number(int, 1), default=os.cpu_count(), help=jobs)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to a file")
    return parser


if __name__ == "__main__":
    run_main(main)
