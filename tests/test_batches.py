from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batches import (
    label_uniforms,
    mask_tokens,
    masked_positions,
    probe_seed,
    rank_slices,
    read_windows,
    validation_windows,
    window_offsets,
)
from data.token_files import open_tokens
from model import ModelConfig
from runtime.cli import UserError
from runtime.distributed import Ranks


def write(folder: Path, tokens: object, split: str = "train") -> Path:
    np.array(tokens, "<u2").tofile(folder / f"{split}.bin")
    return folder


def test_batch_depends_only_on_seed_and_step() -> None:
    offsets = window_offsets(seed=7, step=3, n_tokens=10_000, block_size=100, batch_size=64)
    assert (offsets == window_offsets(7, 3, 10_000, 100, 64)).all()
    assert (offsets != window_offsets(7, 4, 10_000, 100, 64)).any()
    assert (offsets != window_offsets(8, 3, 10_000, 100, 64)).any()
    # A smaller batch is the beginning of a larger one.
    assert (offsets[:16] == window_offsets(7, 3, 10_000, 100, 16)).all()


def test_data_order_is_pinned() -> None:
    """Compare with stored raw outputs of Philox: another numpy must not change the data order."""
    assert window_offsets(1337, 0, 1_000_000, 1024, 4).tolist() == [460361, 20435, 244846, 713893]
    assert probe_seed(1337, 5) == 6691736118569138928


def test_offsets_cover_all_windows_evenly() -> None:
    offsets = np.concatenate([window_offsets(0, step, 50, 10, 1000) for step in range(20)])
    counts = np.bincount(offsets, minlength=40)
    assert len(counts) == 40  # 0 to 39: the last window is tokens 39 to 49
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 73  # 0.999 quantile for 39 degrees of freedom


@pytest.mark.parametrize(("world_size", "micro"), [(1, 24), (1, 6), (2, 4), (3, 8), (4, 1)])
def test_ranks_and_micro_batches_partition_the_batch_in_order(world_size: int, micro: int) -> None:
    batch = np.arange(24)
    parts = []
    for rank in range(world_size):
        parts += [batch[rows] for rows in rank_slices(24, micro, Ranks(rank, world_size))]
    assert np.concatenate(parts).tolist() == batch.tolist()
    assert {len(part) for part in parts} == {micro}


def test_label_uniforms_are_uniform_and_independent_of_the_batch_size() -> None:
    uniforms = label_uniforms(0, 0, 100, 1000)
    assert uniforms.dtype == np.float32
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert np.abs(np.histogram(uniforms, 10)[0] / 10_000 - 1).max() < 0.05
    assert (uniforms[:3] == label_uniforms(0, 0, 3, 1000)).all()
    assert len({probe_seed(0, step) for step in range(100)}) == 100


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    tokens = open_tokens(write(tmp_path, np.arange(50)), "train", 50, 8)
    x, y = read_windows(tokens, np.array([0, 41]), 8, 50)
    assert x.tolist() == [list(range(8)), list(range(41, 49))]
    assert y.tolist() == [list(range(1, 9)), list(range(42, 50))]
    assert x.dtype == torch.int64


def shape(vocab_size: int, causal: bool = True) -> ModelConfig:
    return ModelConfig(
        n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=vocab_size, causal=causal
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_predicts_each_token_once(world_size: int) -> None:
    tokens = np.arange(100, dtype="<u2")  # 99 targets: 12 windows of 8, 3 tokens left over
    targets: list[int] = []
    for rank in range(world_size):
        for x, y in validation_windows(tokens, shape(100), 0, 5, Ranks(rank, world_size)):
            assert x.shape == y.shape == (5, 8)
            assert (y[y >= 0] == x[y >= 0] + 1).all()
            targets += y[y >= 0].tolist()
    assert sorted(targets) == list(range(1, 97))

    limited = [y for _, y in validation_windows(tokens, shape(100), 3, 5, Ranks())]
    assert torch.cat(limited)[:3].flatten().tolist() == list(range(1, 25))


def test_a_rank_without_validation_windows_yields_none() -> None:
    assert list(validation_windows(np.arange(20, dtype="<u2"), shape(20), 0, 5, Ranks(2, 3))) == []


def refused(folder: Path, match: str) -> None:
    """Check that a folder's train.bin is refused with a message of one line."""
    with pytest.raises(UserError, match=match) as error:
        open_tokens(folder, "train", 61, 16)
    assert "\n" not in str(error.value)


def write_meta(folder: Path, vocab_size: int, tokens: int) -> None:
    meta = {"vocab_size": vocab_size, "splits": {"train": {"tokens": tokens}}}
    (folder / "meta.json").write_text(json.dumps(meta))


def test_bad_token_files_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no such file; make it")
    write(tmp_path, [1] * 16)
    refused(tmp_path, "16 tokens, shorter than a window")
    write(tmp_path, [1] * 30 + [61] + [1] * 30)
    refused(tmp_path, "contains token 61, but model.vocab_size is 61")
    (tmp_path / "train.bin").write_bytes(b"\0" * 101)
    refused(tmp_path, "101 bytes instead of an even number")

    write(tmp_path, [1] * 100)
    write_meta(tmp_path, vocab_size=61, tokens=200)
    refused(tmp_path, "200 bytes instead of 400, as in its meta.json; truncated")
    write_meta(tmp_path, vocab_size=257, tokens=100)
    refused(tmp_path, "set model.vocab_size = 257")
    for broken in ("{", "[]", '{"splits": []}', '{"splits": {"train": {"tokens": "x"}}}'):
        (tmp_path / "meta.json").write_text(broken)
        refused(tmp_path, "meta.json")


def test_read_windows_refuses_a_token_outside_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains token 99, but model\.vocab_size is 61"):
        read_windows(np.full(50, 99, "<u2"), np.array([0]), 8, 61)


def test_masks_cover_15_percent_of_each_sequence_and_depend_only_on_seed_and_step() -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=40, vocab_size=100, causal=False)
    masked = masked_positions(1, 2, 1000, config)
    assert (masked.sum(1) == 6).all()
    assert masked.float().mean(0).sub(0.15).abs().max() < 0.05  # the same at every position
    assert torch.equal(masked[:10], masked_positions(1, 2, 10, config))
    assert not torch.equal(masked, masked_positions(1, 3, 1000, config))

    x = torch.arange(40).expand(1000, 40)
    inputs, targets = mask_tokens(x, masked, config.mask_token)
    assert torch.equal(torch.where(masked, targets, inputs), x)
    assert (inputs[masked] == 99).all()
    assert (targets[~masked] == -1).all()


@pytest.mark.parametrize("world_size", [1, 3])
def test_masked_validation_has_the_same_targets_on_any_number_of_ranks(world_size: int) -> None:
    tokens = np.arange(99, dtype="<u2")
    config = shape(100, causal=False)

    targets = []
    for rank in range(world_size):
        for _, y in validation_windows(tokens, config, 0, 5, Ranks(rank, world_size)):
            targets += y[y >= 0].tolist()
    assert len(targets) == 12  # one of each window of 8

    whole = validation_windows(tokens, config, 0, 12, Ranks())
    assert sorted(targets) == sorted(y[y >= 0].tolist() for _, y in whole)[0]
