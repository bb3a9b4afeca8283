"""Test train.py: learning, resuming, equal steps on any layout, refusals and non-finite losses."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data.batches import window_offsets
from runtime import checkpoint, distributed
from runtime.experiment import load_experiment
from runtime.files import locked
from runtime.metrics import RunLog
from tests.conftest import OPTIMIZERS, ROOT, newest_state, read_lines
from train import accumulate_gradient, hutchinson, summed_sampled_loss

Runner = Callable[..., None]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(
    ranks: int, *arguments: object, script: str = "train.py"
) -> subprocess.CompletedProcess:
    """Run a script on `ranks` processes and wait for its end."""
    command = [*TORCHRUN, f"--nproc_per_node={ranks}", "--", str(ROOT / script)]
    command += map(str, arguments)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def test_gradients_of_several_ranks_stay_in_the_buckets(
    experiment: Path, tiny_data: Path, first_of_two_ranks: distributed.Ranks
) -> None:
    """DDP keeps them only once, from the first step on, if they remain views of its buckets."""
    overrides = {"train.micro_batch_size": "2"}
    config = load_experiment(experiment, "sophia-g", overrides)
    tokens: dict[str, np.ndarray] = {}
    for split in ("train", "val"):
        tokens[split] = np.memmap(tiny_data / f"{split}.bin", "<u2", "r")
    run = train.build_run(config, first_of_two_ranks, torch.device("cpu"), tokens)

    def addresses() -> list[int]:
        return [p.grad.data_ptr() for p in run.model.parameters() if p.grad is not None]

    laid_out = addresses()
    assert len(laid_out) == len(list(run.model.parameters()))
    gradient = run.model.ln_f.weight.grad
    assert gradient is not None
    assert gradient.untyped_storage().nbytes() > gradient.nbytes  # a view of a bucket
    for step in range(3):
        train.train_step(run, step)
        assert addresses() == laid_out


@pytest.mark.parametrize("run", OPTIMIZERS)
def test_each_optimizer_learns(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    """Start at a uniform guess, ln 61 = 4.11, and end well below; the data allow about 2.2."""
    arguments = ["--train.max_steps=150", "--train.eval_interval=50", "--optimizer.lr=3e-3"]
    run_train(experiment, f"--run={run}", *arguments)
    folder = tmp_path / "out/tiny" / run

    losses = dict(read_lines(folder, "val_loss"))
    assert list(losses) == [0, 50, 100, 150]
    assert losses[0] == pytest.approx(math.log(61), abs=0.05)
    assert losses[150] < 3.3

    assert [step for step, _ in read_lines(folder, "loss")] == list(range(1, 151))
    estimated = [step for step, _ in read_lines(folder, "hessian_ms")]
    assert estimated == (list(range(1, 151, 3)) if run.startswith("sophia") else [])

    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "environment.json", "metrics.jsonl"}
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["tokens"] == 150 * 8 * 16
    assert last["tokens_per_second"] > 0
    if run.startswith("sophia"):
        assert 0 < last["unclipped"] <= 1


@pytest.mark.parametrize(
    ("run", "dtype"),
    [*((run, "float32") for run in OPTIMIZERS), ("sophia-g", "float16"), ("adamw", "bfloat16")],
)
def test_resumed_run_is_bit_identical(
    run: str,
    dtype: str,
    experiment: Path,
    run_train: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    """Stop by SIGTERM after step 7, between two checkpoints, after step 8 and after the last."""
    arguments = (experiment, f"--run={run}", f"--train.dtype={dtype}")
    run_train(*arguments, f"--train.out_dir={tmp_path / 'whole'}")
    train_step = train.train_step

    def stop_after(last: int) -> Callable:
        def step_and_signal(this: train.Run, step: int) -> dict:
            if step + 1 == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(this, step)

        return step_and_signal

    # Stop and resume three times, then let it finish.
    for stop in (7, 8, 12):
        monkeypatch.setattr(train, "train_step", stop_after(stop))
        with pytest.raises(SystemExit) as ended:
            run_train(*arguments, "--resume")
        assert ended.value.code == 128 + signal.SIGTERM
        assert f"stopped by a signal after step {stop}" in capsys.readouterr().out
    monkeypatch.setattr(train, "train_step", train_step)
    run_train(*arguments, "--resume")

    # It equals the run that was never stopped.
    whole, resumed = tmp_path / "whole/tiny" / run, tmp_path / "out/tiny" / run
    for key in ("loss", "val_loss", "grad_norm", "lr", "tokens"):
        assert read_lines(resumed, key) == read_lines(whole, key)
    expected, found = newest_state(whole)["model"], newest_state(resumed)["model"]
    for name, weight in expected.items():
        assert torch.equal(weight, found[name])

    run_train(*arguments, "--resume")
    assert "finished already" in capsys.readouterr().out


def test_log_lines_after_the_checkpoint_are_not_duplicated(
    experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    """Resume as after a kill: the log is ahead of the checkpoint, and its last line is torn."""
    run_train(experiment, "--run=lion", f"--train.out_dir={tmp_path / 'whole'}")
    run_train(experiment, "--run=lion")

    folder = tmp_path / "out/tiny/lion"
    (folder / "step_00000012.pt").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')
    run_train(experiment, "--run=lion", "--resume")

    for key in ("loss", "val_loss"):
        assert read_lines(folder, key) == read_lines(tmp_path / "whole/tiny/lion", key)


def test_missing_log_lines_are_reported(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    run_train(experiment, "--run=lion")
    folder = tmp_path / "out/tiny/lion"
    (folder / "step_00000012.pt").unlink()

    # Remove two steps from the log.
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    removed = ('{"step": 3,', '{"step": 5,')
    path.write_text("".join(line for line in lines if not line.startswith(removed)))

    run_train(experiment, "--run=lion", "--resume")
    assert "2 of the steps from 3 to 5 are missing" in capsys.readouterr().err


def one_step(run_train: Runner, experiment: Path, run: str, out: Path, *arguments: str) -> dict:
    """Train for one step and return the content of its checkpoint."""
    common = ["--train.max_steps=1", "--train.warmup_steps=0", f"--train.out_dir={out}"]
    run_train(experiment, f"--run={run}", *common, *arguments)
    return newest_state(out / "tiny" / run)


def assert_same_state(one: dict, other: dict) -> None:
    """Compare weights, momentum and Hessian estimate (or second moment), to float64 rounding."""
    for name, weight in one["model"].items():
        torch.testing.assert_close(other["model"][name], weight, rtol=1e-9, atol=1e-12)
    for index, state in one["optimizer"].items():
        assert any((value != 0).any() for value in state.values())
        for key, value in state.items():
            torch.testing.assert_close(other["optimizer"][index][key], value, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("run", OPTIMIZERS)
def test_step_does_not_depend_on_micro_batch_loss_chunk_or_ranks(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path, float64: None
) -> None:
    whole = one_step(run_train, experiment, run, tmp_path / "whole")
    parts = one_step(run_train, experiment, run, tmp_path / "parts", "--train.micro_batch_size=2")
    assert_same_state(whole, parts)

    # Two ranks, with a loss chunk of 24 of a micro-batch's 32 tokens.
    arguments = ["--train.max_steps=1", "--train.warmup_steps=0", "--train.micro_batch_size=2"]
    arguments += ["--train.loss_chunk=24", f"--train.out_dir={tmp_path / 'ranks'}"]
    done = torchrun(2, experiment, f"--run={run}", *arguments, script="tests/float64_train.py")
    assert done.returncode == 0, done.stderr
    assert_same_state(whole, newest_state(tmp_path / "ranks/tiny" / run))

    # The logged losses agree too, also that of the validation windows, which two ranks share.
    for key in ("loss", "val_loss"):
        expected = dict(read_lines(tmp_path / "whole/tiny" / run, key))
        for name in ("parts", "ranks"):
            found = dict(read_lines(tmp_path / name / "tiny" / run, key))
            assert found == pytest.approx(expected, rel=1e-12)


def test_all_optimizers_share_batches_and_initial_weights(
    experiment: Path, run_train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[np.ndarray]] = {run: [] for run in OPTIMIZERS}

    for run in OPTIMIZERS:

        def record(this, criterion, batches, count, run=run):
            batches = list(batches)
            if criterion is train.summed_loss:
                seen[run] += [x.numpy().copy() for x, _ in batches]
            return accumulate_gradient(this, criterion, iter(batches), count)

        monkeypatch.setattr("train.accumulate_gradient", record)
        run_train(experiment, f"--run={run}", "--train.max_steps=4")
        assert len(seen[run]) == 4
        assert all((a == b).all() for a, b in zip(seen[run], seen["adamw"], strict=True))

    first = {read_lines(tmp_path / "out/tiny" / run, "val_loss")[0] for run in OPTIMIZERS}
    assert len(first) == 1


def test_adamw_matches_a_plain_pytorch_loop(
    experiment: Path, run_train: Runner, tmp_path: Path, float64: None
) -> None:
    """Compare with the textbook: loss, backward, clip, AdamW, cosine."""
    run_train(experiment, "--run=adamw", "--train.micro_batch_size=4", "--train.grad_clip=0.5")

    # The model and the optimizer.
    config = load_experiment(experiment, "adamw", {"train.grad_clip": "0.5"})
    torch.manual_seed(config.train.seed)
    model = train.GPT(config.model)
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and not name.startswith("w")]
    others = [p for name, p in named if p.ndim != 2 or name.startswith("w")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False)

    # The loop.
    tokens = np.fromfile(Path(config.data.path) / "train.bin", "<u2").astype(np.int64)
    losses = []
    for step in range(12):
        offsets = window_offsets(config.train.seed, step, len(tokens), 16, 8)
        x = torch.tensor(np.stack([tokens[i : i + 16] for i in offsets]))
        y = torch.tensor(np.stack([tokens[i + 1 : i + 17] for i in offsets]))

        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)

        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 10))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ((step + 1) / 3 if step < 2 else cosine)
        optimizer.step()
        losses.append(loss.item())

    logged = [loss for _, loss in read_lines(tmp_path / "out/tiny/adamw", "loss")]
    assert logged == pytest.approx(losses, rel=1e-10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("run", ["adamw", "sophia-g", "sophia-h"])
def test_16_bit_training_stays_close_to_fp32(
    run: str, dtype: str, experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    run_train(experiment, f"--run={run}", f"--train.out_dir={tmp_path / 'fp32'}")
    run_train(experiment, f"--run={run}", f"--train.dtype={dtype}")

    _, expected = read_lines(tmp_path / "fp32/tiny" / run, "val_loss")[-1]
    _, found = read_lines(tmp_path / "out/tiny" / run, "val_loss")[-1]
    assert found == pytest.approx(expected, abs=0.05)
    saved = newest_state(tmp_path / "out/tiny" / run)
    assert {weight.dtype for weight in saved["model"].values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("run", OPTIMIZERS)
def test_bfloat16_stays_close_to_fp32_for_200_steps(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    """At the width from which on "auto" chooses bfloat16, on a CPU that has AMX."""
    arguments = [f"--run={run}", "--model.n_embd=192", "--train.max_steps=200"]
    arguments.append("--optimizer.lr=1e-3" if run == "adamw" else "--optimizer.lr=3e-4")
    arguments += ["--train.eval_interval=50", "--train.warmup_steps=20"]
    losses = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        run_train(experiment, *arguments, f"--train.dtype={dtype}", f"--train.out_dir={out}")
        losses[dtype] = read_lines(out / "tiny" / run, "val_loss")

    for (step, fp32), (_, bf16) in zip(losses["float32"], losses["bfloat16"], strict=True):
        assert bf16 == pytest.approx(fp32, abs=0.002), step
    assert losses["float32"][-1][1] < losses["float32"][0][1] - 1


def pretend_amx(monkeypatch: pytest.MonkeyPatch, has_amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})


def stored_config(run_dir: Path) -> dict:
    return json.loads((run_dir / "config.json").read_text())


@pytest.mark.parametrize(
    ("has_amx", "n_embd", "dtype"),
    [(True, 192, "bfloat16"), (True, 128, "float32"), (False, 192, "float32")],
)
def test_auto_is_bfloat16_where_that_is_fast(
    has_amx: bool,
    n_embd: int,
    dtype: str,
    experiment: Path,
    run_train: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    """The choice is printed and stored as if it had been written in the file."""
    pretend_amx(monkeypatch, has_amx)
    arguments = ("--run=adamw", "--train.dtype=auto", "--train.compile=auto")
    run_train(experiment, *arguments, f"--model.n_embd={n_embd}")
    stored = stored_config(tmp_path / "out/tiny/adamw")
    assert stored["train"]["dtype"] == dtype
    assert stored["train"]["compile"] is False  # twelve steps
    assert f"number format     {dtype}, not compiled\n" in capsys.readouterr().out


def test_auto_compiles_long_runs(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    for steps, is_long in ((12, False), (10**9, True)):
        keys = {"train.compile": "auto", "train.max_steps": str(steps)}
        config = load_experiment(experiment, "sophia-g", keys)
        assert distributed.resolve_number_format(config, device).train.compile is is_long

    monkeypatch.setattr(distributed.shutil, "which", lambda _: None)  # no compiler
    assert distributed.resolve_number_format(config, device).train.compile is False


def test_resumed_run_keeps_what_auto_meant_at_its_start(
    experiment: Path, run_train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start on a CPU without AMX and continue on one with it."""
    arguments = (experiment, "--run=sophia-g", "--train.dtype=auto", "--model.n_embd=192")
    folder = tmp_path / "out/tiny/sophia-g"
    pretend_amx(monkeypatch, False)
    run_train(*arguments)
    whole = read_lines(folder, "val_loss")

    (folder / "step_00000012.pt").unlink()
    pretend_amx(monkeypatch, True)
    run_train(*arguments, "--resume")
    assert read_lines(folder, "val_loss") == whole
    assert stored_config(folder)["train"]["dtype"] == "float32"


def test_newest_and_best_checkpoints_are_kept(
    experiment: Path, run_train: Runner, tmp_path: Path, monkeypatch
) -> None:
    losses = iter([9.0, 5.0, 3.0, 6.0, 7.0, 8.0, 8.5])

    def fake_validation(run: train.Run, progress: train.Progress, log: object) -> None:
        progress.val_loss, progress.validated_step = next(losses), progress.step

    monkeypatch.setattr(train, "validate", fake_validation)
    run_train(experiment, "--run=adamw", "--train.checkpoint_interval=2", "--train.eval_interval=2")
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "out/tiny/adamw")]
    assert names == ["step_00000004.pt", "step_00000010.pt", "step_00000012.pt"]


@pytest.mark.parametrize("killed_at", [4, 8, 12])
def test_run_killed_in_a_validation_loses_no_step(
    killed_at: int,
    experiment: Path,
    run_train: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = ("--train.checkpoint_interval=4", "--train.keep_checkpoints=1")
    run_train(experiment, "--run=adamw", *keys, "--name=whole")
    folder = tmp_path / "out/tiny"

    validate = train.validate

    def killed(run: train.Run, progress: train.Progress, log: RunLog | None) -> None:
        if progress.step == killed_at:
            raise KeyboardInterrupt
        validate(run, progress, log)

    monkeypatch.setattr(train, "validate", killed)
    with pytest.raises(SystemExit):
        run_train(experiment, "--run=adamw", *keys, "--name=parts")
    monkeypatch.undo()
    assert checkpoint.path_of(folder / "parts", killed_at).exists()

    run_train(experiment, "--run=adamw", *keys, "--name=parts", "--resume")
    whole, parts = newest_state(folder / "whole"), newest_state(folder / "parts")
    for key in ("step", "validated_step", "best_step", "best_loss"):
        assert parts[key] == whole[key]
    assert parts["best_step"] == parts["validated_step"] == 12
    for key in ("loss", "val_loss"):
        assert read_lines(folder / "parts", key) == read_lines(folder / "whole", key)


def refuse(run_train: Runner, capsys, *arguments: object) -> str:
    """Run train.py, which must end with status 2 and one error line, and return that line.

    Warnings may come before it.
    """
    with pytest.raises(SystemExit) as ended:
        run_train(*arguments)
    assert ended.value.code == 2
    *warnings, error = capsys.readouterr().err.splitlines(keepends=True)
    assert all(line.startswith("warning: ") for line in warnings)
    assert error.startswith("error: ")
    return error


def test_existing_run_is_refused_and_unchanged(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    arguments = (experiment, "--run=adamw", "--train.max_steps=5")
    run_train(*arguments)
    folder = tmp_path / "out/tiny/adamw"
    before = {path: path.read_bytes() for path in folder.iterdir()}

    error = refuse(run_train, capsys, *arguments)
    assert "exists; add --resume" in error
    error = refuse(run_train, capsys, *arguments, "--resume", "--optimizer.lr=2e-2")
    assert "was started with optimizer.lr = 0.01, now it is 0.02; set it back" in error
    error = refuse(run_train, capsys, experiment, "--run=adamw", "--train.max_steps=9", "--resume")
    assert "train.max_steps = 5" in error

    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_resume_falls_back_to_an_older_checkpoint(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    run_train(experiment, "--run=adamw", f"--train.out_dir={tmp_path / 'whole'}")
    run_train(experiment, "--run=adamw")
    folder = tmp_path / "out/tiny/adamw"
    capsys.readouterr()

    # Damage only the newest.
    newest = folder / "step_00000012.pt"
    for content in (b"no checkpoint", b""):
        newest.write_bytes(content)
        run_train(experiment, "--run=adamw", "--resume")
        assert f"warning: {newest}: unreadable" in capsys.readouterr().err
        assert read_lines(folder, "loss") == read_lines(tmp_path / "whole/tiny/adamw", "loss")

    # Damage all of them.
    for path in checkpoint.checkpoints(folder):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit):
        run_train(experiment, "--run=adamw", "--resume")
    assert "checkpoints can be read; start again" in capsys.readouterr().err


def poison(
    monkeypatch: pytest.MonkeyPatch, steps: set[int], criterion: Callable, value: float
) -> None:
    """Multiply the loss of these steps by NaN, or by infinity while the gradient stays finite."""
    train_step = train.train_step
    current_step = 0

    def remember(run: train.Run, step: int) -> dict:
        nonlocal current_step
        current_step = step + 1
        return train_step(run, step)

    def poisoned(run: train.Run, used: Callable, batches: Iterator, count: int) -> torch.Tensor:
        loss = accumulate_gradient(run, used, batches, count)
        if used is not criterion or current_step not in steps:
            return loss
        if math.isnan(value):
            next(run.model.parameters()).grad.mul_(value)  # type: ignore[union-attr]
        return loss * value

    monkeypatch.setattr(train, "train_step", remember)
    monkeypatch.setattr("train.accumulate_gradient", poisoned)


@pytest.mark.parametrize("run", OPTIMIZERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_step_is_skipped(
    run: str,
    value: float,
    experiment: Path,
    run_train: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison(monkeypatch, {5, 6}, train.summed_loss, value)
    train_step = train.train_step
    states: dict[int, list[torch.Tensor]] = {}

    def remember(this: train.Run, step: int) -> dict:
        record = train_step(this, step)
        momenta = [state["exp_avg"] for state in this.optimizer.state.values()]
        tensors = [*this.model.parameters(), *momenta]
        states[step + 1] = [tensor.detach().clone() for tensor in tensors]
        return record

    def unchanged(before: int, after: int) -> bool:
        pairs = zip(states[before], states[after], strict=True)
        return all(torch.equal(one, other) for one, other in pairs)

    monkeypatch.setattr(train, "train_step", remember)
    run_train(experiment, f"--run={run}", "--train.keep_checkpoints=12")

    # Steps 5 and 6 change nothing and are not saved.
    assert unchanged(4, 5)
    assert unchanged(4, 6)
    assert not unchanged(6, 7)
    folder = tmp_path / "out/tiny" / run
    names = [path.name for path in checkpoint.checkpoints(folder)]
    assert names == ["step_00000010.pt", "step_00000012.pt"]

    # They are logged as skipped.
    assert [step for step, _ in read_lines(folder, "skipped")] == [5, 6]
    losses = dict(read_lines(folder, "loss"))
    assert losses[5] is None
    assert math.isfinite(losses[12])


def test_non_finite_weights_are_never_saved(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make the weights NaN after step 7, whose own loss and gradient are finite."""
    train_step = train.train_step

    def ruin(run: train.Run, step: int) -> dict:
        record = train_step(run, step)
        if step + 1 == 7:
            with torch.no_grad():
                run.model.ln_f.weight.fill_(math.nan)
        return record

    monkeypatch.setattr(train, "train_step", ruin)
    arguments = ("--run=adamw", "--train.checkpoint_interval=1", "--train.max_bad_steps=4")
    error = refuse(run_train, capsys, experiment, *arguments)

    assert "the checkpoints are intact" in error
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "out/tiny/adamw")]
    assert names[-2:] == ["step_00000005.pt", "step_00000006.pt"]


def test_consecutive_non_finite_steps_stop_the_run(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(7, 13)), train.summed_loss, math.nan)
    error = refuse(run_train, capsys, experiment, "--run=adamw", "--train.max_bad_steps=3")
    assert "not finite in the last 3 steps, up to step 9. These updates were skipped" in error

    saved = newest_state(tmp_path / "out/tiny/adamw")
    assert saved["step"] == 5
    assert all(weight.isfinite().all() for weight in saved["model"].values())


@pytest.mark.parametrize("run", ["sophia-g", "sophia-h"])
def test_non_finite_hessian_estimate_is_skipped(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if run == "sophia-g":
        poison(monkeypatch, {4}, summed_sampled_loss, math.nan)
    else:

        def poisoned(this: train.Run, batches: Iterator, step: int) -> dict:
            estimates = hutchinson(this, batches, step)
            next(iter(estimates.values())).mul_(math.nan if step == 3 else 1)
            return estimates

        monkeypatch.setattr("train.hutchinson", poisoned)

    arguments = ["--train.checkpoint_interval=1", "--train.keep_checkpoints=12"]
    run_train(experiment, f"--run={run}", *arguments)
    folder = tmp_path / "out/tiny" / run
    three, four, seven = (
        checkpoint.load(checkpoint.path_of(folder, step))["optimizer"] for step in (3, 4, 7)
    )

    # The estimate of step 4 is skipped, that of step 7 is used.
    changed = []
    for index in three:
        assert torch.equal(three[index]["hessian"], four[index]["hessian"])
        assert seven[index]["hessian"].isfinite().all()
        changed.append(not torch.equal(four[index]["hessian"], seven[index]["hessian"]))
    assert any(changed)


def test_bad_data_and_indivisible_batches_are_refused(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    def error(*arguments: str) -> str:
        return refuse(run_train, capsys, experiment, "--run=sophia-g", *arguments)

    assert "no such file; make it" in error("--data.path=nowhere")
    assert "shorter than a window" in error("--model.block_size=1000")
    assert "but model.vocab_size is 50" in error("--model.vocab_size=50")
    assert "but model.vocab_size is 50" in error("--model.vocab_size=50", "--dry-run")
    hint = "use train.batch_size 6 or 9, or train.micro_batch_size 2"
    assert hint in error("--train.micro_batch_size=3")
    assert not (tmp_path / "out").exists()


def test_torchrun_prints_one_error_line(experiment: Path, tmp_path: Path) -> None:
    done = torchrun(3, experiment, "--run=adamw")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "8 × 3 ranks" in lines[0]
    assert not (tmp_path / "out").exists()


def test_torchrun_saves_on_sigterm_and_resumes_on_one_rank(
    experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    arguments = [str(experiment), "--run=sophia-g"]
    arguments += ["--train.max_steps=400", "--train.checkpoint_interval=400"]
    command = [*TORCHRUN, "--nproc_per_node=2", "--", str(ROOT / "train.py")]
    command += [*arguments, "--train.micro_batch_size=4"]
    pipe = subprocess.PIPE

    # Stop on two ranks after step 20.
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 20/"):
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert "stopped by a signal after step" in output
    folder = tmp_path / "out/tiny/sophia-g"
    (saved,) = checkpoint.checkpoints(folder)
    step = checkpoint.load(saved)["step"]
    assert 20 <= step < 400
    assert [s for s, _ in read_lines(folder, "loss")] == list(range(1, step + 1))

    # Continue on one.
    run_train(*arguments, "--resume")
    assert [s for s, _ in read_lines(folder, "loss")] == list(range(1, 401))

    run_train(*arguments, f"--train.out_dir={tmp_path / 'whole'}")
    whole = dict(read_lines(tmp_path / "whole/tiny/sophia-g", "val_loss"))
    # Sums in a different order: only rounding, amplified by 400 steps of sign-like updates.
    assert dict(read_lines(folder, "val_loss")) == pytest.approx(whole, abs=0.02)


# ---- What a user sees ----------------------------------------------------------------------------


def test_run_says_where_it_starts_and_where_its_results_are(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "out/tiny/adamw"
    run_train(experiment, "--run=adamw", "--resume")
    output = capsys.readouterr().out
    assert "start             at step 0" in output
    assert f"finished; results are in {folder}" in output
    assert f"python scripts/compare.py {folder.parent}" in output

    (folder / "step_00000012.pt").unlink()
    run_train(experiment, "--run=adamw", "--resume")
    start = f"start             after step 10, from {folder}/step_00000010.pt"
    assert start in capsys.readouterr().out


def test_second_trainer_in_a_folder_prints_one_line(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "out/tiny/adamw"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    with locked(folder):
        error = refuse(run_train, capsys, experiment, "--run=adamw", "--resume")
    assert "another process writes here" in error
    assert "start" not in capsys.readouterr().out


def test_cpu_build_on_a_machine_with_a_gpu_is_loud(
    experiment: Path, run_train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "version").touch()
    monkeypatch.setattr(distributed, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_train(experiment, "--run=adamw", "--train.device=auto", "--dry-run")
    assert "warning: TRAINING ON THE CPU, although this machine has" in capsys.readouterr().err
    run_train(experiment, "--run=adamw", "--train.device=cpu", "--dry-run")
    assert capsys.readouterr().err == ""


def test_bar_on_a_terminal_has_the_numbers(experiment: Path) -> None:
    """Run on a pseudo-terminal, 160 columns wide."""
    command = [sys.executable, str(ROOT / "train.py"), str(experiment), "--run=adamw"]
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
    process = subprocess.Popen(command, stdout=other_end, stderr=other_end)
    os.close(other_end)
    written = b""
    with suppress(OSError):  # the end of a pseudo-terminal
        while chunk := os.read(terminal, 4096):
            written += chunk
    assert process.wait() == 0

    text = written.decode()
    bars = re.findall(r"adamw +\d+/12 [^\r\n]*", text)
    assert re.search(
        r"12/12 .*loss \d\.\d+ .*lr \d.* val \d\.\d+ .*tokens/s .*left 00:00:00", bars[-1]
    )
    # Lines stay whole above it.
    for step in range(1, 13):
        assert re.search(rf"[\r\n]step {step}/12  loss [^\r\n]*left [0-9:]+\r\n", text), step


def test_stored_data_path_works_from_any_folder(
    run_train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Look for relative data in the repository if it is not in the current folder."""
    keys = {"data.path": "data/stdlib"}
    config = load_experiment(ROOT / "configs/quickstart.toml", "adamw", keys)
    monkeypatch.chdir(tmp_path)
    assert config.data_folder == ROOT / "data/stdlib"
    (tmp_path / "data/stdlib").mkdir(parents=True)
    assert config.data_folder == Path("data/stdlib")

    # The shell does not expand ~ in --key=~/folder.
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"data.path": "~/tokens", "train.out_dir": "~/out"}
    config = load_experiment(ROOT / "configs/quickstart.toml", "adamw", paths)
    assert config.data_folder == tmp_path / "tokens"
    assert config.run_dir == tmp_path / "out/quickstart/adamw"

    # The advice for missing data names the script that makes this kind of data.
    arguments = (ROOT / "configs/quickstart.toml", "--run=adamw", "--train.out_dir=out")
    error = refuse(run_train, capsys, *arguments, f"--data.path={tmp_path}/none")
    assert f"python {ROOT}/data/stdlib/prepare.py --bpe --out {tmp_path}/none" in error
