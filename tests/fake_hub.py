"""A small Hub on 127.0.0.1 for the real huggingface_hub client. It keeps every commit, and every byte that it is sent.

Written after what the client asks: `huggingface_hub/hf_api.py`, `_commit_api.py`, `lfs.py` and `file_download.py`.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_CanaryCanaryCanaryCanary00"
OWNER = "user"
HOLD_SECONDS = 0.6
Answer = tuple[int, Any, dict[str, str]]


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A repository, its history, oldest first, and where its branches stand."""

    name: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, Commit] = field(default_factory=dict)

    def add(self, title: str, files: dict[str, bytes], branch: str = "main") -> Commit:
        tree = sorted((path, git_hash(data)) for path, data in files.items())
        sha = hashlib.sha1(json.dumps([self.name, title, tree, len(self.commits)]).encode()).hexdigest()
        self.branches[branch] = Commit(sha, title, files)
        self.commits.append(self.branches[branch])
        return self.commits[-1]


class FakeHub:
    """The server. `fault(request number, method, path)` names what goes wrong with a request, or None.

    Faults: a status as text ("429", "503"); "reset" breaks the connection before the request is done, "lost" after it;
    "hold" lets the client wait until it gives up; "kill" and "kill after" end the client before and after it is done.
    """

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.echo = ""
        self.lock = threading.RLock()
        self.empty()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def empty(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.killed = False
        self.fail()

    def fail(self, *faults: str | None) -> None:
        """The next requests meet these faults, one each, and those after them none."""
        rest = iter(faults)
        self.fault: Callable[[int, str, str], str | None] = lambda number, method, path: next(rest, None)

    def make(self, kind: str, name: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        repository = self.repositories[kind, name] = Repository(name, private)
        repository.add("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        if files:
            repository.add("upload", {**repository.commits[-1].files, **files})
        return repository

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        newest = self.repositories[kind, name].commits[-1].files
        return {path: data for path, data in newest.items() if path != ".gitattributes"}

    def count(self, method: str, pattern: str) -> int:
        return sum(verb == method and re.search(pattern, path) is not None for verb, path in self.requests)


class Killed(BaseException):
    """Stands for the end of the pushing process: nothing may catch it, and nothing is sent after it."""


@contextmanager
def running_hub(monkeypatch: Any, cache: Any, *, seconds: float = 60) -> Iterator[FakeHub]:
    """The Hub, and the client, which read its environment long ago, turned to it; it does not sleep between tries."""
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http, httpx

    from quantkd import remote

    hub = FakeHub()
    settings = {
        "ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_TOKEN_PATH": str(cache / "no-token"), "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)  # the instance behind `file_exists`, which PEFT calls
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    sleepless = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, file_download, remote):
        monkeypatch.setattr(module, "time", sleepless)

    def die(request: Any) -> None:
        if hub.killed:
            raise Killed

    hooks: Any = {"request": [_http.hf_request_event_hook, die]}
    options: Any = {"follow_redirects": True, "timeout": seconds, "trust_env": False}
    huggingface_hub.set_client_factory(lambda: httpx.Client(event_hooks=hooks, **options))
    try:
        yield hub
    finally:
        huggingface_hub.set_client_factory(_http.default_client_factory)
        hub.server.shutdown()
        hub.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's acknowledgement
    wbufsize = -1
    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        return None

    def do_GET(self) -> None:
        body = self._read_body()
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            self.hub.received.append(self.path.encode() + b"\n" + body)
            fault = self.hub.fault(len(self.hub.requests), self.command, path) or ""
        if fault == "hold":
            time.sleep(HOLD_SECONDS)
        if fault in ("reset", "kill", "hold"):
            return self._die(fault)
        if fault.isdigit():
            return self._answer(int(fault), {"error": f"no luck {self.hub.echo}"}, {})
        with self.hub.lock:
            answer = self._respond(path, body)
        return self._die(fault) if fault else self._answer(*answer)

    do_HEAD = do_POST = do_PUT = do_GET

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _die(self, fault: str) -> None:
        self.hub.killed = fault.startswith("kill")
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _respond(self, path: str, body: bytes) -> Answer:
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body)) if is_known else refuse(401, "who?")
        if path.startswith("/lfs/"):
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/lfs/"):
                return refuse(400, "sha256 mismatch")
            self.hub.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}, {}
        api = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+?)(?:/(revision|preupload|commit|branch)/(.+))?", path)
        page = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+?)(\.git/info/lfs/objects/batch|/resolve/([^/]+)/(.+))", path)
        if api:
            kind, name, action, revision = api.groups()
        elif page:
            kind, name, revision = "dataset" if page[1] else "model", page[2], page[4]
            action = "resolve" if page[4] else "batch"
        else:
            return refuse(404, f"no such route {path}")
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and not is_known):
            return refuse(404, "Repository not found", "RepoNotFound")
        if action in ("branch", "preupload", "commit", "batch") and not is_known:
            return refuse(403, "no permission")
        if action == "branch" and revision in repository.branches:
            return refuse(409, "Reference already exists")
        if action == "branch":
            repository.branches[revision] = repository.branches["main"]
            return 200, {}, {}
        shas = {commit.sha: commit for commit in repository.commits}
        commit = {**shas, **repository.branches}.get(revision or "main")
        if commit is None:
            return refuse(404, "Invalid rev id", "RevisionNotFound")
        if action == "resolve":
            return self._resolve(commit, page[5])
        if action == "commit":
            return self._commit(repository, revision, f"{'datasets/' if kind == 'dataset' else ''}{name}", body)
        if action == "batch":
            return 200, {"transfer": "basic", "objects": [*map(self._offer, json.loads(body)["objects"])]}, {}
        if action == "preupload":
            modes = [{"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False,
                      "oid": oid_of(path, commit.files[path]) if path in commit.files else None}
                     for path in (file["path"] for file in json.loads(body)["files"])]  # fmt: skip
            return 200, {"files": modes}, {}
        files = [{"rfilename": path, "size": len(data), "blobId": git_hash(data), "lfs":
                  {"sha256": oid_of(path, data), "size": len(data), "pointerSize": 130} if is_lfs(path) else None}
                 for path, data in commit.files.items()]  # fmt: skip
        return 200, {"id": name, "sha": commit.sha, "private": repository.private, "siblings": files}, {}

    def _create(self, asked: dict[str, Any]) -> Answer:
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or OWNER}/{asked['name']}"
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            return 409, {"error": "You already created this repo", "url": url}, {}
        self.hub.make(kind, name, {}, private=asked.get("visibility") == "private" or asked.get("private") is True)
        return 200, {"url": url}, {}

    def _offer(self, asked: dict[str, Any]) -> dict[str, Any]:
        actions = {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}}
        return {**asked, **({} if asked["oid"] in self.hub.blobs else {"actions": actions})}

    def _commit(self, repository: Repository, branch: str, page: str, body: bytes) -> Answer:
        if branch not in repository.branches:
            return refuse(400, "a commit goes to a branch")
        lines = [json.loads(line) for line in body.splitlines()]
        header, files = lines[0]["value"], dict(repository.branches[branch].files)
        if header.get("parentCommit") not in (None, repository.branches[branch].sha):
            return refuse(412, "A commit has happened since. Please refresh and try again.")
        for kind, value in ((line["key"], line["value"]) for line in lines[1:]):
            path = value["path"]
            if kind == "file":
                files[path] = base64.b64decode(value["content"])
                self.hub.received.append(files[path])
            elif kind == "lfsFile" and value["oid"] in self.hub.blobs:
                files[path] = self.hub.blobs[value["oid"]]
            elif kind == "deletedFile" and path in files:
                del files[path]
            else:
                return refuse(400, f"{kind} of {path}: not uploaded, not there, or unknown")
        commit = repository.add(header["summary"], files, branch)
        return 200, {"commitUrl": f"{self.hub.endpoint}/{page}/commit/{commit.sha}", "commitOid": commit.sha}, {}

    def _resolve(self, commit: Commit, path: str) -> Answer:
        data, headers = commit.files.get(path), {"X-Repo-Commit": commit.sha}
        if data is None:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **headers}
        headers["ETag"] = f'"{oid_of(path, data)}"'
        if is_lfs(path):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        return 200, data, headers


def refuse(status: int, error: str, code: str | None = None) -> Answer:
    return status, {"error": error}, {"X-Error-Code": code} if code else {}


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".model"))


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid_of(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if is_lfs(path) else git_hash(data)
