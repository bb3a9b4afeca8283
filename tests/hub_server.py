"""A local server that speaks the Hugging Face hub's protocol for downloads, with faults.

A file is asked for at /datasets/…/resolve/…, which answers with its size and sha256 and redirects
to another address, where it can be read from any position. The client finds the server through
HF_ENDPOINT.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data.hub import OPENWEBTEXT, HubDataset

RETRY_AFTER = 2  # seconds
CHUNK = 10_000  # bytes that small_hub.py writes to the disk at once


class HubServer(ThreadingHTTPServer):
    """Serves files by the names of a dataset's shards.

    Args:
        dataset: whose shards they are.
        files: content by the name of a shard.
        faults: by the name of a shard, what happens in its first downloads, one after the other:
            "truncate" sends a third and closes the connection, "delay" stops for three seconds in
            the middle, "flip" changes a byte, and a number is answered as an HTTP status.
    """

    daemon_threads = True

    def __init__(
        self,
        dataset: HubDataset,
        files: dict[str, bytes],
        faults: dict[str, list[str | int]],
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.dataset = dataset
        self.files = files
        self.faults = {name: list(planned) for name, planned in faults.items()}
        self.log: list[tuple[float, str, int]] = []  # time, shard, first byte of each download

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def starts(self, name: str) -> list[int]:
        """Return the first byte of each download of a shard."""
        return [start for _, shard, start in self.log if shard == name]


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self.resolve()

    def do_GET(self) -> None:
        if self.path.startswith("/cdn/"):
            self.send_file(self.path.removeprefix("/cdn/"))
        else:
            self.resolve()

    def resolve(self) -> None:
        """Redirect to the file's address, with its size and sha256."""
        dataset = self.server.dataset
        name = self.path.partition(f"/datasets/{dataset.hub_id}/resolve/{dataset.revision}/")[2]
        if name not in self.server.files:
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
            return
        content = self.server.files[name]
        headers = {
            # Another host, as with the hub: its client follows only redirects of the same host
            # when it asks for a file's size.
            "Location": f"http://localhost:{self.server.server_address[1]}/cdn/{name}",
            "X-Repo-Commit": dataset.revision,
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        self.answer(302, headers)

    def send_file(self, name: str) -> None:
        """Send a file from the position that is asked for, with the next planned fault."""
        content = self.server.files[name]
        asked = self.headers.get("Range", "bytes=0-")
        start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.server.log.append((time.monotonic(), name, start))
        planned = self.server.faults.get(name, [])
        fault = planned.pop(0) if planned else None
        if isinstance(fault, int):
            self.answer(fault, {"Retry-After": str(RETRY_AFTER)})
            return

        body = content[start:]
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        third = len(body) // 3
        self.wfile.write(body[:third])
        self.wfile.flush()
        if fault == "truncate":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "delay":
            time.sleep(3)
        self.wfile.write(body[third:])

    def answer(self, status: int, headers: dict[str, str]) -> None:
        """Send a response without a body."""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def serve_hub(
    folder: Path,
    faults: dict[str, list[str | int]] | None = None,
    dataset: HubDataset = OPENWEBTEXT,
) -> Iterator[HubServer]:
    """Serve a folder's parquet files, in their order, as the dataset's first shards."""
    paths = sorted(folder.glob("*.parquet"))
    files = {dataset.shards[i]: path.read_bytes() for i, path in enumerate(paths)}
    server = HubServer(dataset, files, faults or {})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
