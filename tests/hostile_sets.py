"""Transfer sets that a stranger made to do harm, each with its digests put right."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

SHARD = "shard-00000.safetensors"


def seal(index: Any) -> bytes:
    """The bytes of an index whose digest fits, as an attacker would make them."""
    if isinstance(index, dict):
        rest = {key: value for key, value in index.items() if key != "digest"}
        index = {**rest, "digest": hashlib.sha256(dump(rest)).hexdigest()}
    return dump(index)


def dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def index_values() -> Iterator[tuple[str, list[Any], Any]]:
    """A name, the path of a field in the index, and what to put there."""
    whole = (0, -1, 2**70, 1.5, True, "4", None, [], {})
    text = (5, None, [], {}, "a\x1b[31m", "\u202eevil", "x" * 5000, "\ud800", "two\nlines", "bell\x07")
    bad = {
        ("plan", "teacher_name"): text,
        ("plan", "teacher_revision"): text,
        ("plan", "teacher_dtype"): text,
        ("plan", "tokenizer_fingerprint"): ("0" * 63, "Z" * 64, 0, None),
        ("plan", "prompts_digest"): ("0" * 65, "A" * 64, 1.0, []),
        ("plan", "vocab_size"): (*whole, 5, 2**30),
        ("plan", "num_prompts"): (*whole, 5, 2**40),
        ("plan", "rows_per_shard"): (*whole, 2, 2**40),
        ("plan", "batch_size"): whole,
        ("plan", "profile"): ("tiny", 1, None, [], {}, "FAITHFUL"),
        ("plan", "responses"): ("stolen", 1, None, []),
        ("plan", "temperatures"): ([], [0.0], [2.0, 1.0], [1.0, 1.0], [1], ["1"], [1e9], [-1.0], [1.0] * 99, {}, 1.0),
        ("plan", "generation"): ([], None, 3, "x", {"a": "\x1b]0;title\x07"}, {"\x9b2J": 1}, deep(40)),
        ("plan", "extra"): ([], None, {"pad": "x" * 2**19}, {"a": ["\x00"]}),
        ("plan", "storage"): (
            {}, [], None, "topk", {"kind": "evil"}, {"kind": "topk"}, {"kind": "topk", "k": 0}, {"kind": ["topk"]},
            {"kind": "topk", "k": 10**9}, {"kind": "topk", "k": 3, "x": 1}, {"kind": "topk", "k": "3"},
            {"kind": "nucleus", "p": 2.0, "max_k": 3}, {"kind": "nucleus", "p": 0.5, "max_k": 1.5},
            {"kind": "nucleus", "p": "0.5", "max_k": 3}, {"kind": "sampled", "n": -1}, {"kind": "sampled", "n": True},
            {"kind": "topk", "k": 1},
        ),
        ("plan",): ({}, [], None, 3),
        ("counters",): ([], None, {"a": -1}, {"a": 1.5}, {"a": {}}, {"\x1b": 1}, {f"c{i}": 1 for i in range(300)}),
        ("shards",): ([], {}, None, [{}], [[]], [None], [1], ["shard"], [{}] * 20_000),
        ("format",): ("zip", None, 1, "\x1b[2J"),
        ("version",): (0, 2, 1.5, "1", None, True),
        ("surprise",): (1,),
    }  # fmt: skip
    for path, values in bad.items():
        for number, value in enumerate(values):
            yield f"{'.'.join(path)}-{number}", list(path), value
    for name in ("rows", "tokens", "explicit", "spans", "targets", "entries", "low", "high"):
        for value in (-1, 0, 1, 2**31, 2**32 - 1, 2**32, 2**80, 1.5, "1", None, True):
            yield f"shards.{name}-{value}", ["shards", 0, name], value
    for value in ("0" * 64, "../../etc/passwd", None, 7):
        yield f"shards.sha256-{value}", ["shards", 0, "sha256"], value
    yield "shards.file", ["shards", 0, "file"], "/etc/passwd"


def deep(levels: int) -> Any:
    return [] if levels == 0 else {"a": deep(levels - 1)}


def raw_indexes() -> dict[str, bytes]:
    return {
        "empty": b"",
        "object": b"{}\n",
        "list": b"[]\n",
        "null": b"null\n",
        "number": b"1\n",
        "nan": b'{"a":NaN}\n',
        "infinity": b'{"a":-Infinity}\n',
        "deep-lists": b"[" * 1_000_000,
        "deep-objects": b'{"a":' * 300_000,
        "deep-in-string-then-out": b'{"a":"' + b"[" * 1000 + b'","b":' + b"[" * 1000,
        "many-objects": b"[" + b"{}," * 690_000 + b"{}]",
        "too-large": b" " * (3 * 2**20),
        "duplicate-keys": b'{"digest":"","digest":""}\n',
        "long-number": b'{"a":' + b"9" * 100_000 + b"}\n",
        "many-digits": b'{"a":' + b"9" * 4_000 + b"}\n",
        "utf-16": '{"a":1}'.encode("utf-16"),
        "bom": b"\xef\xbb\xbf{}\n",
        "bad-utf-8": b'{"a":"\xff"}\n',
        "raw-escape": b'{"a":"\x1b[31m"}\n',
        "open-string": b'{"a":"\\\n',
        "surrogate": b'{"a":"\\ud800"}\n',
        "pickle": b"cos\nsystem\n(S'true'\ntR.",
        "zip": b"PK\x03\x04" + bytes(100),
        "zeros": bytes(1000),
    }


def strange_files() -> dict[str, Callable[[Path], Any]]:
    def link(folder: Path, name: str, to: str) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    def replace(folder: Path, name: str, make: Callable[[Path], Any]) -> None:
        (folder / name).unlink()
        make(folder / name)

    def sparse(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_bytes())
        index["shards"][0] |= {"entries": 2**32 - 1}
        (folder / "index.json").write_bytes(seal(index))
        os.truncate(folder / SHARD, 13 * 2**30)

    def moved(folder: Path) -> None:
        shutil.move(folder / SHARD, folder / "kept")
        link_to = folder / SHARD
        link_to.symlink_to(folder / "kept")

    return {
        "index-link": lambda f: link(f, "index.json", "/etc/passwd"),
        "index-dangling": lambda f: link(f, "index.json", "/nowhere"),
        "index-fifo": lambda f: replace(f, "index.json", os.mkfifo),
        "index-folder": lambda f: replace(f, "index.json", os.mkdir),
        "index-null": lambda f: link(f, "index.json", "/dev/zero"),
        "shard-link": lambda f: link(f, SHARD, "/etc/passwd"),
        "shard-link-inside": moved,
        "shard-proc": lambda f: link(f, SHARD, "/proc/self/environ"),
        "shard-zero": lambda f: link(f, SHARD, "/dev/zero"),
        "shard-fifo": lambda f: replace(f, SHARD, os.mkfifo),
        "shard-folder": lambda f: replace(f, SHARD, os.mkdir),
        "shard-missing": lambda f: (f / SHARD).unlink(),
        "shard-empty": lambda f: (f / SHARD).write_bytes(b""),
        "shard-sparse": sparse,
        "shard-huge-header": lambda f: (f / SHARD).write_bytes(b"\xff" * 8 + (f / SHARD).read_bytes()[8:]),
        "set-is-a-file": lambda f: replace(f, "index.json", lambda p: (shutil.rmtree(f), f.write_bytes(b""))),
        "set-is-empty": lambda f: [file.unlink() for file in f.iterdir()],
        "plan-only": lambda f: [(f / "plan.json").write_bytes(b"[" * 10**6), (f / "index.json").unlink()],
    }


def reshard(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a shard's tensors, and put every checksum and digest right again."""
    tensors = {name: np.array(value) for name, value in load_file(folder / SHARD).items()}
    before = tensors["rows"].astype(np.int64)
    change(tensors)
    bits = np.unpackbits(tensors["label_is_first"], bitorder="little")
    widths = (load_file(folder / SHARD)["spans"].astype(np.int64) @ [-1, 1]).tolist()
    t = x = e = low = high = 0
    for row in range(len(before)):
        r = widths[row]
        x1, e1 = x + int(before[row, 1]), e + int(before[row, 2])
        low1, high1 = low + int(before[row, 4]), high + int(before[row, 5])
        parts = [
            tensors["rows"][row, :6], tensors["finished"][row : row + 1], tensors["spans"][row : row + 1],
            tensors["input_ids"][x:x1], bits[t : t + r], tensors["counts"][t : t + r], tensors["first_ids"][t : t + r],
            tensors["rest_low"][low:low1], tensors["rest_high"][high:high1], tensors["logprobs"][e:e1],
            tensors["log_normalizers"][t : t + r], tensors["logprobs_fine"][t : t + r],
        ]  # fmt: skip
        tensors["rows"][row, 6] = zlib.crc32(b"".join(part.tobytes() for part in parts))
        t, x, e, low, high = t + r, x1, e1, low1, high1
    data = (folder / SHARD).read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    data = data[:length] + b"".join(tensors[name].tobytes() for name in header)
    (folder / SHARD).write_bytes(data)
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "index.json").write_bytes(seal(index))


def tensor_changes() -> dict[str, Callable[[dict[str, Any]], Any]]:
    def put(name: str, at: Any, value: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda tensors: tensors[name].__setitem__(at, value)

    def halves(counts: Any) -> Any:
        logprobs = np.full(int(counts.sum(dtype=np.int64)), 255, dtype="u1")
        logprobs[np.cumsum(counts, dtype=np.int64) - counts] = 128
        return logprobs

    changes = {
        "finished": put("finished", 0, 2),
        "counts-zero": put("counts", 0, 0),
        "counts-many": put("counts", 0, 255),
        "counts-more": lambda t: t["counts"].__setitem__(0, t["counts"][0] + 1),
        "label-flags": lambda t: t["label_is_first"].__setitem__(0, t["label_is_first"][0] ^ 1),
        "ids-large": put("first_ids", 0, 255),
        "input-ids-large": put("input_ids", 0, 255),
        "ids-twice": put("first_ids", slice(None), 7),
        "ids-more": lambda t: np.bitwise_or(t["rest_high"], 1, out=t["rest_high"]),
        "ids-fewer": put("rest_high", 0, 0),
        "ids-elsewhere": lambda t: t.update(rest_high=t["rest_high"][::-1].copy()),
        "ids-low": put("rest_low", slice(None), 255),
        "mass": lambda t: t.update(logprobs=halves(t["counts"])),
        "certain-but-shared": lambda t: (t["logprobs"].__setitem__(0, 255), t["logprobs_fine"].__setitem__(0, 255)),
        "normalizers": put("log_normalizers", slice(None), 0),
        "checksum": lambda t: None,
        "padding": lambda t: t["label_is_first"].__setitem__(-1, t["label_is_first"][-1] | 128),
        "span-start": put("spans", (0, 0), 0),
        "span-empty": lambda t: t["spans"].__setitem__((0, 1), t["spans"][0, 0]),
        "span-backwards": put("spans", 0, (5, 2)),
        "span-long": put("spans", (0, 1), 2**32 - 1),
    }  # fmt: skip
    for column in range(6):
        for value in (0, 211, 2**20, 2**32 - 1):
            changes[f"rows-{column}-{value}"] = put("rows", (0, column), value)
        changes[f"rows-{column}-moved"] = lambda t, c=column: t["rows"].__setitem__(
            (slice(0, 2), c), t["rows"][:2, c] + np.array([1, 2**32 - 1], "u4")
        )
    return changes


def hostile_sets(original: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Each set in turn, at the same place."""

    def fresh() -> Path:
        if scratch.is_dir():
            shutil.rmtree(scratch)
        scratch.unlink(missing_ok=True)
        return Path(shutil.copytree(original, scratch))

    for name, path, value in index_values():
        index = json.loads((fresh() / "index.json").read_bytes())
        before = copy.deepcopy(index)
        inner = index
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        if index != before or isinstance(value, bool | float):
            (scratch / "index.json").write_bytes(seal(index))
            yield name, scratch
    for name, data in raw_indexes().items():
        (fresh() / "index.json").write_bytes(data)
        yield name, scratch
    for name, make in strange_files().items():
        make(fresh())
        yield name, scratch
    for name, change in tensor_changes().items():
        if name != "checksum":
            reshard(fresh(), change)
            yield name, scratch
