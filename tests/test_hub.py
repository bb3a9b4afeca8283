"""Test downloads from the hub against a local server that speaks its protocol."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import hub
from data.hub import FINEWEB_EDU, OPENWEBTEXT
from tests.conftest import ROOT
from tests.hub_server import CHUNK, RETRY_AFTER, HubServer, serve_hub

PAUSES = ("0.1", "0.1", "0.1", "0.1")
LIMIT = 5 * 30
SHARDS = OPENWEBTEXT.shards
NAMES = [Path(shard).name for shard in SHARDS]
SMALL = replace(OPENWEBTEXT, documents=30 * len(SHARDS))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write five shards of 30 documents that do not compress."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for index in range(5):
        texts = [rng.bytes(2000).hex() for _ in range(30)]
        pq.write_table(pa.table({"text": texts}), folder / f"{index}.parquet")
    return folder


def start(
    address: str,
    out: Path,
    *arguments: str,
    pauses: tuple[str, ...] = PAUSES,
    folder: str = "openwebtext",
) -> subprocess.Popen:
    """Start prepare.py with the server at `address` as its hub."""
    command = [sys.executable, str(ROOT / "tests/small_hub.py"), *pauses, "--", folder]
    command += ["--limit", str(LIMIT), "--out", str(out), "--workers", "1", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": address}
    environment |= {"HF_HOME": str(out.parent / "cache"), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def prepare(*arguments, **options) -> tuple[int, str]:
    """Return the status of prepare.py, and what it prints."""
    process = start(*arguments, **options)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output + errors


def hashes(out: Path) -> dict[str, str]:
    splits = json.loads((out / "meta.json").read_text())["splits"]
    return {split: facts["sha256"] for split, facts in splits.items()}


def received(server: HubServer) -> int:
    """Return how much of the first shard is on the disk after a truncated download."""
    third = len(server.files[SHARDS[0]]) // 3
    return third // CHUNK * CHUNK


@pytest.fixture(scope="module")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the hashes of a preparation without faults."""
    out = tmp_path_factory.mktemp("expected") / "data"
    with serve_hub(shards) as server:
        status, text = prepare(server.address, out)
        assert status == 0, text
        assert "GB of downloads at a time" in text
        assert [server.starts(name) for name in SHARDS[:5]] == [[0]] * 5
    # Downloads are removed once they are read.
    assert {path.name for path in out.iterdir()} == {"train.bin", "val.bin", "meta.json"}

    # The data is complete: the same command needs no hub.
    assert prepare(server.address, out)[0] == 0
    return hashes(out)


def test_faults_change_nothing(shards: Path, expected: dict[str, str], tmp_path: Path) -> None:
    faults: dict[str, list[str | int]] = {
        SHARDS[0]: ["truncate", 503],
        SHARDS[1]: ["delay", 500, 502, 504],
        SHARDS[2]: ["flip"],
        SHARDS[3]: [429],
        SHARDS[4]: ["truncate", "truncate", 503, "truncate", 503],
    }
    with serve_hub(shards, faults) as server:
        status, text = prepare(server.address, tmp_path / "data")
        assert status == 0, text
        assert hashes(tmp_path / "data") == expected
        assert not any(server.faults.values())  # all of them have happened

    # Continued, not begun again.
    assert server.starts(SHARDS[0]) == [0, received(server), received(server)]
    assert server.starts(SHARDS[4])[-1] > 2 * received(server)

    # What has failed is named, with the shard and the attempt.
    assert f"{NAMES[0]}: attempt 1 of 5 failed (HTTP 503)" in text
    assert f"{NAMES[1]}: attempt 3 of 5 failed (HTTP 504)" in text
    assert f"{NAMES[2]}: attempt 1 of 5 failed (its sha256 is not the hub's)" in text

    # Servers that ask for patience get it.
    times = [moment for moment, name, _ in server.log if name == SHARDS[3]]
    assert times[1] - times[0] >= RETRY_AFTER


def test_next_shards_are_downloaded_ahead(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "downloads"
    with serve_hub(shards) as server, pytest.MonkeyPatch.context() as patch:
        use_server(patch, server, tmp_path)
        readers = hub.hub_shards(SMALL, folder, LIMIT, keep=False)
        reader = readers[0]()
        next(reader)
        wait_for_files(folder, 3)
        assert {path.name for path in folder.iterdir()} == set(NAMES[:3])

        # When one was read, it is removed; the next reader starts another download.
        assert sum(1 for _ in reader) == 29
        next(readers[1]())
        wait_for_files(folder, 3)
        assert {path.name for path in folder.iterdir()} == set(NAMES[1:4])

    # No more than the documents need.
    with serve_hub(shards) as server, pytest.MonkeyPatch.context() as patch:
        use_server(patch, server, tmp_path)
        next(hub.hub_shards(SMALL, tmp_path / "few", 31, keep=False)[0]())
        wait_for_files(tmp_path / "few", 2)
        time.sleep(0.5)
        assert len(list((tmp_path / "few").iterdir())) == 2


def use_server(patch: pytest.MonkeyPatch, server: HubServer, folder: Path) -> None:
    """Make the hub's client in this process use the server."""
    import huggingface_hub.constants as constants

    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", server.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))


def wait_for_files(folder: Path, count: int) -> None:
    for _ in range(300):
        if len(list(folder.glob("*.parquet"))) == count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{list(folder.iterdir())} instead of {count} files")


def test_fineweb_edu_is_prepared_from_its_own_shards(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    with serve_hub(shards, dataset=FINEWEB_EDU) as server:
        status, text = prepare(server.address, out, folder="fineweb_edu")
    assert status == 0, text
    source = json.loads((out / "meta.json").read_text())["recipe"]["source"]
    assert source == {"hub": FINEWEB_EDU.hub_id, "revision": FINEWEB_EDU.revision}
    assert "nanoGPT" not in text


def test_killed_download_is_continued(
    shards: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    with serve_hub(shards, {SHARDS[0]: ["truncate", 503, 503, 503, 503]}) as server:
        process = start(server.address, out, pauses=("60",))
        unfinished = out / f"downloads/{NAMES[0]}.partial"
        while not unfinished.exists() or unfinished.stat().st_size == 0:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    with serve_hub(shards) as server:
        status, text = prepare(server.address, out, "--keep-downloads")
        assert status == 0, text
        assert server.starts(SHARDS[0]) == [received(server)]
    assert hashes(out) == expected

    # Kept downloads stay, also if the same command is repeated without the option.
    assert prepare("http://127.0.0.1:9", out)[0] == 0
    assert {path.name for path in (out / "downloads").iterdir()} == set(NAMES[:5])


@pytest.mark.slow
def test_hopeless_downloads_end_in_one_line(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"

    def error(address: str, *pauses: str) -> str:
        status, text = prepare(address, out, pauses=pauses)
        assert status == 2, text
        assert "Traceback" not in text
        # Nothing is left that would block the preparation of other data.
        assert not (out / "progress.json").exists()
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        return line

    # 404 at once; a server that only fails, after all attempts.
    with serve_hub(tmp_path) as server:
        assert "download failed in attempt 1 (HTTP 404)" in error(server.address, "60")
    with serve_hub(shards, {SHARDS[0]: [503, 503, 503]}) as server:
        assert "download failed in attempt 3 (HTTP 503)" in error(server.address, "0.1", "0.1")

    # Without a network.
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        line = error(address, "0.1", "0.1")
    assert "download failed in attempt 3 (" in line
    assert "run the same command again to continue, or use local files with --files" in line


def test_pauses_last_for_minutes() -> None:
    assert 300 <= sum(hub.PAUSES) <= 1200
    assert max(hub.PAUSES) <= 60


def test_too_little_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out, documents = tmp_path / "out", OPENWEBTEXT.documents
    arguments = (OPENWEBTEXT, out, out / "downloads", documents)
    monkeypatch.setattr("shutil.disk_usage", lambda path: FakeUsage(free=30 * 10**9))
    hub.check_disk(*arguments, keep=False)
    assert "18.1 GB of tokens, and at most 0.9 GB of downloads" in capsys.readouterr().out
    with pytest.raises(hub.UserError, match=r"has 30 GB free, 12\.1 GB too few"):
        hub.check_disk(*arguments, keep=True)

    # What is there already is not needed again.
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/train.bin.partial", "wb") as file:
        file.truncate(13 * 10**9)
    hub.check_disk(*arguments, keep=True)


class FakeUsage:
    """What shutil.disk_usage returns."""

    def __init__(self, free: int) -> None:
        self.free = free
