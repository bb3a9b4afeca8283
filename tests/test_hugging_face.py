"""Test export to transformers, import from it and from OpenAI's files, and evaluate.py."""

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

from data.tokenizer import load_tokenizer
from model import GPT, ModelConfig
from runtime import hugging_face
from runtime.checkpoint import load_model
from runtime.cli import UserError, run_main
from tests.conftest import ROOT, load_script, read_lines
from tests.test_scripts import byte_data

evaluate, export_hf = load_script("evaluate"), load_script("export_hf")

SHAPE = ModelConfig(n_layer=3, n_head=2, n_embd=32, block_size=16, vocab_size=257)
TEXTS = ("def f(x):\n\treturn x", "  two  spaces", "naïve – ∂ 日本語 🤗", "", "it's")


def random_model(**changes: object) -> GPT:
    """Return a model of SHAPE with large random weights, so that logits differ clearly."""
    torch.manual_seed(0)
    model = GPT(SHAPE.model_copy(update=changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def their_model(config: ModelConfig) -> GPT2LMHeadModel:
    """Return transformers' model of the same shape, with weights of its own."""
    settings = hugging_face.hugging_face_config(config, 256)
    return GPT2LMHeadModel(GPT2Config(**settings)).eval()


@pytest.mark.parametrize(
    "changes", [{}, {"bias": True}, {"scale_attn_by_inverse_layer_idx": False}]
)
def test_exported_and_imported_weights_have_the_same_logits(
    changes: dict[str, object], tmp_path: Path
) -> None:
    model = random_model(**changes)
    theirs = their_model(model.config)
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
    """Read files like OpenAI's own: biases, no prefix, causal masks among the tensors, no scaling.

    Only the number of positions is smaller.
    """
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 257, "n_positions": 64, "n_embd": 32}
    shape |= {"n_layer": 2, "n_head": 2}
    theirs = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)

    weights = tmp_path / "model.safetensors"
    tensors = {name: t.contiguous() for name, t in theirs.transformer.state_dict().items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, weights)
    (tmp_path / "config.json").write_text(json.dumps(shape))

    differences = {"n_layer": 2, "bias": True, "scale_attn_by_inverse_layer_idx": False}
    config = SHAPE.model_copy(update=differences)
    model = GPT(config).eval()
    hugging_face.load_weights(model, str(tmp_path))
    tokens = torch.randint(257, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)

    # Models of another shape.
    scale = "scale_attn_by_inverse_layer_idx"
    for changes, message in (
        ({"bias": False}, "has biases; add --model.bias=true"),
        ({"n_layer": 3}, "has n_layer = 2, the model 3; add --model.n_layer=2"),
        ({"block_size": 128}, "has 64 positions, the model 128"),
        ({scale: True}, f"add --model.{scale}=false"),
    ):
        other = GPT(config.model_copy(update=changes))
        with pytest.raises(UserError, match=message):
            hugging_face.load_weights(other, str(tmp_path))

    # Damaged and missing files.
    weights.write_bytes(b"\x08")
    with pytest.raises(UserError, match="not weights in Hugging Face's format"):
        hugging_face.load_weights(model, str(tmp_path))
    with pytest.raises(UserError, match="not weights in Hugging Face's format"):
        hugging_face.load_weights(model, str(tmp_path / "nowhere"))
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{}", "[]", '{"weight_map": {"a": 5}}', '{"weight_map": ["a"]}', 100_000 * "["):
        index.write_text(content)
        with pytest.raises(UserError, match="not weights in Hugging Face's format"):
            hugging_face.load_weights(model, str(tmp_path))
    index.unlink()

    # Weights that are not finite.
    tensors["ln_f.weight"][0] = math.nan
    save_file(tensors, weights)
    with pytest.raises(UserError, match="has entries that are NaN or infinite"):
        hugging_face.load_weights(model, str(tmp_path))


@pytest.mark.parametrize("name", ["bytes", "stdlib", "gpt2"])
def test_exported_tokenizer_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    export_hf.make_tokenizer(name, 16).save_pretrained(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(name)

    assert (len(theirs), theirs.eos_token_id) == (ours.vocab_size, ours.end_of_text)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text).tolist()) == text
    # Our tokenizer encodes <|endoftext|> as plain text instead.
    assert theirs("a<|endoftext|>")["input_ids"][-1] == ours.end_of_text


@pytest.fixture
def exported(experiment: Path, run_train, tmp_path: Path) -> Path:
    """Train a run, export it, and return the folder of the export."""
    data = f"--data.path={byte_data(tmp_path)}"
    run_train(experiment, "--run=adamw", data, "--model.vocab_size=257")
    export_hf.export(tmp_path / "out/tiny/adamw", tmp_path / "hf")
    return tmp_path / "hf"


def test_transformers_needs_only_the_exported_folder(exported: Path, tmp_path: Path) -> None:
    """Generate text in a process of its own, outside of this repository."""
    program = f"""
from transformers import pipeline
write = pipeline("text-generation", {str(exported)!r})
print(len(write("ab", max_new_tokens=8, do_sample=False)[0]["generated_text"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2

    card = (exported / "README.md").read_text()
    loss = read_lines(tmp_path / "out/tiny/adamw", "val_loss")[-1][1]
    assert f"{loss:.4f} nats per token" in card
    assert '"lr": 0.01' in card
    assert '* Training data: {"test": "bytes"}, 1,536 tokens seen' in card

    _, model, _ = load_model(tmp_path / "out/tiny/adamw")
    tokens = torch.randint(257, (2, 16))
    theirs = GPT2LMHeadModel.from_pretrained(exported)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    assert isinstance(pipeline("text-generation", str(exported)).model, GPT2LMHeadModel)


def test_training_starts_from_an_exported_folder(
    exported: Path, experiment: Path, run_train, tmp_path: Path
) -> None:
    arguments = (f"--data.path={tmp_path / 'bytes'}", "--model.vocab_size=257")
    run_train(experiment, "--run=lion", *arguments, f"--init-from={exported}")

    first = dict(read_lines(tmp_path / "out/tiny/lion", "val_loss"))[0]
    _, last = read_lines(tmp_path / "out/tiny/adamw", "val_loss")[-1]
    assert first == pytest.approx(last, abs=1e-5)
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
    """Write a task for the harness, with 24 questions and 8 examples, and return its folder."""
    folder = tmp_path / "task"
    folder.mkdir()
    for split, count in (("train", 8), ("validation", 24)):
        lines = [json.dumps({"question": f"{i} mod 3", "label": i % 3}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    (folder / "digits.yaml").write_text(QUESTIONS.format(folder=folder))
    return folder


def call_harness_directly(model: Path, task: Path) -> list[dict[str, Any]]:
    """Return the harness's own results for three draws of the examples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task), include_defaults=False)
    results = []
    for draw in range(3):
        result = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "device": "cpu"},
            tasks=["digits"],
            num_fewshot=2,
            fewshot_random_seed=draw,
            task_manager=manager,
            bootstrap_iters=0,
        )
        results.append(result["results"]["digits"])
    return results


@pytest.fixture
def random_export(tmp_path: Path) -> Path:
    """Export a model with large random weights, whose answers depend on the examples."""
    folder = tmp_path / "random"
    model = random_model(block_size=128)
    theirs = their_model(model.config)
    theirs.load_state_dict(hugging_face.to_hugging_face(model), strict=False)
    theirs.save_pretrained(folder)
    export_hf.make_tokenizer("bytes", 128).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluate_equals_calling_the_harness_directly(
    random_export: Path, task: Path, tmp_path: Path, ranks: int
) -> None:
    out = tmp_path / "eval"
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={ranks}", "--"]
    command += [str(ROOT / "scripts/evaluate.py"), str(random_export), "--tasks=digits"]
    command += [f"--include-path={task}", "--draws=3", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

    results = json.loads((out / "evaluate.json").read_text())
    expected = call_harness_directly(random_export, task)
    assert [result["job"]["draw"] for result in results] == [0, 1, 2]
    accuracies = [result["accuracy"] for result in results]
    assert accuracies == [metrics["acc,none"] for metrics in expected]
    scores = [result["metrics"]["brier_score,none"] for result in results]
    assert scores == [metrics["brier_score,none"] for metrics in expected]
    # The scores depend on the examples shown.
    assert len(set(scores)) == 3

    assert (out / "evaluate.png").exists()
    assert done.stdout.count("| run") == 1


def test_evaluate_keeps_a_result_until_its_inputs_change(
    random_export: Path, task: Path, monkeypatch, capsys
) -> None:
    computed: list[int] = []

    def fake_harness(_: object, job: Any) -> Any:
        computed.append(job.draw)
        return evaluate.Result(job, 0.5 + job.draw / 10, 0.25, job.shots, {})

    def run() -> list[int]:
        computed.clear()
        run_main(evaluate.main)
        return computed

    monkeypatch.setattr(evaluate, "call_harness", fake_harness)
    arguments = [str(random_export), "--tasks=digits", f"--include-path={task}", "--draws=2"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    assert run() == [0, 1]
    assert "| 0.5500 ± 0.0500 / 0.2500 |" in capsys.readouterr().out

    assert run() == []
    assert "draw 1: 0.6000 (from " in capsys.readouterr().out

    # Other questions.
    (task / "validation.jsonl").write_text('{"question": "1 + 1", "label": 2}')
    assert run() == [0, 1]

    # Another modification time, which another model would have.
    os.utime(random_export / "model.safetensors")
    assert run() == [0, 1]

    # A damaged result.
    results = (random_export / "evaluate").iterdir()
    newest = max(results, key=lambda path: path.stat().st_mtime_ns)
    newest.write_text("{")
    assert run() == [1]


@pytest.mark.slow
def test_evaluate_rejects_bad_arguments(
    exported: Path, task: Path, monkeypatch, capsys, tmp_path: Path
) -> None:
    for arguments, message in (
        ([tmp_path / "none"], "not a model"),
        ([exported, "--tasks=sums", f"--include-path={task}"], "task sums"),
        ([exported, "--tasks=digits", f"--include-path={tmp_path / 'none'}"], "no such folder"),
        ([exported, "--tasks=,"], "has an empty name"),
        ([exported, f"--out={task / 'digits.yaml'}"], "is a file"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_main(evaluate.main)

        assert ended.value.code == 2
        assert message in capsys.readouterr().err
