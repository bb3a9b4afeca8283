"""Download a dataset's parquet shards from the Hugging Face hub, ahead of their reader.

A broken download is continued where it broke off, also by another process, with growing pauses
between the attempts, until nothing has arrived for ten minutes.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data.documents import read_documents
from runtime.cli import UserError, reason

AHEAD = 2  # shards that are downloaded while an earlier one is tokenized
# Seconds between attempts, ten minutes in all.
PAUSES: tuple[float, ...] = (1, 2, 4, 8, 16, 32, *9 * [60])
MAX_RETRY_AFTER = 300  # seconds; a server that asks for more is asked again earlier
RETRIED = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses of temporary problems
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
DISK_ERRORS |= {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the hub at a pinned revision."""

    hub_id: str
    revision: str
    shards: tuple[str, ...]  # parquet files with a column named text
    documents: int
    size: float  # bytes of all shards
    tokens: float  # of GPT-2, about
    nanogpt_tokens: dict[str, int] = field(default_factory=dict)  # by split, if nanoGPT has it

    @property
    def shard_bytes(self) -> float:
        return self.size / len(self.shards)

    def shards_needed(self, n_documents: int) -> int:
        """Return how many shards have the first `n_documents`, on average."""
        return min(math.ceil(n_documents / self.documents * len(self.shards)), len(self.shards))


OPENWEBTEXT = HubDataset(
    hub_id="Skylion007/openwebtext",
    revision="79d93d786212f7344586290adb811d4ae6a1762c",
    shards=tuple(f"plain_text/train-{i:05d}-of-00080.parquet" for i in range(80)),
    documents=8_013_769,
    size=24e9,
    tokens=9.04e9,
    # From nanoGPT's README, for the archive's older order of documents.
    nanogpt_tokens={"train": 9_035_582_198, "val": 4_434_897},
)
FINEWEB_EDU = HubDataset(  # its sample of 10 billion tokens
    hub_id="HuggingFaceFW/fineweb-edu",
    revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    shards=tuple(f"sample/10BT/{i:03d}_00000.parquet" for i in range(14)),
    documents=9_672_101,
    size=28.5e9,
    tokens=10e9,
)


def hub_shards(
    dataset: HubDataset, folder: Path, n_documents: int, keep: bool
) -> list[Callable[[], Iterator[str]]]:
    """Return a reader for each of the dataset's shards.

    When one is called, the downloads of the next shards start, as far as `n_documents` need them.

    Args:
        dataset: what to download.
        folder: where the shards are downloaded to.
        n_documents: how many documents will be read, at most.
        keep: keep a shard in `folder` after it was read.
    """
    downloads: dict[int, Future[Path]] = {}
    needed = dataset.shards_needed(n_documents)

    def read(index: int) -> Iterator[str]:
        for following in range(index, min(index + AHEAD + 1, max(needed, index + 1))):
            if following not in downloads:
                downloads[following] = _in_background(partial(download, dataset, following, folder))
        if not downloads[index].done():
            tqdm.write(f"waiting for the download of {dataset.shards[index]}", file=sys.stderr)
        path = downloads.pop(index).result()
        yield from read_documents(path)
        if not keep and path.parent == folder:  # not one that was in the hub's cache before
            path.unlink()

    return [partial(read, index) for index in range(len(dataset.shards))]


def remove_downloads(dataset: HubDataset, folder: Path) -> None:
    """Remove the shards in a folder of downloads, whole or not, and the folder if it is empty."""
    for shard in dataset.shards:
        path = folder / Path(shard).name
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
    with suppress(OSError):  # missing, or with other files
        folder.rmdir()


def _in_background(function: Callable[[], Path]) -> Future[Path]:
    """Call the function in a thread that does not keep the process from exiting."""
    future: Future[Path] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


# ---- One shard -----------------------------------------------------------------------------------


def download(dataset: HubDataset, index: int, folder: Path) -> Path:
    """Return the path of a shard: in the hub's cache, or in `folder`, downloaded if necessary.

    Raises:
        UserError: if the hub refuses, the disk is full, or nothing has arrived for ten minutes.
    """
    import httpx2
    from huggingface_hub import try_to_load_from_cache

    shard, revision = dataset.shards[index], dataset.revision
    cached = try_to_load_from_cache(dataset.hub_id, shard, repo_type="dataset", revision=revision)
    if isinstance(cached, str):
        return Path(cached)

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(shard).name
    unfinished = path.with_name(path.name + ".partial")
    attempt = 1
    while not path.exists():
        before = _size(unfinished)
        try:
            _fetch(dataset, shard, unfinished)
            os.replace(unfinished, path)
        except (OSError, httpx2.HTTPError) as error:
            if _size(unfinished) > before:
                attempt = 1  # a part of the shard has arrived
            if attempt > len(PAUSES) or not _is_temporary(error):
                raise UserError(
                    f"{dataset.hub_id}/{shard}: download failed in attempt {attempt} "
                    f"({_problem(error)}); run the same command again to continue, or use local "
                    f"files with --files"
                ) from error
            pause = max(PAUSES[attempt - 1], _retry_after(error))
            message = f"attempt {attempt} of {len(PAUSES) + 1} failed ({_problem(error)})"
            tqdm.write(f"{path.name}: {message}, next in {pause} s", file=sys.stderr)
            time.sleep(pause)
            attempt += 1
    return path


def _fetch(dataset: HubDataset, shard: str, path: Path) -> None:
    """Download a shard to `path`, continuing after the bytes that are there.

    Raises:
        OSError, httpx2.HTTPError: if that fails, or the content is not the hub's.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars, logging

    disable_progress_bars()  # several downloads at once would overwrite each other's
    logging.set_verbosity_error()  # every retry would print several lines
    url = hf_hub_url(dataset.hub_id, shard, repo_type="dataset", revision=dataset.revision)
    metadata = get_hf_file_metadata(url)
    if metadata.size is not None and _size(path) > metadata.size:
        path.unlink()
    with open(path, "ab") as file:
        http_get(
            url,
            file,
            resume_size=file.tell(),
            headers=build_hf_headers(),
            expected_size=metadata.size,
        )

    # The hub's name for a large file is its sha256.
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    etag = metadata.etag or ""
    if len(etag) == len(sha256) and etag != sha256:
        path.unlink()
        raise OSError("its sha256 is not the hub's")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_temporary(error: Exception) -> bool:
    """Return whether another attempt may succeed."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in RETRIED
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return False
    return not isinstance(error, OfflineModeIsEnabled)


def _retry_after(error: Exception) -> float:
    """Return how many seconds the server asks to wait, or 0."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return 0
    text = error.response.headers.get("Retry-After", "")
    return min(int(text), MAX_RETRY_AFTER) if text.isdigit() else 0


def _problem(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        return f"HTTP {error.response.status_code}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.filename or 'disk'}: {error.strerror}"
    return reason(error)


# ---- Disk ----------------------------------------------------------------------------------------


def check_disk(dataset: HubDataset, out: Path, folder: Path, n_documents: int, keep: bool) -> None:
    """Print how much disk the preparation takes, and refuse it if there is not that much.

    Args:
        dataset: what is downloaded.
        out: the folder of the token files.
        folder: the folder of the downloads, in `out`.
        n_documents: how many documents are tokenized.
        keep: whether the downloads stay.

    Raises:
        UserError: if the disk of `out` has too little space.
    """
    needed = dataset.shards_needed(n_documents)
    tokens = 2 * dataset.tokens * n_documents / dataset.documents
    downloads = dataset.shard_bytes * (needed if keep else min(needed, AHEAD + 1))
    what = "kept" if keep else "each removed once it is read; --keep-downloads keeps them"
    print(
        f"{out}: {tokens / 1e9:.3g} GB of tokens, and at most {downloads / 1e9:.3g} GB of "
        f"downloads at a time ({what})"
    )

    written = [*out.glob("*.partial"), *out.glob("*.bin"), *folder.glob("*.parquet*")]
    present = sum(_size(path) for path in written)
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    missing = tokens + downloads - present - free
    if missing > 0:
        raise UserError(
            f"{out}: its disk has {free / 1e9:.3g} GB free, {missing / 1e9:.3g} GB too few; free "
            f"some space, choose another --out, or use fewer documents with --limit"
        )
