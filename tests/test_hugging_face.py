"""Export to transformers and back, OpenAI's weights, the harness."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from data.write_tokens import load_tokenizer
from model import GPT
from runtime import hugging_face
from runtime.checkpoint import load_model
from runtime.cli import UserError, run_main
from runtime.config import ModelConfig
from scripts import evaluate, export_hf
from tests.conftest import ROOT, read_lines
from tests.test_scripts import byte_data

SHAPE = ModelConfig(n_layer=3, n_head=2, n_embd=32, block_size=16, vocab_size=257)
TEXTS = ("def f(x):\n\treturn x", "  two  spaces", "naïve – ∂ 日本語 🤗", "", "it's")


def random_model(**changes: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(SHAPE.model_copy(update=changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"scale_attn_by_inverse_layer_idx": False}])
def test_weights_there_and_back_have_the_same_logits(changes: dict[str, object], tmp_path: Path) -> None:
    model = random_model(**changes)
    theirs = GPT2LMHeadModel(GPT2Config(**hugging_face.hugging_face_config(model.config, 256))).eval()
    missing, unexpected = theirs.load_state_dict(hugging_face.to_hugging_face(model), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    theirs.save_pretrained(tmp_path)
    back = GPT(model.config).eval()
    hugging_face.load_weights(back, str(tmp_path))
    tokens = torch.randint(257, (2, 16))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)
        assert torch.equal(back(tokens), model(tokens))


def test_openai_shaped_files_are_read(tmp_path: Path) -> None:
    """As OpenAI's own: biases, no prefix, causal masks among the tensors, no scaling; here with fewer positions."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    tensors = {name: t.contiguous() for name, t in theirs.transformer.state_dict().items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, tmp_path / "model.safetensors")
    shape = {"vocab_size": 257, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = SHAPE.model_copy(update={"n_layer": 2, "bias": True, "scale_attn_by_inverse_layer_idx": False})
    model = GPT(config).eval()
    hugging_face.load_weights(model, str(tmp_path))
    tokens = torch.randint(257, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    for changes, says in (
        ({"bias": False}, "has biases; add --model.bias=true"),
        ({"n_layer": 3}, "has n_layer = 2, the model 3; add --model.n_layer=2"),
        ({"block_size": 128}, "knows 64 positions, the model has 128"),
        ({"scale_attn_by_inverse_layer_idx": True}, "add --model.scale_attn_by_inverse_layer_idx=false"),
    ):
        with pytest.raises(UserError, match=says):
            hugging_face.load_weights(GPT(config.model_copy(update=changes)), str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match="no weights in Hugging Face's format"):
        hugging_face.load_weights(model, str(tmp_path))
    with pytest.raises(UserError, match="no weights in Hugging Face's format"):
        hugging_face.load_weights(model, str(tmp_path / "nowhere"))
    for index in ("{}", "[]", '{"weight_map": {"a": 5}}', '{"weight_map": ["a"]}', 100_000 * "["):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match="no weights in Hugging Face's format"):
            hugging_face.load_weights(model, str(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    tensors["ln_f.weight"][0] = math.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has entries that are no numbers"):
        hugging_face.load_weights(model, str(tmp_path))


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_exported_tokenizer_has_our_ids(name: str, tmp_path: Path) -> None:
    export_hf.make_tokenizer(name, 16).save_pretrained(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(name)
    assert (len(theirs), theirs.eos_token_id) == (ours.vocab_size, ours.end_of_text)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text).tolist()) == text
    assert theirs("a<|endoftext|>")["input_ids"][-1] == ours.end_of_text  # ours takes it for text


@pytest.fixture
def exported(experiment: Path, run_train, tmp_path: Path) -> Path:
    """A trained run, exported."""
    run_train(experiment, "--run=adamw", f"--data.path={byte_data(tmp_path)}", "--model.vocab_size=257")
    export_hf.export(tmp_path / "out/tiny/adamw", tmp_path / "hf")
    return tmp_path / "hf"


def test_an_exported_folder_is_all_that_transformers_needs(exported: Path, tmp_path: Path) -> None:
    """In a process of its own, far from this repository."""
    program = f"""
from transformers import pipeline
write = pipeline("text-generation", {str(exported)!r})
print(len(write("ab", max_new_tokens=8, do_sample=False)[0]["generated_text"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2
    card = (exported / "README.md").read_text()
    loss = read_lines(tmp_path / "out/tiny/adamw", "val_loss")[-1][1]
    assert f"{loss:.4f} nats a token" in card
    assert '"lr": 0.01' in card
    assert '* Training data: {"test": "bytes"}, 1,536 tokens seen' in card
    _, model, _ = load_model(tmp_path / "out/tiny/adamw")
    tokens = torch.randint(257, (2, 16))
    theirs = GPT2LMHeadModel.from_pretrained(exported)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    assert isinstance(pipeline("text-generation", str(exported)).model, GPT2LMHeadModel)


def test_training_starts_from_an_exported_folder(exported: Path, experiment: Path, run_train, tmp_path: Path) -> None:
    data = f"--data.path={tmp_path / 'bytes'}"
    arguments = (experiment, "--run=lion", data, "--model.vocab_size=257", f"--init-from={exported}")
    run_train(*arguments)
    first = dict(read_lines(tmp_path / "out/tiny/lion", "val_loss"))[0]
    assert first == pytest.approx(read_lines(tmp_path / "out/tiny/adamw", "val_loss")[-1][1], abs=1e-5)
    saved = json.loads((tmp_path / "out/tiny/lion/config.json").read_text())
    assert saved["train"]["init_from"] == str(exported)


QUESTIONS = """
task: digits
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/train.jsonl
    validation: {folder}/validation.jsonl
training_split: train
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}} ="
doc_to_target: label
doc_to_choice: ["0", "1", "2"]
metric_list:
  - metric: acc
  - metric: brier_score
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a task of the harness: 24 questions, and 8 to show."""
    folder = tmp_path / "task"
    folder.mkdir()
    for split, count in (("train", 8), ("validation", 24)):
        lines = [json.dumps({"question": f"{i} mod 3", "label": i % 3}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    (folder / "digits.yaml").write_text(QUESTIONS.format(folder=folder))
    return folder


def by_hand(model: Path, task: Path) -> list[dict[str, Any]]:
    """What the harness says of three draws."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task), include_defaults=False)
    arguments: dict[str, Any] = {
        "model": "hf",
        "model_args": {"pretrained": str(model), "device": "cpu"},
        "tasks": ["digits"],
    }
    arguments |= {"num_fewshot": 2, "task_manager": manager, "bootstrap_iters": 0}
    found = [simple_evaluate(**arguments, fewshot_random_seed=draw) for draw in range(3)]
    return [result["results"]["digits"] for result in found]


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """A model with large random weights, whose answers depend on all that it is shown."""
    model = random_model(block_size=128)
    theirs = GPT2LMHeadModel(GPT2Config(**hugging_face.hugging_face_config(model.config, 256)))
    theirs.load_state_dict(hugging_face.to_hugging_face(model), strict=False)
    theirs.save_pretrained(tmp_path / "judged")
    export_hf.make_tokenizer("bytes", 128).save_pretrained(tmp_path / "judged")
    return tmp_path / "judged"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_evaluate_equals_the_harness_called_by_hand(judged: Path, task: Path, tmp_path: Path, ranks: int) -> None:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"]
    script = [str(ROOT / "scripts/evaluate.py"), str(judged), "--tasks=digits", f"--include-path={task}"]
    command = [sys.executable, *launcher, *script, "--draws=3", f"--out={tmp_path / 'eval'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "eval/evaluate.json").read_text())
    assert [result["job"]["draw"] for result in results] == [0, 1, 2]
    expected = by_hand(judged, task)
    assert [result["accuracy"] for result in results] == [metrics["acc,none"] for metrics in expected]
    scores = [result["metrics"]["brier_score,none"] for result in results]
    assert scores == [metrics["brier_score,none"] for metrics in expected]
    assert len(set(scores)) == 3  # what is shown makes a difference
    assert (tmp_path / "eval/evaluate.png").exists()
    assert done.stdout.count("| run") == 1


def test_evaluate_keeps_a_result_until_its_inputs_change(judged: Path, task: Path, monkeypatch, capsys) -> None:
    def answer(_: object, job: evaluate.Job) -> evaluate.Result:
        made.append(job.draw)
        return evaluate.Result(job, 0.5 + job.draw / 10, 0.25, job.shots, {})

    def run() -> list[int]:
        made.clear()
        run_main(evaluate.main)
        return made

    made: list[int] = []
    monkeypatch.setattr(evaluate, "call_harness", answer)
    arguments = [judged, "--tasks=digits", f"--include-path={task}", "--draws=2"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    assert run() == [0, 1]
    assert "| 0.5500 ± 0.0500 / 0.2500 |" in capsys.readouterr().out
    assert run() == []
    assert "draw 1: 0.6000 (from " in capsys.readouterr().out
    (task / "validation.jsonl").write_text('{"question": "1 + 1", "label": 2}')
    assert run() == [0, 1]
    os.utime(judged / "model.safetensors")  # as another model would have another time
    assert run() == [0, 1]
    max((judged / "evaluate").iterdir(), key=lambda path: path.stat().st_mtime_ns).write_text("{")
    assert run() == [1]


def test_evaluate_refuses_in_one_line(exported: Path, task: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    for arguments, says in (
        ([tmp_path / "none"], "no model of transformers"),
        ([exported, "--tasks=sums", f"--include-path={task}"], "task sums"),
        ([exported, "--tasks=digits", f"--include-path={tmp_path / 'none'}"], "no such folder"),
        ([exported, "--tasks=,"], "has an empty name"),
        ([exported, f"--out={task / 'digits.yaml'}"], "is a file"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_main(evaluate.main)
        assert ended.value.code == 2
        assert says in capsys.readouterr().err
