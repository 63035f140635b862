"""A small Hub on 127.0.0.1 for the real huggingface_hub client. It keeps every commit, and every byte that it is sent.

Written after what the client asks: `huggingface_hub/hf_api.py`, `_commit_api.py`, `lfs.py` and `file_download.py`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from fake_repository import Commit, Repository, describe_file, git_hash, is_lfs, upload_mode

TOKEN = "hf_CanaryCanaryCanaryCanary00"
OWNER = "user"
HOLD_SECONDS = 0.6


class FakeHub:
    """The server. `fault(request number, method, path)` names what goes wrong with a request, or None.

    Faults: a status as text ("429", "503"); "reset" breaks the connection before the request is done, "lost" after it;
    "hold" lets the client wait until it gives up; "kill" and "kill after" end the client before and after it is done,
    in this process by the flag `killed`, or by a real signal to `pid`.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.received: list[bytes] = []
        self.fault: Callable[[int, str, str], str | None] = lambda number, method, path: None
        self.echo = ""
        self.killed = False
        self.pid: int | None = None
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def make(self, kind: str, name: str, files: dict[str, bytes], *, private: bool = True) -> Repository:
        """A repository that somebody else has made."""
        repository = Repository(name, private)
        repository.add("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        if files:
            repository.add("upload", {**repository.commits[-1].files, **files})
        self.repositories[kind, name] = repository
        return repository

    def count(self, method: str, pattern: str) -> int:
        return sum(verb == method and re.search(pattern, path) is not None for verb, path in self.requests)


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    try:
        yield hub
    finally:
        hub.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's acknowledgement
    wbufsize = -1
    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        return None

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        body = self._read_body()
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            self.hub.received.append(self.path.encode() + b"\n" + body)
            fault = self.hub.fault(len(self.hub.requests), self.command, path)
        if fault in ("reset", "kill", "hold"):
            if fault == "hold":
                time.sleep(HOLD_SECONDS)
            self._die(fault)
            return
        if fault is not None and fault.isdigit():
            self._answer(int(fault), {"error": f"no luck {self.hub.echo}"})
            return
        with self.hub.lock:
            status, content, headers = self._respond(path, body)
        if fault in ("lost", "kill after"):
            self._die(fault)
            return
        self._answer(status, content, headers)

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _die(self, fault: str) -> None:
        if fault.startswith("kill"):
            if self.hub.pid is not None:
                os.kill(self.hub.pid, signal.SIGKILL)
            else:
                self.hub.killed = True
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _respond(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body)) if is_known else (401, {"error": "who?"}, {})
        blob = re.fullmatch(r"/lfs/([0-9a-f]{64})(/verify)?", path)
        if blob:
            return self._take_blob(blob[1], body, verify=bool(blob[2]))
        found = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+?)(?:/(revision|preupload|commit|branch)/(.+))?", path)
        if found:
            kind, name, action, revision = found.groups()
        else:
            found = re.fullmatch(
                r"/(datasets/)?([^/]+/[^/]+?)(\.git/info/lfs/objects/batch|/resolve/([^/]+)/(.+))", path
            )
            if not found:
                return 404, {"error": f"no such route {path}"}, {}
            kind, name, revision = "dataset" if found[1] else "model", found[2], found[4] or "main"
            action = "resolve" if found[4] else "batch"
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and not is_known):
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if action == "branch":
            return self._branch(repository, revision) if is_known else (403, {"error": "no permission"}, {})
        commit = repository.at(revision or "main")
        if commit is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        if action in ("preupload", "commit", "batch") and not is_known:
            return 403, {"error": "no permission"}, {}
        if action == "resolve":
            return self._resolve(commit, found[5])
        if action == "preupload":
            return 200, {"files": [upload_mode(commit, file["path"]) for file in json.loads(body)["files"]]}, {}
        if action == "batch":
            return (
                200,
                {"transfer": "basic", "objects": [self._offer(each) for each in json.loads(body)["objects"]]},
                {},
            )
        if action == "commit":
            return self._commit(repository, revision, f"{'datasets/' if kind == 'dataset' else ''}{name}", body)
        siblings = [describe_file(file, data) for file, data in commit.files.items()]
        return 200, {"id": name, "sha": commit.sha, "private": repository.private, "siblings": siblings}, {}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or OWNER}/{asked['name']}"
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            return 409, {"error": "You already created this repo", "url": url}, {}
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.make(kind, name, {}, private=private)
        return 200, {"url": url}, {}

    def _branch(self, repository: Repository, branch: str) -> tuple[int, Any, dict[str, str]]:
        if branch in repository.branches:
            return 409, {"error": "Reference already exists"}, {}
        repository.branches[branch] = repository.branches["main"]
        return 200, {}, {}

    def _take_blob(self, oid: str, body: bytes, *, verify: bool) -> tuple[int, Any, dict[str, str]]:
        if verify:
            return (200, {}, {}) if oid in self.hub.blobs else (404, {"error": "not uploaded"}, {})
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "sha256 mismatch"}, {}
        self.hub.blobs[oid] = body
        return 200, {}, {}

    def _offer(self, asked: dict[str, Any]) -> dict[str, Any]:
        oid = asked["oid"]
        answer: dict[str, Any] = {"oid": oid, "size": asked["size"]}
        if oid not in self.hub.blobs:
            href = f"{self.hub.endpoint}/lfs/{oid}"
            answer["actions"] = {"upload": {"href": href}, "verify": {"href": href + "/verify"}}
        return answer

    def _commit(self, repository: Repository, branch: str, page: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if branch not in repository.branches:
            return 400, {"error": "a commit goes to a branch"}, {}
        lines = [json.loads(line) for line in body.splitlines()]
        header, files = lines[0]["value"], dict(repository.branches[branch].files)
        if header.get("parentCommit") not in (None, repository.branches[branch].sha):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.hub.received.append(files[value["path"]])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return 400, {"error": f"{value['path']} was not uploaded"}, {}
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif kind == "deletedFile":
                if files.pop(value["path"], None) is None:
                    return 400, {"error": "A file with this name doesn't exist"}, {}
            else:
                return 400, {"error": f"unknown operation {kind}"}, {}
        commit = repository.add(header["summary"], files, branch)
        return 200, {"commitUrl": f"{self.hub.endpoint}/{page}/commit/{commit.sha}", "commitOid": commit.sha}, {}

    def _resolve(self, commit: Commit, path: str) -> tuple[int, Any, dict[str, str]]:
        data = commit.files.get(path)
        if data is None:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.sha}
        etag = hashlib.sha256(data).hexdigest() if is_lfs(path) else git_hash(data)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{etag}"'}
        if is_lfs(path):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        return 200, data, headers
