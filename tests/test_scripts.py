"""Test what users look at after training: compare.py, sample.py, wandb and TensorBoard."""

from __future__ import annotations

import http.server
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F

from analysis.runs import find_runs
from analysis.statistics import step_times
from model import GPT, ModelConfig
from runtime.cost import flops_per_token
from runtime.experiment import load_experiment
from runtime.metrics import throughput, time_left
from tests.conftest import OPTIMIZERS, ROOT, load_script, read_lines
from tests.wandb_file import as_dict, read_history, read_records

sample = load_script("sample")


def run_script(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of scripts/ in a process of its own, with additional environment variables."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | environment
    )


def refused(name: str, *arguments: object) -> str:
    """Run a script that must fail, and return its one-line error message."""
    done = run_script(name, *arguments)

    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert error.startswith("error: ")
    return error


SUBCOMMANDS = {
    "scripts/figures.py": ["differences", "horizons", "sizes", "sweep", "clipped"],
    "scripts/hessian.py": ["histogram", "estimators"],
}


def find_commands() -> list[str]:
    """Return every script that has an argument parser, once per subcommand."""
    scripts = []
    for folder in ("scripts", "benchmarks", "data/*"):
        for path in ROOT.glob(f"{folder}/*.py"):
            if "Parser(" in path.read_text(encoding="utf-8"):
                scripts.append(str(path.relative_to(ROOT)))

    commands = []
    for script in ["train.py", *sorted(scripts)]:
        for subcommand in SUBCOMMANDS.get(script, [""]):
            commands.append(f"{script} {subcommand}".strip())
    return commands


@pytest.mark.parametrize("command", find_commands())
def test_help_has_an_example_and_a_mistake_gives_a_one_line_error(
    command: str, monkeypatch, capsys
) -> None:
    def run(*arguments: str) -> object:
        script, *subcommand = command.split()
        monkeypatch.setattr(sys, "argv", [script, *subcommand, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return ended.value.code

    assert run("--help") == 0
    assert f"\n    python {command}" in capsys.readouterr().out

    assert run("--no-such-flag") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")


def test_compare_prints_what_the_runs_logged(experiment: Path, run_train, tmp_path: Path) -> None:
    for run in OPTIMIZERS:
        run_train(experiment, f"--run={run}")

    done = run_script("compare.py", tmp_path / "out")
    assert done.returncode == 0, done.stderr

    lines = []
    for line in done.stdout.splitlines():
        if "|" in line:
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
    rows = [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:6]]
    for row, run in zip(rows, OPTIMIZERS, strict=True):
        _, loss = read_lines(tmp_path / "out/tiny" / run, "val_loss")[-1]
        shown = (row["run"], row["steps"], row["val loss"])
        assert shown == (f"tiny/{run}", "12", f"{loss:.4f}")
    assert (tmp_path / "out/compare.png").stat().st_size > 20_000


def test_compare_refuses_what_it_cannot_read_or_write(
    experiment: Path, run_train, tmp_path: Path
) -> None:
    assert "no run with a validation" in refused("compare.py", tmp_path)
    assert "give folders to compare" in refused("compare.py")

    run_train(experiment, "--run=adamw")
    metrics = tmp_path / "out/tiny/adamw/metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:7]) + '{"torn')
    error = refused("compare.py", tmp_path / "out", "--out", metrics)
    assert "is a file; --out takes the name of a folder" in error

    (tmp_path / "out/tiny/adamw/config.json").write_text("{")
    assert "damaged" in refused("compare.py", tmp_path / "out")


def test_sample_continues_a_learned_pattern() -> None:
    """Train on x → x + 1 only; the model must continue it at moderate temperatures."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=11))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    pattern = (torch.arange(9) + torch.arange(11).unsqueeze(1)) % 11  # (11, 9)
    for _ in range(150):
        logits = model(pattern[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), pattern[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    start = torch.tensor([[3, 4]])
    for limits in ((0.0, 0, 1.0), (1.0, 1, 1.0), (0.5, 5, 1.0), (1.0, 0, 0.5)):
        written = sample.generate(model, start, 20, torch.Generator().manual_seed(0), *limits)
        assert written.tolist() == [[(3 + i) % 11 for i in range(22)]]


def test_kv_cache_gives_the_same_logits() -> None:
    """Compare token by token, and beyond the length of the context."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=11)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = torch.randint(11, (2, 8))

    caches: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    for seen, new in ((3, 3), (4, 1), (5, 1), (8, 1)):
        if seen == 8:
            model.next_logits(tokens[:, 5:6], caches)
            model.next_logits(tokens[:, 6:7], caches)
        logits = model.next_logits(tokens[:, seen - new : seen], caches)
        torch.testing.assert_close(logits, model(tokens[:, :seen])[:, -1])

    written = sample.generate(model, tokens[:, :2], 12, torch.Generator(), temperature=0.0)
    for end in range(2, 14):
        logits = model(written[:, max(0, end - 8) : end])[:, -1]
        assert (logits.argmax(-1) == written[:, end]).all()


def test_top_k_and_top_p_draw_only_the_likeliest_tokens() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(4000, 4)

    def drawn(top_k: int, top_p: float) -> list[float]:
        tokens = sample.draw(logits, 1.0, top_k, top_p, torch.Generator().manual_seed(0))
        return (torch.bincount(tokens.flatten(), minlength=4) / 4000).tolist()

    assert drawn(0, 1.0) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.03)
    assert drawn(2, 1.0) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    # 0.4 is less than 0.65, so 0.3 is kept too.
    assert drawn(0, 0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    assert drawn(0, 0.1) == [0, 1, 0, 0]


def test_sample_reads_runs_and_checkpoints_and_refuses_anything_else(
    experiment: Path, run_train, tmp_path: Path
) -> None:
    data = f"--data.path={byte_data(tmp_path)}"
    run_train(experiment, "--run=adamw", data, "--model.vocab_size=257")
    folder = tmp_path / "out/tiny/adamw"
    checkpoint = folder / "step_00000012.pt"

    arguments = ["--prompt", "ab", "--tokens", 20, "--seed", 3]
    from_folder = run_script("sample.py", folder, *arguments)
    from_checkpoint = run_script("sample.py", checkpoint, *arguments)
    assert from_folder.returncode == 0, from_folder.stderr
    assert from_folder.stdout.startswith("ab")
    assert from_folder.stdout == from_checkpoint.stdout

    assert "no such checkpoint" in refused("sample.py", tmp_path / "none.pt")
    assert "contains no checkpoint" in refused("sample.py", tmp_path)
    (tmp_path / "torn.pt").write_bytes(checkpoint.read_bytes()[:500])
    assert "torn.pt: unreadable" in refused("sample.py", tmp_path / "torn.pt")

    # The run's environment.json describes the data too.
    (tmp_path / "bytes/meta.json").unlink()
    assert run_script("sample.py", folder, *arguments).stdout == from_folder.stdout
    (folder / "environment.json").unlink()
    assert "was trained on a vocabulary of 257 tokens" in refused("sample.py", folder)


def byte_data(tmp_path: Path) -> Path:
    """Write a small data set of bytes and return its folder."""
    folder = tmp_path / "bytes"
    folder.mkdir()

    splits = {}
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(b"a\0b\0c\0" * 200)
        splits[split] = {"tokens": 600}

    meta = {"tokenizer": "bytes", "vocab_size": 257, "splits": splits}
    meta["recipe"] = {"source": {"test": "bytes"}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def assert_wandb_has_all_points_once(folder: Path) -> None:
    """Check that the one offline file has each value of metrics.jsonl, and only once."""
    (stored,) = folder.rglob("run-*.wandb")
    run, rows = read_history(stored)

    assert (run.run_group, run.display_name) == ("tiny", "sophia-g")
    assert run.run_id == (folder / "wandb_id").read_text()
    for key in ("loss", "val_loss"):
        assert [(row["step"], row[key]) for row in rows if key in row] == read_lines(folder, key)
    assert all({"step", "tokens", "seconds"} <= row.keys() for row in rows)


def test_wandb_offline_matches_metrics_jsonl_after_a_resume(
    experiment: Path, tmp_path: Path
) -> None:
    arguments = (experiment, "--run=sophia-g", "--wandb.mode=offline")
    key = {"WANDB_API_KEY": "0123456789" * 4}
    folder = tmp_path / "out/tiny/sophia-g"

    assert run_script("../train.py", *arguments, **key).returncode == 0
    assert_wandb_has_all_points_once(folder)

    # As if killed after step 10: steps 11 and 12 are logged again.
    (folder / "step_00000012.pt").unlink()
    assert run_script("../train.py", *arguments, "--resume", **key).returncode == 0
    assert_wandb_has_all_points_once(folder)

    before = read_lines(folder, "loss")
    done = run_script("wandb_sync.py", folder, "--offline", **key)
    assert done.returncode == 0, done.stderr
    assert_wandb_has_all_points_once(folder)
    assert read_lines(folder, "loss") == before

    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(b"0123456789" * 4 in content for content in written)


class RejectEveryKey(http.server.BaseHTTPRequestHandler):
    """Answer every request with 401 Unauthorized."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_training_continues_if_wandb_rejects_the_key(experiment: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out/tiny/sophia-g"
    key = "0123456789" * 4

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RejectEveryKey) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        environment = {"WANDB_API_KEY": key, "WANDB_BASE_URL": url}
        arguments = (experiment, "--run=sophia-g", "--wandb.mode=online")
        trained = run_script("../train.py", *arguments, **environment)
        synced = run_script("wandb_sync.py", folder, **environment)
        server.shutdown()

    assert trained.returncode == 0, trained.stderr
    assert "warning: wandb: " in trained.stderr
    assert key not in trained.stderr + trained.stdout
    assert_wandb_has_all_points_once(folder)

    assert synced.returncode == 2
    assert "not uploaded, wandb cannot be reached" in synced.stderr
    assert_wandb_has_all_points_once(folder)
    assert "not a run's folder" in refused("wandb_sync.py", tmp_path)


def test_wandb_sync_reads_and_writes_only_the_given_folder(
    experiment: Path, run_train, tmp_path: Path
) -> None:
    run_train(experiment, "--run=adamw", "--wandb.save_code=true")
    original, copy = tmp_path / "out/tiny/adamw", tmp_path / "copy"
    shutil.copytree(original, copy)

    done = run_script("wandb_sync.py", "--offline", copy)
    assert done.returncode == 0, done.stderr
    assert not (original / "wandb").exists()

    (stored,) = copy.rglob("run-*.wandb")
    records = list(read_records(stored))
    assert any(r.request.HasField("log_artifact") or r.artifact.type == "code" for r in records)
    assert [row["step"] for row in read_history(stored)[1] if "val_loss" in row] == [0, 4, 8, 12]


def test_training_continues_if_the_wandb_process_is_killed(
    experiment: Path, tmp_path: Path
) -> None:
    arguments = (str(experiment), "--run=adamw", "--wandb.mode=offline", "--train.max_steps=200")
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break

    children = psutil.Process(process.pid).children()
    (service,) = [child for child in children if "wandb" in child.name()]
    service.kill()
    _, errors = process.communicate(timeout=300)

    assert process.returncode == 0
    assert "continuing without it, upload later" in errors
    assert "Traceback" not in errors
    assert read_lines(tmp_path / "out/tiny/adamw", "loss")[-1][0] == 200


def test_importing_train_does_not_import_wandb_pyarrow_or_matplotlib() -> None:
    names = "('wandb', 'pyarrow', 'matplotlib')"
    check = f"import sys, train; sys.exit(any(name in sys.modules for name in {names}))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_throughput_includes_estimates_and_mfu_needs_a_known_device(experiment: Path) -> None:
    config = load_experiment(experiment, "sophia-g")  # 128 tokens per step
    records = [{"step_ms": 500.0}, {"step_ms": 300.0, "hessian_ms": 200.0}]
    numbers = throughput(records, config, torch.device("cpu"), 1)
    assert numbers == {"tokens_per_second": 256.0}
    assert time_left(math.floor(86400 + 2 * 3600 + 61)) == "1 d 02:01:01"


def test_wandb_has_four_axes_a_summary_and_the_code(
    experiment: Path, run_train, tmp_path: Path
) -> None:
    run_train(experiment, "--run=sophia-g", "--wandb.mode=offline", "--wandb.save_code=true")
    folder = tmp_path / "out/tiny/sophia-g"
    (stored,) = folder.rglob("run-*.wandb")
    records = list(read_records(stored))

    axes = {r.metric.name: r.metric.step_metric for r in records if r.HasField("metric")}
    for axis in ("tokens", "seconds", "flops"):
        assert axes[f"val_loss_by_{axis}"] == axis

    # Every 3 steps, an estimate on half of the batch.
    config = load_experiment(experiment, "sophia-g")
    flops_per_step = 8 * 16 * flops_per_token(config.model) * (1 + 4 / 8 / 3)
    rows = [as_dict(r.history.item) for r in records if r.HasField("history")]
    for row in rows:
        if "val_loss" in row:
            assert row["flops"] == pytest.approx(row["step"] * flops_per_step)
            for axis in ("flops", "tokens", "seconds"):
                assert row[f"val_loss_by_{axis}"] == row["val_loss"]

    summary: dict[str, Any] = {}
    for record in records:
        if record.HasField("summary"):
            summary |= as_dict(record.summary.update)
    (run,) = find_runs([folder])
    step_ms, hessian_ms = step_times([run])
    assert summary["final/step"] == 12
    assert summary["final/val_loss"] == run.final_loss
    assert summary["final/step_ms"] == step_ms
    assert summary["final/hessian_ms"] == hessian_ms

    requests = [r.request for r in records if r.request.HasField("log_artifact")]
    artifacts = [r.artifact for r in records if r.HasField("artifact")]
    code = [artifact for artifact in artifacts if artifact.type == "code"]
    (artifact,) = [request.log_artifact.artifact for request in requests] or code
    files = {entry.path for entry in artifact.manifest.contents}
    assert {"train.py", "configs/gpt2_30m.toml"} <= files


def test_tensorboard_has_each_point_once_after_a_resume(
    experiment: Path, run_train, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = (experiment, "--run=adamw", "--train.tensorboard=true")
    run_train(*arguments)
    folder = tmp_path / "out/tiny/adamw"
    (folder / "step_00000012.pt").unlink()
    run_train(*arguments, "--resume")

    stored = EventAccumulator(str(folder / "tensorboard")).Reload()
    for key in ("val_loss", "loss"):
        points = [(s.step, pytest.approx(s.value, rel=1e-6)) for s in stored.Scalars(key)]
        assert points == read_lines(folder, key)


def test_shipped_wandb_sweep_calls_the_trainer() -> None:
    """Fill in the command of configs/wandb_sweep.yaml as wandb's agent does, and run it."""
    import yaml
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "configs/wandb_sweep.yaml").read_text())
    chosen = {key: {"value": values["values"][0]} for key, values in sweep["parameters"].items()}
    flags = create_sweep_command_args({"args": chosen})["args"]
    known = {"${program}": [sweep["program"]], "${args}": flags}

    command = []
    for word in create_sweep_command(sweep["command"]):
        command.extend(known.get(word, [word]))
    command.append("--dry-run")
    environment = os.environ | {"WANDB_RUN_ID": "abc"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

    assert done.returncode == 0, done.stderr
    assert "out/gpt2_30m-gpu/sophia-g-abc" in done.stdout
