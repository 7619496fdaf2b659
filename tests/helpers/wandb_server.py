"""A local W&B server for tests, with the part of the protocol that the wandb client needs.

It has runs with history and config, files, artifacts and their use, and saved views. Unknown queries get an empty
answer and are recorded in `unknown`. An API key other than `KEY` is refused with status 401, as at W&B.
"""

import base64
import gzip
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from wandb_artifacts import ENTITY, ArtifactAnswers

KEY = "k" * 40


@dataclass
class Run:
    """The data of a run."""

    project: str
    name: str
    sent: dict[str, Any] = field(default_factory=dict)
    """The latest value of each field: `displayName`, `groupName`, `jobType`, `tags`, ..."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The history."""
    summary: dict[str, Any] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    """Ids of the artifacts that the run used as input."""
    starts: int = 0
    """How often a client asked whether the run can be resumed."""

    @property
    def config(self) -> dict[str, Any]:
        return {key: entry["value"] for key, entry in json.loads(self.sent["config"]).items()}


class WandbServer(ArtifactAnswers):
    """Everything that clients have sent."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, Run] = {}
        self.files: dict[str, bytes] = {}
        """Path -> uploaded content."""
        self.views: list[dict[str, Any]] = []
        self.unknown: list[str] = []
        """Queries that got an empty answer."""
        self.refused = 0
        """Number of requests with a wrong key."""
        self.lock = threading.Lock()

    # --------------------------------------------------------------------------------------------------- queries

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to a GraphQL query."""
        name = (re.search(r"(?:query|mutation)\s+(\w+)", query) or ["", ""])[1]
        answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "Viewer": lambda _: {"viewer": self._viewer()},
            "GetDefaultEntity": lambda _: {"viewer": self._viewer()},
            "RunResumeStatus": self._resume_status,
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._run_files,
            "ArtifactType": self._artifact_type,
            "ArtifactMembershipByName": self._membership,
            "CreateArtifact": self._create_artifact,
            "CreateArtifactManifest": self._create_manifest,
            "CreateArtifactFiles": self._create_files,
            "CommitArtifact": self._commit,
            "UseArtifact": self._use,
            "UpsertView2": self._view,
            "upsertView": self._view,
            "ProjectInternalId": self._internal_id,
            "GetProjects": self._projects,
        }
        if name not in answers:
            self.unknown.append(f"{name}: {' '.join(query.split())} {variables}")
            return {}
        return answers[name](variables)

    def _viewer(self) -> dict[str, Any]:
        return {
            "id": "VXNlcjox",
            "entity": ENTITY,
            "username": ENTITY,
            "email": "somebody@example.org",
            "flags": "{}",
            "teams": {"edges": []},
        }

    def _project(self, project: str) -> dict[str, Any]:
        return {"id": project, "name": project, "entity": {"id": ENTITY, "name": ENTITY}}

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None:
            return {"model": {**self._project(variables["project"]), "bucket": None}}
        run.starts += 1
        bucket = {
            "id": run.name,
            "name": run.name,
            "displayName": run.sent.get("displayName"),
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyLineCount": len(run.rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run.rows[-1:]]),
            "eventsTail": "[]",
            "config": run.sent.get("config") or "{}",
            "tags": run.sent.get("tags") or [],
            "notes": "",
            "wandbConfig": '{"t": {}}',
        }
        return {"model": {**self._project(run.project), "bucket": bucket}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(variables["project"], name))
        run.sent |= {key: value for key, value in variables.items() if value is not None}
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.sent.get("displayName") or name,
            "description": "",
            "config": run.sent.get("config") or "{}",
            "sweepName": None,
            "project": self._project(run.project),
            "historyLineCount": len(run.rows),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": f"{self.url}/storage/{variables['run']}/{name}"} for name in variables["files"]
        ]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _use(self, variables: dict[str, Any]) -> dict[str, Any]:
        values = variables.get("input", variables)
        self.runs[values["runName"]].used.append(values["artifactID"])
        return {"useArtifact": {"artifact": {"id": values["artifactID"]}}}

    def _view(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.views.append(variables)
        copied = ("name", "displayName", "description", "spec")
        view = {
            "id": f"view{len(self.views)}",
            "project": self._project(variables["projectName"]),
            **{key: variables[key] for key in copied},
        }
        return {"upsertView": {"view": view, "inserted": True}}

    def _projects_with_runs(self) -> set[str]:
        return {run.project for run in self.runs.values()}

    def _internal_id(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["projectName"]
        return {"project": {"id": name, "internalId": name} if name in self._projects_with_runs() else None}

    def _projects(self, variables: dict[str, Any]) -> dict[str, Any]:
        at = "2026-01-01T00:00:00"
        nodes = [
            {"id": name, "name": name, "entityName": ENTITY, "createdAt": at, "isBenchmark": False, "user": None}
            for name in self._projects_with_runs()
        ]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": page, "edges": [{"node": node} for node in nodes]}}

    # --------------------------------------------------------------------------------------------------- streams

    def stream(self, run_name: str, content: dict[str, Any]) -> None:
        """Store rows of the history and the summary."""
        run = self.runs[run_name]
        for file, part in content.get("files", {}).items():
            if file == "wandb-history.jsonl":
                run.rows[part["offset"] :] = [json.loads(line) for line in part["content"]]
            elif file == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wandb: WandbServer

    def log_message(self, format: str, *args: Any) -> None:
        """Do not print requests."""

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        if not self._knows_the_key():
            self.wandb.refused += 1
            self._reply(401, {"errors": [{"message": "invalid API key"}]})
            return
        with self.wandb.lock:
            self._reply(200, self._answer(content))

    def _answer(self, content: bytes) -> dict[str, Any]:
        if self.path == "/graphql":
            request = json.loads(content)
            return {"data": self.wandb.answer(request["query"], request.get("variables") or {})}
        if match := re.fullmatch(r"/files/.*/([^/]+)/file_stream", self.path):
            self.wandb.stream(match[1], json.loads(content))
        return {}

    def do_PUT(self) -> None:
        with self.wandb.lock:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.wandb.files[self.path.removeprefix("/storage/")] = content
            self._reply(200, {})

    def _knows_the_key(self) -> bool:
        kind, _, key = self.headers.get("Authorization", "").partition(" ")
        expected = base64.b64encode(f"api:{KEY}".encode()).decode() if kind == "Basic" else KEY
        return key == expected or self.path.startswith("/sdk/otel")

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Http(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients close connections at any time
            super().handle_error(request, client_address)


@contextmanager
def serving() -> Iterator[WandbServer]:
    """Run a server on a free port, in a thread of this process."""
    wandb = WandbServer()
    http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"wandb": wandb}))
    wandb.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield wandb
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def md5(content: bytes) -> str:
    """The MD5 of a file in the format of W&B."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
