"""compare.py, sample.py, wandb: what a person looks at after training."""

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

from analysis import runs as analysis
from model import GPT, flops_per_token
from runtime.config import ModelConfig
from runtime.experiment import load_experiment
from scripts import sample
from tests.conftest import OPTIMIZERS, ROOT, read_lines
from tests.wandb_file import as_dict, read_history, read_records


def run_script(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


def refused(name: str, *arguments: object) -> str:
    done = run_script(name, *arguments)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert error.startswith("error: ")
    return error


SUBCOMMANDS = {
    "scripts/figures.py": ["horizons", "sizes", "sweep", "clipped"],
    "scripts/hessian.py": ["histogram", "estimators"],
}
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("scripts", "benchmarks", "data/*")
    for path in ROOT.glob(f"{folder}/*.py")
    if "Parser(" in path.read_text(encoding="utf-8")
)
COMMANDS = [f"{name} {command}".strip() for name in ["train.py", *SCRIPTS] for command in SUBCOMMANDS.get(name, [""])]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_script_has_an_example_in_its_help_and_one_line_for_a_mistake(command: str, monkeypatch, capsys) -> None:
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
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    rows = [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:6]]
    for row, run in zip(rows, OPTIMIZERS, strict=True):
        last = read_lines(tmp_path / "out/tiny" / run, "val_loss")[-1]
        assert (row["run"], row["steps"], row["val loss"]) == (f"tiny/{run}", "12", f"{last[1]:.4f}")
    assert (tmp_path / "out/compare.png").stat().st_size > 20_000


def test_compare_refuses_what_it_cannot_read_or_write(experiment: Path, run_train, tmp_path: Path) -> None:
    assert "no run with a validation" in refused("compare.py", tmp_path)
    assert "what is to be compared?" in refused("compare.py")
    run_train(experiment, "--run=adamw")
    metrics = tmp_path / "out/tiny/adamw/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:7]) + '{"torn')
    assert "is a file; --out takes the name of a folder" in refused("compare.py", tmp_path / "out", "--out", metrics)
    (tmp_path / "out/tiny/adamw/config.json").write_text("{")
    assert "damaged" in refused("compare.py", tmp_path / "out")


def test_sample_continues_a_pattern_it_was_taught() -> None:
    """A model that only ever saw x → x + 1 must write it, under any temperature it is sure at."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=11))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pattern = (torch.arange(9) + torch.arange(11).unsqueeze(1)) % 11  # (11, 9)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(model(pattern[:, :-1]).flatten(0, 1), pattern[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    start = torch.tensor([[3, 4]])
    for limits in ((0.0, 0, 1.0), (1.0, 1, 1.0), (0.5, 5, 1.0), (1.0, 0, 0.5)):
        written = sample.generate(model, start, 20, torch.Generator().manual_seed(0), *limits)
        assert written.tolist() == [[(3 + i) % 11 for i in range(22)]]


def test_cached_keys_and_values_change_no_logit() -> None:
    """Token by token, and where the text outgrows the context."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=11)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = torch.randint(11, (2, 8))
    caches: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    for seen, new in ((3, 3), (4, 1), (5, 1), (8, 1)):
        if seen == 8:
            model.next_logits(tokens[:, 5:6], caches), model.next_logits(tokens[:, 6:7], caches)
        logits = model.next_logits(tokens[:, seen - new : seen], caches)
        torch.testing.assert_close(logits, model(tokens[:, :seen])[:, -1])
    written = sample.generate(model, tokens[:, :2], 12, torch.Generator(), temperature=0.0)
    for end in range(2, 14):
        assert (model(written[:, max(0, end - 8) : end])[:, -1].argmax(-1) == written[:, end]).all()


def test_top_k_and_top_p_draw_from_the_likeliest_alone() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(4000, 4)

    def drawn(top_k: int, top_p: float) -> list[float]:
        tokens = sample.draw(logits, 1.0, top_k, top_p, torch.Generator().manual_seed(0))
        return (torch.bincount(tokens.flatten(), minlength=4) / 4000).tolist()

    assert drawn(0, 1.0) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.03)
    assert drawn(2, 1.0) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    assert drawn(0, 0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)  # 0.4 and 0.3 make up 0.65, 0.4 does not
    assert drawn(0, 0.1) == [0, 1, 0, 0]


def test_sample_writes_from_a_run_and_refuses_what_is_none(experiment: Path, run_train, tmp_path: Path) -> None:
    run_train(experiment, "--run=adamw", "--data.path=" + str(byte_data(tmp_path)), "--model.vocab_size=257")
    folder = tmp_path / "out/tiny/adamw"
    arguments = ["--prompt", "ab", "--tokens", 20, "--seed", 3]
    one, two = (run_script("sample.py", path, *arguments) for path in (folder, folder / "step_00000012.pt"))
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("ab")
    assert one.stdout == two.stdout
    assert "no such checkpoint" in refused("sample.py", tmp_path / "none.pt")
    assert "no checkpoint in it" in refused("sample.py", tmp_path)
    (tmp_path / "torn.pt").write_bytes((folder / "step_00000012.pt").read_bytes()[:500])
    assert "torn.pt: unreadable" in refused("sample.py", tmp_path / "torn.pt")
    (tmp_path / "bytes/meta.json").unlink()  # the run remembers what it was trained on
    assert run_script("sample.py", folder, *arguments).stdout == one.stdout
    (folder / "environment.json").unlink()
    assert "was trained on 257 tokens" in refused("sample.py", folder)


def byte_data(tmp_path: Path) -> Path:
    folder = tmp_path / "bytes"
    folder.mkdir()
    splits = {}
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(b"a\0b\0c\0" * 200)
        splits[split] = {"tokens": 600}
    meta = {"tokenizer": "bytes", "vocab_size": 257, "splits": splits, "recipe": {"source": {"test": "bytes"}}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def assert_wandb_has_all_points_once(folder: Path) -> None:
    """The one offline file holds each validation and each logged step of metrics.jsonl, once, with the same values."""
    (stored,) = folder.rglob("run-*.wandb")
    run, rows = read_history(stored)
    assert (run.run_group, run.display_name, run.run_id) == ("tiny", "sophia-g", (folder / "wandb_id").read_text())
    for key in ("loss", "val_loss"):
        assert [(row["step"], row[key]) for row in rows if key in row] == read_lines(folder, key)
    assert all({"step", "tokens", "seconds"} <= row.keys() for row in rows)


def test_wandb_offline_has_what_metrics_jsonl_has_after_a_resume_too(experiment: Path, tmp_path: Path) -> None:
    arguments = (experiment, "--run=sophia-g", "--wandb.mode=offline")
    key = {"WANDB_API_KEY": "0123456789" * 4}
    assert run_script("../train.py", *arguments, **key).returncode == 0
    folder = tmp_path / "out/tiny/sophia-g"
    assert_wandb_has_all_points_once(folder)
    (folder / "step_00000012.pt").unlink()  # as if killed after step 10: steps 11 and 12 come again
    assert run_script("../train.py", *arguments, "--resume", **key).returncode == 0
    assert_wandb_has_all_points_once(folder)
    before = read_lines(folder, "loss")
    done = run_script("wandb_sync.py", folder, "--offline", **key)
    assert done.returncode == 0, done.stderr
    assert_wandb_has_all_points_once(folder)
    assert read_lines(folder, "loss") == before
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(b"0123456789" * 4 in content for content in written)


class NoWandb(http.server.BaseHTTPRequestHandler):
    """A server that refuses every key."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_training_goes_on_where_wandb_refuses_the_key(experiment: Path, tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoWandb) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        }
        folder = tmp_path / "out/tiny/sophia-g"
        done = run_script("../train.py", experiment, "--run=sophia-g", "--wandb.mode=online", **environment)
        again = run_script("wandb_sync.py", folder, **environment)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "warning: wandb: " in done.stderr
    assert "0123456789" * 4 not in done.stderr + done.stdout
    assert_wandb_has_all_points_once(folder)
    assert again.returncode == 2
    assert "not uploaded, wandb cannot be reached" in again.stderr
    assert_wandb_has_all_points_once(folder)
    assert "no run's folder" in refused("wandb_sync.py", tmp_path)


def test_wandb_sync_takes_the_folder_it_is_given(experiment: Path, run_train, tmp_path: Path) -> None:
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


def test_training_goes_on_where_wandb_s_own_process_is_killed(experiment: Path, tmp_path: Path) -> None:
    arguments = (str(experiment), "--run=adamw", "--wandb.mode=offline", "--train.max_steps=200")
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    (service,) = [child for child in psutil.Process(process.pid).children() if "wandb" in child.name()]
    service.kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "going on without it, upload later" in said
    assert "Traceback" not in said
    assert read_lines(tmp_path / "out/tiny/adamw", "loss")[-1][0] == 200


def test_wandb_is_not_imported_unless_it_is_used() -> None:
    check = "import sys, train; sys.exit(any(name in sys.modules for name in ('wandb', 'pyarrow', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_mfu_is_known_for_known_devices_alone() -> None:
    from runtime.metrics import throughput, time_left

    records = [{"step_ms": 500.0}, {"step_ms": 300.0, "hessian_ms": 200.0}]
    assert throughput(records, 1000, 1e12, torch.device("cpu"), 1) == {"tokens_per_second": 2000.0}
    assert time_left(math.floor(86400 + 2 * 3600 + 61)) == "1 d 02:01:01"


def test_wandb_has_four_axes_a_summary_and_the_code(experiment: Path, run_train, tmp_path: Path) -> None:
    run_train(experiment, "--run=sophia-g", "--wandb.mode=offline", "--wandb.save_code=true")
    folder = tmp_path / "out/tiny/sophia-g"
    (stored,) = folder.rglob("run-*.wandb")
    records = list(read_records(stored))
    axes = {r.metric.name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert {f"val_loss_by_{axis}": axis for axis in ("tokens", "seconds", "flops")}.items() <= axes.items()
    config = load_experiment(experiment, "sophia-g")
    a_step = 8 * 16 * flops_per_token(config.model) * (1 + 4 / 8 / 3)  # an estimate on half the batch every 3 steps
    rows = [as_dict(r.history.item) for r in records if r.HasField("history")]
    for row in (row for row in rows if "val_loss" in row):
        assert row["flops"] == pytest.approx(row["step"] * a_step)
        assert row["val_loss_by_flops"] == row["val_loss_by_tokens"] == row["val_loss_by_seconds"] == row["val_loss"]
    summary: dict[str, Any] = {}
    for record in (r for r in records if r.HasField("summary")):
        summary |= as_dict(record.summary.update)
    (run,) = analysis.find_runs([folder])
    step_ms, hessian_ms = analysis.step_times([run])
    expected = {"step": 12, "val_loss": run.final_loss, "step_ms": step_ms, "hessian_ms": hessian_ms}
    assert {f"final/{key}": value for key, value in expected.items()}.items() <= summary.items()
    (artifact,) = [r.request.log_artifact.artifact for r in records if r.request.HasField("log_artifact")] or [
        r.artifact for r in records if r.HasField("artifact") and r.artifact.type == "code"
    ]
    assert {"train.py", "configs/gpt2_30m.toml"} <= {entry.path for entry in artifact.manifest.contents}


def test_tensorboard_has_each_point_once_after_a_resume_too(experiment: Path, run_train, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = (experiment, "--run=adamw", "--train.tensorboard=true")
    run_train(*arguments)
    folder = tmp_path / "out/tiny/adamw"
    (folder / "step_00000012.pt").unlink()
    run_train(*arguments, "--resume")
    stored = EventAccumulator(str(folder / "tensorboard")).Reload()
    for key in ("val_loss", "loss"):
        points = [(scalar.step, pytest.approx(scalar.value, rel=1e-6)) for scalar in stored.Scalars(key)]
        assert points == read_lines(folder, key)


def test_the_sweep_that_is_shipped_calls_the_trainer() -> None:
    """As wandb's agent fills in its command."""
    import yaml
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "configs/wandb_sweep.yaml").read_text())
    chosen = {key: {"value": values["values"][0]} for key, values in sweep["parameters"].items()}
    flags = create_sweep_command_args({"args": chosen})["args"]
    known = {"${program}": [sweep["program"]], "${args}": flags}
    command = [part for word in create_sweep_command(sweep["command"]) for part in known.get(word, [word])]
    done = subprocess.run(
        [*command, "--dry-run"], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"WANDB_RUN_ID": "abc"}
    )
    assert done.returncode == 0, done.stderr
    assert "out/gpt2_30m-gpu/sophia-g-abc" in done.stdout
