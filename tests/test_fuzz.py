"""Generate bad input: each error must be one line without a traceback, and no file may change."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.token_files import open_tokens
from runtime import checkpoint
from runtime.arguments import parse_command_line
from runtime.cli import UserError
from runtime.config import KEYS, Config
from runtime.run_folder import read_metrics
from tests.conftest import TINY

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=200)
settings.load_profile("repeatable")

MORE_RUNS = """
[runs.lion.grid]
optimizer.lr = [1e-3, 1e-2]
[runs.other]
base = "lion"
optimizer.lr = 1e-4
"""
TEXT = TINY.format(data="data", out="out") + MORE_RUNS
ODD = ["0", "-1", "1e400", "nan", "inf", "1.5", "true", '"x"', '""', "[]", "[1, 2]", "{}"]
ODD += ["{a = 1}", "1979-05-27", 30 * "9", 5000 * "9", 3000 * "["]
VALUES = st.sampled_from(ODD)
LINES = st.lists(
    st.tuples(st.integers(0, TEXT.count("\n")), st.sampled_from("drv"), VALUES, st.text()),
    max_size=4,
)


def mutate(text: str, edits: list[tuple[int, str, str, str]]) -> str:
    """Apply edits: delete a line, replace it by any text, or give its key another value."""
    lines = text.splitlines()
    for index, kind, value, anything in edits:
        if index < len(lines):
            key = lines[index].split("=")[0]
            lines[index] = {"d": "", "r": anything, "v": f"{key} = {value}"}[kind]
    return "\n".join(lines)


def one_line_or_config(arguments: list[str]) -> Config | None:
    """Return the config, or check that the error has one line."""
    try:
        return parse_command_line(arguments)[0]
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) > 20
    except SystemExit as ended:  # --help
        assert ended.code == 0
    return None


@given(LINES)
def test_experiment_files(edits: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fuzz.toml")
        content = mutate(TEXT, edits).encode("utf-8", "surrogatepass")
        path.write_bytes(content)
        one_line_or_config([str(path), "--run=sophia-g"])
        one_line_or_config([str(path), "--run=other"])
        assert path.read_bytes() == content


@given(st.binary(max_size=300))
def test_experiment_files_of_any_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fuzz.toml")
        path.write_bytes(content)
        assert one_line_or_config([str(path), "--run=adamw"]) is None


FLAGS = ["--resume", "--dry-run", "--run", "--run=", "--run=lion", "--train.seed", "--help"]
OVERRIDES = st.tuples(st.sampled_from(sorted(KEYS)), VALUES | st.text())
ARGUMENTS = st.one_of(
    OVERRIDES.map(lambda pair: f"--{pair[0]}={pair[1]}"),
    st.sampled_from([*FLAGS, "--", "-"]),
    st.text().map(lambda text: "--" + text),
)


@given(st.lists(ARGUMENTS, max_size=4))
def test_command_lines(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.toml")
        path.write_text(TEXT)
        one_line_or_config([str(path), "--run=sophia-g", *arguments])


META_KEYS = st.sampled_from(["vocab_size", "splits", "train", "tokens", "fingerprint", "x"])
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(META_KEYS, inner),
    max_leaves=8,
)


@given(st.binary(max_size=200), st.none() | JSON.map(json.dumps) | st.text(max_size=20))
def test_token_files(content: bytes, meta: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.bin").write_bytes(content)
        if meta is not None:
            Path(folder, "meta.json").write_bytes(meta.encode("utf-8", "surrogatepass"))

        try:
            tokens = open_tokens(Path(folder), "train", 61, 16)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert len(tokens) == len(content) / 2 >= 17
            assert tokens.max() < 61

        assert Path(folder, "train.bin").read_bytes() == content


@pytest.fixture(scope="module")
def good_checkpoint() -> bytes:
    state: dict[str, Any] = {"step": 3, "validated_step": 3, "config": {"a": 1}}
    state |= {"optimizer": {}, "fingerprints": {}, "model": {"w": torch.arange(100.0)}}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder, "a.pt"))
        return Path(folder, "a.pt").read_bytes()


@given(st.integers(0), st.binary(min_size=1, max_size=40), st.booleans())
def test_checkpoints(good_checkpoint: bytes, position: int, patch: bytes, truncate: bool) -> None:
    position %= len(good_checkpoint)
    rest = b"" if truncate else good_checkpoint[position + len(patch) :]
    content = good_checkpoint[:position] + patch + rest

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step_00000003.pt")
        path.write_bytes(content)

        try:
            state = checkpoint.load(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert torch.equal(state["model"]["w"], torch.arange(100.0))

        assert path.read_bytes() == content


GOOD_LINE = '{"step": 1, "loss": null, "tokens": 5, "seconds": 0.5}'
BAD_LINES = [
    '{"step": 1, "lo',
    "[]",
    "5",
    "",
    "null",
    "\x00",
    '{"loss": 1}',
    '{"step": "a", "tokens": 1, "seconds": 1}',
    "[" * 5000,
]


@given(st.lists(st.sampled_from([GOOD_LINE, *BAD_LINES])))
def test_metrics_lines(lines: list[str]) -> None:
    """Check that damaged lines are skipped and the others kept."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.jsonl")
        path.write_text("\n".join(lines))
        records = read_metrics(path)
        assert len(records) == lines.count(GOOD_LINE)
        assert all(math.isnan(record["loss"]) for record in records)


def test_offsets_of_any_seed_and_step_are_in_range() -> None:
    from data.batches import window_offsets

    @given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(18, 10**10))
    def check(seed: int, step: int, n_tokens: int) -> None:
        offsets = window_offsets(seed, step, n_tokens, 17, 5)
        assert offsets.dtype == np.int64
        assert (offsets >= 0).all()
        assert (offsets + 17 < n_tokens).all()

    check()
