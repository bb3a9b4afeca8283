from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data.batches import window_offsets
from runtime import checkpoint
from runtime.experiment import load_experiment
from step import accumulate_gradient, hutchinson, learning_rate, summed_sampled_loss
from tests.conftest import OPTIMIZERS, ROOT, read_lines

Runner = Callable[..., None]


def torchrun(ranks: int, *arguments: object, script: str = "train.py") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, ROOT / script, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


def test_learning_rate_warms_up_and_decays_by_a_cosine(experiment: Path) -> None:
    config = load_experiment(experiment, "adamw", {"train.max_steps": "100", "train.warmup_steps": "10"})
    rates = [learning_rate(config, step) / config.optimizer.lr for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[9] == pytest.approx(10 / 11)
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.05 + 0.95 / 2)
    assert rates[100] == pytest.approx(0.05)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("run", OPTIMIZERS)
def test_each_optimizer_learns(run: str, experiment: Path, run_train: Runner, tmp_path: Path) -> None:
    """From a uniform guess, ln 61 = 4.11, well below it; the structure of the data allows about 2.2."""
    run_train(experiment, f"--run={run}", "--train.max_steps=150", "--train.eval_interval=50", "--optimizer.lr=3e-3")
    folder = tmp_path / "out/tiny" / run
    losses = dict(read_lines(folder, "val_loss"))
    assert list(losses) == [0, 50, 100, 150]
    assert losses[0] == pytest.approx(math.log(61), abs=0.05)
    assert losses[150] < 3.3
    assert [step for step, _ in read_lines(folder, "loss")] == list(range(1, 151))
    estimated = [step for step, _ in read_lines(folder, "hessian_ms")]
    assert estimated == (list(range(1, 151, 3)) if run.startswith("sophia") else [])
    assert {path.name for path in folder.iterdir()} >= {"config.json", "environment.json", "metrics.jsonl"}
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["tokens"] == 150 * 8 * 16
    assert last["tokens_per_second"] > 0
    if run.startswith("sophia"):
        assert 0 < last["unclipped"] <= 1


@pytest.mark.parametrize(
    ("run", "dtype"), [*((run, "float32") for run in OPTIMIZERS), ("sophia-g", "float16"), ("adamw", "bfloat16")]
)
def test_a_stopped_and_resumed_run_has_the_same_losses_bit_for_bit(
    run: str, dtype: str, experiment: Path, run_train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Stopped by SIGTERM after step 7, between two checkpoints, again after step 8, and after the last step."""
    arguments = (experiment, f"--run={run}", f"--train.dtype={dtype}")
    run_train(*arguments, f"--train.out_dir={tmp_path / 'whole'}")
    make_step = train.make_step

    def stop_after(*steps: int) -> Callable:
        def step_and_signal(this: train.Run, step: int) -> dict:
            if step + 1 in steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return make_step(this, step)

        return step_and_signal

    for stop in (7, 8, 12, None):
        monkeypatch.setattr(train, "make_step", stop_after(stop) if stop else make_step)
        if stop is None:
            run_train(*arguments, "--resume")
            continue
        with pytest.raises(SystemExit) as ended:
            run_train(*arguments, "--resume")
        assert ended.value.code == 128 + signal.SIGTERM
        assert f"stopped by a signal after step {stop}" in capsys.readouterr().out
    whole, resumed = tmp_path / "whole/tiny" / run, tmp_path / "out/tiny" / run
    for key in ("loss", "val_loss", "grad_norm", "lr", "tokens"):
        assert read_lines(resumed, key) == read_lines(whole, key)
    one, other = (checkpoint.load_newest(folder) for folder in (whole, resumed))
    assert one is not None
    assert other is not None
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name])
    run_train(*arguments, "--resume")
    assert "finished already" in capsys.readouterr().out


def test_lines_beyond_the_checkpoint_are_written_once(experiment: Path, run_train: Runner, tmp_path: Path) -> None:
    """As after a kill: the log is ahead of the newest checkpoint, and its last line is torn."""
    run_train(experiment, "--run=lion", f"--train.out_dir={tmp_path / 'whole'}")
    run_train(experiment, "--run=lion")
    folder = tmp_path / "out/tiny/lion"
    (folder / "step_00000012.pt").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')
    run_train(experiment, "--run=lion", "--resume")
    for key in ("loss", "val_loss"):
        assert read_lines(folder, key) == read_lines(tmp_path / "whole/tiny/lion", key)


def test_a_hole_in_the_log_is_named(experiment: Path, run_train: Runner, tmp_path: Path, capsys) -> None:
    run_train(experiment, "--run=lion")
    folder = tmp_path / "out/tiny/lion"
    (folder / "step_00000012.pt").unlink()
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(('{"step": 3,', '{"step": 5,'))))
    run_train(experiment, "--run=lion", "--resume")
    assert "2 of the steps from 3 to 5 are lost" in capsys.readouterr().err


def one_step(run_train: Runner, experiment: Path, run: str, out: Path, *arguments: str) -> dict:
    run_train(
        experiment,
        f"--run={run}",
        "--train.max_steps=1",
        "--train.warmup_steps=0",
        f"--train.out_dir={out}",
        *arguments,
    )
    saved = checkpoint.load_newest(out / "tiny" / run)
    assert saved is not None
    return saved


def assert_same_state(one: dict, other: dict) -> None:
    """Weights, momentum and Hessian estimate (or second moment) of all parameters, to float64 rounding."""
    for name, weight in one["model"].items():
        torch.testing.assert_close(other["model"][name], weight, rtol=1e-9, atol=1e-12)
    for index, state in one["optimizer"].items():
        assert any((value != 0).any() for value in state.values())
        for key, value in state.items():
            torch.testing.assert_close(other["optimizer"][index][key], value, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("run", OPTIMIZERS)
def test_a_step_and_its_estimate_are_the_same_for_any_micro_batch_and_loss_chunk_and_two_ranks(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path, float64: None
) -> None:
    whole = one_step(run_train, experiment, run, tmp_path / "whole")
    parts = one_step(run_train, experiment, run, tmp_path / "parts", "--train.micro_batch_size=2")
    assert_same_state(whole, parts)
    arguments = [
        "--train.max_steps=1",
        "--train.warmup_steps=0",
        "--train.micro_batch_size=2",
        f"--train.out_dir={tmp_path / 'ranks'}",
    ]
    arguments += ["--train.loss_chunk=24"]  # of the 32 tokens of a micro-batch
    done = torchrun(2, experiment, f"--run={run}", *arguments, script="tests/float64_train.py")
    assert done.returncode == 0, done.stderr
    saved = checkpoint.load_newest(tmp_path / "ranks/tiny" / run)
    assert saved is not None
    assert_same_state(whole, saved)
    for folder in ("parts", "ranks"):  # and the whole validation split, whoever evaluates which part of it
        for key in ("loss", "val_loss"):
            ours, reference = (dict(read_lines(tmp_path / name / "tiny" / run, key)) for name in (folder, "whole"))
            assert ours == pytest.approx(reference, rel=1e-12)


def test_all_optimizers_see_the_same_tokens_and_begin_with_the_same_weights(
    experiment: Path, run_train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[np.ndarray]] = {run: [] for run in OPTIMIZERS}
    for run in OPTIMIZERS:

        def record(this, criterion, batches, count, run=run):
            batches = list(batches)
            if criterion is train.summed_loss:
                seen[run] += [x.numpy().copy() for x, _ in batches]
            return accumulate_gradient(this, criterion, iter(batches), count)

        monkeypatch.setattr("step.accumulate_gradient", record)
        run_train(experiment, f"--run={run}", "--train.max_steps=4")
        assert len(seen[run]) == 4
        assert all((a == b).all() for a, b in zip(seen[run], seen["adamw"], strict=True))
    first = {run: (read_lines(tmp_path / "out/tiny" / run, "val_loss")[0]) for run in OPTIMIZERS}
    assert len(set(first.values())) == 1


def test_adamw_is_a_plain_pytorch_loop(experiment: Path, run_train: Runner, tmp_path: Path, float64: None) -> None:
    """The trainer adds nothing to the textbook: loss, backward, clip, AdamW, cosine."""
    run_train(experiment, "--run=adamw", "--train.micro_batch_size=4", "--train.grad_clip=0.5")
    config = load_experiment(experiment, "adamw", {"train.grad_clip": "0.5"})
    torch.manual_seed(config.train.seed)
    model = train.GPT(config.model)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("w")]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or name.startswith("w")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    tokens = np.fromfile(Path(config.data.path) / "train.bin", "<u2").astype(np.int64)
    losses = []
    for step in range(12):
        starts = window_offsets(config.train.seed, step, len(tokens), 16, 8)
        x = torch.tensor(np.stack([tokens[i : i + 16] for i in starts]))
        y = torch.tensor(np.stack([tokens[i + 1 : i + 17] for i in starts]))
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 10))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ((step + 1) / 3 if step < 2 else cosine)
        optimizer.step()
        losses.append(loss.item())
    assert [loss for _, loss in read_lines(tmp_path / "out/tiny/adamw", "loss")] == pytest.approx(losses, rel=1e-10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("run", ["adamw", "sophia-g", "sophia-h"])
def test_16_bit_training_stays_close_to_fp32(
    run: str, dtype: str, experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    run_train(experiment, f"--run={run}", f"--train.out_dir={tmp_path / 'fp32'}")
    run_train(experiment, f"--run={run}", f"--train.dtype={dtype}")
    reference = read_lines(tmp_path / "fp32/tiny" / run, "val_loss")[-1][1]
    assert read_lines(tmp_path / "out/tiny" / run, "val_loss")[-1][1] == pytest.approx(reference, abs=0.05)
    saved = checkpoint.load_newest(tmp_path / "out/tiny" / run)
    assert saved is not None
    assert {weight.dtype for weight in saved["model"].values()} == {torch.float32}


def test_newest_and_best_checkpoints_are_kept(experiment: Path, run_train: Runner, tmp_path: Path, monkeypatch) -> None:
    losses = iter([9.0, 5.0, 3.0, 6.0, 7.0, 8.0, 8.5])

    def fake_validation(run: train.Run, progress: train.Progress, log: object) -> None:
        progress.val_loss, progress.validated_step = next(losses), progress.step

    monkeypatch.setattr(train, "validate", fake_validation)
    run_train(experiment, "--run=adamw", "--train.checkpoint_interval=2", "--train.eval_interval=2")
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "out/tiny/adamw")]
    assert names == ["step_00000004.pt", "step_00000010.pt", "step_00000012.pt"]


def refuse(run_train: Runner, capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        run_train(*arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_an_existing_run_is_refused_and_left_alone(experiment: Path, run_train: Runner, tmp_path: Path, capsys) -> None:
    run_train(experiment, "--run=adamw", "--train.max_steps=5")
    folder = tmp_path / "out/tiny/adamw"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "exists; add --resume" in refuse(run_train, capsys, experiment, "--run=adamw", "--train.max_steps=5")
    said = refuse(
        run_train, capsys, experiment, "--run=adamw", "--train.max_steps=5", "--resume", "--optimizer.lr=2e-2"
    )
    assert "was begun with optimizer.lr = 0.01, now it is 0.02; set it back" in said
    said = refuse(run_train, capsys, experiment, "--run=adamw", "--train.max_steps=9", "--resume")
    assert "train.max_steps = 5" in said
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_damaged_newest_checkpoint_gives_way_to_the_older(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    run_train(experiment, "--run=adamw", f"--train.out_dir={tmp_path / 'whole'}")
    run_train(experiment, "--run=adamw")
    folder = tmp_path / "out/tiny/adamw"
    capsys.readouterr()
    for newest, content in (("step_00000012.pt", b"no checkpoint"), ("step_00000012.pt", b"")):
        (folder / newest).write_bytes(content)
        run_train(experiment, "--run=adamw", "--resume")
        assert f"warning: {folder / newest}: unreadable" in capsys.readouterr().err
        assert read_lines(folder, "loss") == read_lines(tmp_path / "whole/tiny/adamw", "loss")
    for path in checkpoint.checkpoints(folder):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit):
        run_train(experiment, "--run=adamw", "--resume")
    assert "checkpoints can be read; start anew" in capsys.readouterr().err


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], criterion: Callable, value: float) -> None:
    """Make the loss of these steps `value` times what it is: NaN, or infinite with a finite gradient."""
    make_step = train.make_step
    current = [0]

    def remember(run: train.Run, step: int) -> dict:
        current[0] = step + 1
        return make_step(run, step)

    def poisoned(run: train.Run, asked: Callable, batches: Iterator, count: int) -> torch.Tensor:
        loss = accumulate_gradient(run, asked, batches, count)
        if asked is criterion and current[0] in steps:
            if math.isnan(value):
                next(run.model.parameters()).grad.mul_(value)  # type: ignore[union-attr]
            return loss * value
        return loss

    monkeypatch.setattr(train, "make_step", remember)
    monkeypatch.setattr("step.accumulate_gradient", poisoned)


@pytest.mark.parametrize("run", OPTIMIZERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_a_finite_loss_changes_nothing(
    run: str, value: float, experiment: Path, run_train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {5, 6}, train.summed_loss, value)
    make_step = train.make_step
    states: dict[int, list[torch.Tensor]] = {}

    def remember(this: train.Run, step: int) -> dict:
        done = make_step(this, step)
        momenta = [state["exp_avg"] for state in this.optimizer.state.values()]
        states[step + 1] = [tensor.detach().clone() for tensor in [*this.model.parameters(), *momenta]]
        return done

    monkeypatch.setattr(train, "make_step", remember)
    run_train(experiment, f"--run={run}", "--train.keep_checkpoints=12")
    for bad in (5, 6):
        assert all(torch.equal(before, after) for before, after in zip(states[4], states[bad], strict=True))
    assert any(not torch.equal(before, after) for before, after in zip(states[6], states[7], strict=True))
    folder = tmp_path / "out/tiny" / run
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step_00000010.pt", "step_00000012.pt"]
    assert [step for step, _ in read_lines(folder, "skipped")] == [5, 6]
    losses = dict(read_lines(folder, "loss"))
    assert losses[5] is None
    assert math.isfinite(losses[12])


def test_weights_that_are_no_numbers_never_replace_a_good_checkpoint(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update of step 7 is finite in its loss and gradient, and ruins the weights."""
    make_step = train.make_step

    def ruin(run: train.Run, step: int) -> dict:
        done = make_step(run, step)
        if step + 1 == 7:
            with torch.no_grad():
                run.model.ln_f.weight.fill_(math.nan)
        return done

    monkeypatch.setattr(train, "make_step", ruin)
    arguments = (experiment, "--run=adamw", "--train.checkpoint_interval=1", "--train.max_bad_steps=4")
    assert "no checkpoint has such weights" in refuse(run_train, capsys, *arguments)
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "out/tiny/adamw")]
    assert names[-2:] == ["step_00000005.pt", "step_00000006.pt"]


def test_bad_steps_in_a_row_stop_the_run(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(7, 13)), train.summed_loss, math.nan)
    said = refuse(run_train, capsys, experiment, "--run=adamw", "--train.max_bad_steps=3")
    assert "no finite loss or gradient in 3 steps up to 9; none was applied" in said
    saved = checkpoint.load_newest(tmp_path / "out/tiny/adamw")
    assert saved is not None
    assert saved["step"] == 5
    assert all(weight.isfinite().all() for weight in saved["model"].values())


@pytest.mark.parametrize("run", ["sophia-g", "sophia-h"])
def test_an_estimate_that_is_no_number_is_left_out(
    run: str, experiment: Path, run_train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if run == "sophia-g":
        poison(monkeypatch, {4}, summed_sampled_loss, math.nan)
    else:

        def poisoned(this: train.Run, batches: Iterator, count: int, step: int) -> dict:
            estimates = hutchinson(this, batches, count, step)
            next(iter(estimates.values())).mul_(math.nan if step == 3 else 1)
            return estimates

        monkeypatch.setattr("step.hutchinson", poisoned)
    run_train(experiment, f"--run={run}", "--train.checkpoint_interval=1", "--train.keep_checkpoints=12")
    three, four, seven = (checkpoint.load(checkpoint.path_of(tmp_path / "out/tiny" / run, s)) for s in (3, 4, 7))
    for index, state in three["optimizer"].items():
        assert torch.equal(state["hessian"], four["optimizer"][index]["hessian"])
        assert seven["optimizer"][index]["hessian"].isfinite().all()
    assert any(not torch.equal(s["hessian"], seven["optimizer"][i]["hessian"]) for i, s in four["optimizer"].items())


def test_bad_data_and_indivisible_batches_are_refused(
    experiment: Path, run_train: Runner, tmp_path: Path, capsys
) -> None:
    def said(*arguments: str) -> str:
        return refuse(run_train, capsys, experiment, "--run=sophia-g", *arguments)

    assert "no such file; make it" in said("--data.path=nowhere")
    assert "shorter than one window" in said("--model.block_size=1000")
    assert "beyond model.vocab_size 50" in said("--model.vocab_size=50")
    assert "use train.batch_size 6 or 9, or train.micro_batch_size 2" in said("--train.micro_batch_size=3")
    assert not (tmp_path / "out").exists()


def test_torchrun_refuses_in_one_line_too(experiment: Path, tmp_path: Path) -> None:
    done = torchrun(3, experiment, "--run=adamw")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "8 × 3 ranks" in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_signal_to_torchrun_saves_on_all_ranks_and_resumes_on_one(
    experiment: Path, run_train: Runner, tmp_path: Path
) -> None:
    arguments = [str(experiment), "--run=sophia-g", "--train.max_steps=400", "--train.checkpoint_interval=400"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    command += [str(ROOT / "train.py"), *arguments, "--train.micro_batch_size=4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
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
    run_train(*arguments, "--resume")
    assert [s for s, _ in read_lines(folder, "loss")] == list(range(1, 401))
    run_train(*arguments, f"--train.out_dir={tmp_path / 'whole'}")
    whole = dict(read_lines(tmp_path / "whole/tiny/sophia-g", "val_loss"))
    # Sums in another order: rounding, which 400 steps of sign-like updates amplify, and no more.
    assert dict(read_lines(folder, "val_loss")) == pytest.approx(whole, abs=0.02)
