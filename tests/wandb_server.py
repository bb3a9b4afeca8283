"""A stand-in for wandb's service: enough of its GraphQL and file_stream for wandb 0.31.

It keeps the history of each run by line number, as the real one does, and counts how often a line
has arrived. The client finds it through WANDB_BASE_URL. It returns all fields of a run, whatever a
query asks for, so it would not notice a query that is wrong.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY = "wandb-history.jsonl"
SUMMARY = "wandb-summary.json"
EVENTS = "wandb-events.jsonl"
LOG = "output.log"
OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")


@dataclass
class ServedRun:
    """What the service knows about a run."""

    name: str
    display_name: str
    group: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)  # lines
    arrivals: dict[int, int] = field(default_factory=dict)  # _step → how often its row arrived
    state: str = "running"
    uploads: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files.get(HISTORY, []) if line]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.files.get(SUMMARY, [])
        return json.loads(lines[-1]) if lines else {}


class WandbServer(ThreadingHTTPServer):
    """Serves one project. `misbehave` lets it fail for a time."""

    daemon_threads = True

    def __init__(self, project: str = "sophia-gpt2") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.project = project
        self.runs: dict[str, ServedRun] = {}
        self.operations: list[str] = []  # names of all GraphQL operations so far
        self.unknown: list[str] = []  # those that the server cannot answer
        self.lock = threading.RLock()
        self.fault = "none"
        self.fault_ends = 0.0

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a process uses this server."""
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return {"WANDB_BASE_URL": url, "WANDB_API_KEY": 40 * "a", "NETRC": "/dev/null"}

    def misbehave(self, fault: str, seconds: float = 1e6) -> None:
        """Answer with status 500 ("error"), or not at all ("hang"), for some seconds."""
        self.fault, self.fault_ends = fault, time.monotonic() + seconds

    @property
    def current_fault(self) -> str:
        return self.fault if time.monotonic() < self.fault_ends else "none"


# ---- GraphQL -------------------------------------------------------------------------------------


def answer_query(server: WandbServer, query: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Return the data of a GraphQL operation."""
    operation = OPERATION.search(query)
    name = operation[1] if operation else "?"
    server.operations.append(name)
    keys = ("name", "run", "runName", "runId")
    run_name = next((variables[key] for key in keys if variables.get(key)), "")
    run = server.runs.get(run_name)

    if name == "UpsertBucket":
        return upsert(server, run_name, variables)
    if name == "RunResumeStatus":
        return {"model": project_of(server) | {"bucket": run and describe(server, run)}}
    if name in ("Viewer", "GetViewer", "GetDefaultEntity"):
        return {"viewer": VIEWER}
    if name == "ServerFeaturesQuery":
        return {"serverInfo": {"features": []}}
    if name == "OrganizationCoreWeaveOrganizationID":
        return {"entity": None}
    if name == "RunStoppedStatus":
        return {"project": {"run": {"stopped": False}}}
    if name == "CreateRunFiles":
        return {"createRunFiles": create_files(server, variables)}
    if name == "HistoryPage":
        assert run is not None
        low, high = variables["minStep"], variables["maxStep"]
        lines = [json.dumps(row) for row in run.rows if low <= row["_step"] < high]
        return {"project": {"run": {"history": lines}}}
    if name == "RunParquetHistory":
        live = [{"_step": 0}]
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": live}}}}
    if name in ("Run", "RunHistoryKeys", "RunState"):
        return {"project": {"run": run and describe(server, run)}}
    if name == "Runs":
        return {"project": list_runs(server, variables)}
    server.unknown.append(name)
    return {}


VIEWER = {
    "id": "VXNlcjox",
    "entity": "e",
    "username": "e",
    "name": "e",
    "email": "e@x",
    "flags": "{}",
    "admin": False,
    "deletedAt": None,
    "teams": {"edges": []},
    "apiKeys": {"edges": []},
}


def project_of(server: WandbServer) -> dict[str, Any]:
    entity = {"id": "RW50aXR5OjE=", "name": "e"}
    return {"id": "UHJvamVjdDox", "name": server.project, "entity": entity}


def upsert(server: WandbServer, name: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Create a run, or change one."""
    is_new = name not in server.runs
    run = server.runs.setdefault(name, ServedRun(name, name))
    run.group = variables.get("groupName") or run.group
    run.display_name = variables.get("displayName") or run.display_name
    if variables.get("config"):
        run.config = json.loads(variables["config"])
    run.state = "running"
    return {"upsertBucket": {"bucket": describe(server, run), "inserted": is_new}}


def create_files(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    """Return addresses to which files can be uploaded."""
    port = server.server_address[1]
    files = []
    for name in variables["files"]:
        url = f"http://127.0.0.1:{port}/storage/{variables['run']}/{name}"
        files.append({"name": name, "uploadUrl": url})
    return {"runID": "1", "uploadHeaders": [], "files": files}


def list_runs(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    """Return the runs of a group, or all."""
    group = json.loads(variables.get("filters") or "{}").get("group")
    edges: list[dict[str, Any]] = []
    for run in server.runs.values():
        if group in (None, run.group):
            edges.append({"node": describe(server, run), "cursor": str(len(edges))})
    page = {"endCursor": None, "hasNextPage": False}
    runs = {"edges": edges, "pageInfo": page}
    return {"internalId": "1", "runCount": len(edges), "readOnly": False, "runs": runs}


def describe(server: WandbServer, run: ServedRun) -> dict[str, Any]:
    """Return a run with every field that any query asks for."""
    rows = run.rows
    keys: set[str] = set()
    for row in rows:
        keys |= row.keys()
    history, events, log = (run.files.get(name, []) for name in (HISTORY, EVENTS, LOG))
    types = {key: {"typeCounts": [{"type": "number"}]} for key in sorted(keys)}
    last_step = max((row["_step"] for row in rows), default=-1)

    return {
        "id": base64.b64encode(f"Run:v1:{run.name}".encode()).decode(),
        "name": run.name,
        "displayName": run.display_name,
        "group": run.group,
        "config": json.dumps(run.config),
        "summaryMetrics": json.dumps(run.summary),
        "systemMetrics": "{}",
        "state": run.state,
        "stopped": False,
        "readOnly": False,
        "project": project_of(server),
        "projectId": "1",
        "createdAt": "2026-01-01T00:00:00",
        "heartbeatAt": "2026-01-01T00:00:00",
        "user": {"name": "e", "username": "e"},
        "tags": [],
        "description": None,
        "notes": None,
        "sweepName": None,
        "jobType": None,
        "commit": None,
        "historyLineCount": len(history),
        "eventsLineCount": len(events),
        "logLineCount": len(log),
        "historyTail": json.dumps(history[-1:]),
        "eventsTail": json.dumps(events[-1:]),
        "wandbConfig": json.dumps({"t": 1}),
        "historyKeys": {"step": 0, "lastStep": last_step, "keys": types},
        "sampledParquetHistory": [],
    }


# ---- file_stream ---------------------------------------------------------------------------------


def receive_lines(server: WandbServer, name: str, body: dict[str, Any]) -> dict[str, Any]:
    """Store the lines of a run's files that a request brings, at their positions."""
    run = server.runs.setdefault(name, ServedRun(name, name))
    for file, part in body.get("files", {}).items():
        lines = run.files.setdefault(file, [])
        offset, content = part["offset"], part["content"]
        lines += [""] * (offset + len(content) - len(lines))
        lines[offset : offset + len(content)] = content
        for line in content if file == HISTORY else []:
            step = json.loads(line)["_step"]
            run.arrivals[step] = run.arrivals.get(step, 0) + 1
    if body.get("complete"):
        run.state = "finished" if body.get("exitcode") == 0 else "failed"
    return {"stopped": False}


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_GET(self) -> None:
        self.answer(200, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if "graphql" not in self.path and "file_stream" not in self.path:
            self.answer(200, {})  # reports about the client itself
            return

        content = json.loads(body)
        fault = self.server.current_fault
        while self.server.current_fault == "hang":
            time.sleep(0.2)
        if fault == "error":
            self.answer(500, {"error": "broken on purpose"})
            return
        with self.server.lock:
            if self.path.startswith("/graphql"):
                variables = content.get("variables") or {}
                result = {"data": answer_query(self.server, content["query"], variables)}
            else:
                result = receive_lines(self.server, self.path.split("/")[-2], content)
        self.answer(200, result)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name, _, file = self.path.removeprefix("/storage/").partition("/")
        with self.server.lock:
            if name in self.server.runs:
                self.server.runs[name].uploads.append(file)
        self.answer(200, {})

    def answer(self, status: int, content: object) -> None:
        """Send a JSON response."""
        data = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client has given up
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def serve_wandb() -> Iterator[WandbServer]:
    """Run a server in a thread."""
    server = WandbServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.misbehave("none")
        server.shutdown()
        server.server_close()
