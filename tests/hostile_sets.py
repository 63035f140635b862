"""Transfer sets that a stranger made to do harm, each with its digests put right."""

import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from quantkd.transfer_set.codec import ShardSize
from quantkd.transfer_set.shard import serialize_shard

SHARD = "shard-00000.safetensors"
RAW_INDEXES = {
    "empty": b"", "object": b"{}\n", "list": b"[]\n", "nan": b'{"a":NaN}\n', "infinity": b'{"a":-Infinity}\n',
    "deep-lists": b"[" * 1_000_000, "deep-objects": b'{"a":' * 300_000,
    "deep-in-string-then-out": b'{"a":"' + b"[" * 1000 + b'","b":' + b"[" * 1000,
    "many-objects": b"[" + b"{}," * 690_000 + b"{}]", "too-large": b" " * (3 * 2**20),
    "duplicate-keys": b'{"digest":"","digest":""}\n', "long-number": b'{"a":' + b"9" * 100_000 + b"}\n",
    "utf-16": '{"a":1}'.encode("utf-16"), "bom": b"\xef\xbb\xbf{}\n", "bad-utf-8": b'{"a":"\xff"}\n',
    "escaped-quotes": b'{"a":"' + b'\\"' * 1_000_000,
    "raw-escape": b'{"a":"\x1b[31m"}\n', "open-string": b'{"a":"\\\n', "surrogate": b'{"a":"\\ud800"}\n',
    "pickle": b"cos\nsystem\n(S'true'\ntR.", "zeros": bytes(1000),
}  # fmt: skip


def seal(index):
    """The bytes of an index whose digest fits, as an attacker would make them."""
    if isinstance(index, dict):
        rest = {key: value for key, value in index.items() if key != "digest"}
        index = {**rest, "digest": hashlib.sha256(dump(rest)).hexdigest()}
    return dump(index)


def dump(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def index_values():
    """A name, the path of a field in the index, and what to put there."""
    whole = (0, -1, 2**70, 1.5, True, "4", None, [], {})
    text = (5, None, [], {}, "a\x1b[31m", "\u202eevil", "x" * 5000, "\ud800", "two\nlines", "bell\x07")
    bad = {
        **{("plan", name): text for name in ("teacher_name", "teacher_revision", "teacher_dtype")},
        ("plan", "tokenizer_fingerprint"): ("0" * 63, "Z" * 64, 0, None),
        ("plan", "prompts_digest"): ("0" * 65, "A" * 64, 1.0, []),
        ("plan", "vocab_size"): (*whole, 5, 2**30),
        ("plan", "num_prompts"): (*whole, 5, 2**40),
        ("plan", "rows_per_shard"): (*whole, 2, 2**40),
        ("plan", "batch_size"): whole,
        ("plan", "profile"): ("faithful",),
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
        ("version",): (0, 1, 1.5, "1", None, True),
        ("surprise",): (1,),
    }  # fmt: skip
    for path, values in bad.items():
        for number, value in enumerate(values):
            yield f"{'.'.join(path)}-{number}", list(path), value
    for name in ("rows", "tokens", "spans", "targets", "entries", "blocks", "bytes"):
        for value in (-1, 0, 1, 4, 2**31, 2**32 - 1, 2**32, 2**80, 1.5, "1", None, True):
            yield f"shards.{name}-{value}", ["shards", 0, name], value
    for value in ("0" * 64, "../../etc/passwd", None, 7):
        yield f"shards.sha256-{value}", ["shards", 0, "sha256"], value
    yield "shards.file", ["shards", 0, "file"], "/etc/passwd"


def deep(levels):
    return [] if levels == 0 else {"a": deep(levels - 1)}


def strange_files():
    def sparse(folder):
        index = json.loads((folder / "index.json").read_bytes())
        index["shards"][0] |= {"entries": 2**32 - 1}
        (folder / "index.json").write_bytes(seal(index))
        os.truncate(folder / SHARD, 13 * 2**30)

    makers = {"fifo": os.mkfifo, "folder": os.mkdir, "missing": lambda path: None}
    for to in ("/etc/passwd", "/nowhere", "/dev/zero", "/proc/self/environ"):
        makers[f"link-{to}"] = lambda path, to=to: path.symlink_to(to)
    return {
        f"{what}-{kind}": lambda f, name=name, make=make: ((f / name).unlink(), make(f / name))
        for what, name in (("index", "index.json"), ("shard", SHARD))
        for kind, make in makers.items()
    } | {
        "shard-link-inside": lambda f: (f / SHARD).rename(f / "kept") and (f / SHARD).symlink_to(f / "kept"),
        "shard-empty": lambda f: (f / SHARD).write_bytes(b""),
        "shard-sparse": sparse,
        "shard-huge-header": lambda f: (f / SHARD).write_bytes(b"\xff" * 8 + (f / SHARD).read_bytes()[8:]),
        "set-is-a-file": lambda f: (shutil.rmtree(f), f.write_bytes(b"")),
        "set-is-empty": lambda f: [file.unlink() for file in f.iterdir()],
        "plan-only": lambda f: [(f / "plan.json").write_bytes(b"[" * 10**6), (f / "index.json").unlink()],
    }


def reshard(folder, change):
    """Change the tensors and arrays of a shard of one block by name; "stream" packs it. Sizes and digests fit again."""
    shard = load_file(folder / SHARD)
    index = json.loads((folder / "index.json").read_bytes())
    size = index["shards"][0]
    content, arrays, at = zlib.decompress(shard["data"].tobytes()), {}, 0
    for name, dtype, items in (
        ("finished", "u1", size["rows"]), ("spans", "<u4", 2 * size["spans"]), ("input_ids", "<u2", size["tokens"]),
        ("counts", "u1", size["targets"]), ("token_ids", "<u2", size["entries"]), ("logprobs", "<f2", size["entries"]),
        ("log_normalizers", "<f2", size["targets"]),
    ):  # fmt: skip
        end = at + items * np.dtype(dtype).itemsize
        raw = np.frombuffer(content[at:end], "u1")
        arrays[name] = np.frombuffer((raw.reshape(2, -1).T if dtype == "<f2" else raw).tobytes(), dtype).copy()
        at = end
    tensors = {"rows": shard["rows"].copy(), "blocks": shard["blocks"].copy(), "stream": zlib.compress, **arrays}
    change(tensors)
    parts = [tensors[name] for name in arrays]
    planes = [part.view("u1").reshape(-1, 2).T if part.dtype == "<f2" else part for part in parts]
    data = tensors["stream"](b"".join(part.tobytes() for part in planes))
    if tensors["blocks"][-1].tolist() == shard["blocks"][-1].tolist():
        tensors["blocks"][-1, 1] = len(data)
    for column, name in enumerate(("tokens", "spans", "targets", "entries")):
        size[name] = int(tensors["rows"][:, column].sum(dtype=np.int64))
    size |= {"bytes": len(data), "blocks": len(tensors["blocks"])}
    sizes = ShardSize(**{name: size[name] for name in ShardSize.__dataclass_fields__})
    file = serialize_shard(sizes, {**tensors, "data": np.frombuffer(data, "u1")})
    (folder / SHARD).write_bytes(file)
    size["sha256"] = hashlib.sha256(file).hexdigest()
    (folder / "index.json").write_bytes(seal(index))


def tensor_changes():
    def put(name, at, value):
        return lambda tensors: tensors[name].__setitem__(at, value)

    def stream(make):
        return lambda tensors: tensors.update(stream=make)

    def with_dictionary(content):
        packer = zlib.compressobj(zdict=b"secret")
        return packer.compress(content) + packer.flush()

    def bomb(tensors):
        """A row of the most entries there may be: 25 MB of zeros in 25 kB."""
        tensors["rows"][0, 3] = 2**22
        tensors["stream"] = lambda content: zlib.compress(bytes(6 * 2**22))

    changes = {
        "counts-zero": put("counts", 0, 0), "counts-more": lambda t: t["counts"].__setitem__(0, t["counts"][0] + 1),
        "ids-large": put("token_ids", 0, 60), "input-ids-large": put("input_ids", 0, 255),
        "ids-twice": put("token_ids", slice(None), 7), "logprobs-nan": put("logprobs", 0, np.nan),
        "logprobs-inf": put("logprobs", 0, -np.inf), "logprobs-positive": put("logprobs", 0, 0.5),
        "mass": put("logprobs", slice(None), -0.1), "normalizers": put("log_normalizers", slice(None), 0),
        "normalizers-nan": put("log_normalizers", 0, np.nan), "span-start": put("spans", 0, 0),
        "span-empty": lambda t: t["spans"].__setitem__(1, t["spans"][0]),
        "span-backwards": put("spans", slice(0, 2), (5, 2)), "span-long": put("spans", 1, 2**32 - 1),
        "stream-short": stream(lambda content: zlib.compress(content[:-1])),
        "stream-much-longer": stream(lambda content: zlib.compress(bytes(2**26))),
        "stream-cut": stream(lambda content: zlib.compress(content)[:-1]),
        "stream-twice": stream(lambda content: zlib.compress(content) * 2),
        "stream-with-more": stream(lambda content: zlib.compress(content) + b"more"),
        "stream-wrong-sum": stream(lambda content: zlib.compress(content)[:-4] + b"\0\0\0\0"),
        "stream-plain": stream(lambda content: content), "stream-with-dictionary": stream(with_dictionary),
        "stream-gzip": stream(lambda content: b"\x1f\x8b\x08" + content), "bomb": bomb,
        "blocks-empty": lambda t: t.update(blocks=np.concatenate([np.zeros((1, 2), "u4"), t["blocks"]])),
        "blocks-rows": put("blocks", (0, 0), 2), "blocks-rows-many": put("blocks", (0, 0), 2**32 - 1),
        "blocks-bytes": put("blocks", (0, 1), 1), "blocks-bytes-many": put("blocks", (0, 1), 2**32 - 1),
    }  # fmt: skip
    for column in range(4):
        for value in (0, 211, 2**20, 2**22, 2**32 - 1):
            changes[f"rows-{column}-{value}"] = put("rows", (0, column), value)
        changes[f"rows-{column}-moved"] = lambda t, c=column: t["rows"][:2, c].__iadd__(np.array([1, 2**32 - 1], "u4"))
    return changes


def hostile_sets(original, scratch):
    """Each set in turn, at the same place."""

    def fresh():
        if scratch.is_dir():
            shutil.rmtree(scratch)
        scratch.unlink(missing_ok=True)
        return Path(shutil.copytree(original, scratch))

    for name, path, value in index_values():
        before = (fresh() / "index.json").read_bytes()
        index = inner = json.loads(before)
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        if seal(index) != before:
            (scratch / "index.json").write_bytes(seal(index))
            yield name, scratch
    for name, data in RAW_INDEXES.items():
        (fresh() / "index.json").write_bytes(data)
        yield name, scratch
    for name, make in strange_files().items():
        make(fresh())
        yield name, scratch
    for name, change in tensor_changes().items():
        reshard(fresh(), change)
        yield name, scratch
