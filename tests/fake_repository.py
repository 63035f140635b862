"""What the small Hub of fake_hub.py keeps: repositories with their commits and branches, and how it lists files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Commit:
    """One revision: its name, the one before it, and all its files."""

    sha: str
    parent: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A repository, its history, oldest first, and where its branches stand."""

    name: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision]
        return next((commit for commit in self.commits if commit.sha == revision), None)

    def add(self, title: str, files: dict[str, bytes], branch: str = "main") -> Commit:
        parent = self.branches[branch].sha if self.branches else ""
        tree = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items())
        sha = hashlib.sha1(json.dumps([self.name, parent, title, tree, len(self.commits)]).encode()).hexdigest()
        self.branches[branch] = Commit(sha, parent, title, files)
        self.commits.append(self.branches[branch])
        return self.commits[-1]


def is_lfs(path: str) -> bool:
    """As the .gitattributes of a new repository has it."""
    return path.endswith((".safetensors", ".bin", ".model"))


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def describe_file(path: str, data: bytes) -> dict[str, Any]:
    lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130} if is_lfs(path) else None
    return {"rfilename": path, "size": len(data), "blobId": git_hash(data), "lfs": lfs}


def upload_mode(commit: Commit, path: str) -> dict[str, Any]:
    data = commit.files.get(path)
    oid = None if data is None else hashlib.sha256(data).hexdigest() if is_lfs(path) else git_hash(data)
    return {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False, "oid": oid}
