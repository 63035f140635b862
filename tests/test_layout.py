"""The layout: imports run one way, and what has one owner is written in one place."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "quantkd"
FILES = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
# Low to high: a module imports from its own part and from those before it. LOW are single files and the lowest part.
LOW = ["errors", "hardware", "names", "files", "foreign", "remote"]
PARTS = ["data", "transfer_set", "loss", "models", "evaluation", "report", "view", "hub", "teacher", "training"]
PARTS += ["experiment", "cli", "__main__", "quantkd"]


def name_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix("__init__").rstrip(".")


NAMES = {name_of(path) for path in FILES}


@cache
def read_tree(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text(encoding="utf-8"))


def list_imports(path: Path) -> Iterator[str]:
    """The modules of quantkd that a module imports, at its top or inside a function, for types or to run."""
    for node in ast.walk(read_tree(path)):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [each.value for each in node.args if isinstance(each, ast.Constant)]
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}, line {node.lineno}: an import from quantkd names it"
            whole = [f"{node.module}.{each.name}" for each in node.names]
            names = [name if name.removeprefix("quantkd.") in NAMES else str(node.module) for name in whole]
        yield from (name.removeprefix("quantkd.") for name in names if re.match(r"quantkd\b", name))


@cache
def read_graph() -> dict[str, set[str]]:
    # quantkd/__init__.py, the face of all, loads what it exports by name; nothing within imports it.
    return {name_of(path) or "quantkd": set(list_imports(path)) for path in FILES}


def rank_of(module: str) -> int:
    part = module.split(".")[0]
    return 0 if part in LOW else 1 + PARTS.index(part)


def find(kind: type[ast.AST], pattern: str) -> set[str]:
    return {
        path.as_posix() for path in FILES for node in ast.walk(read_tree(path))
        if isinstance(node, kind) and re.match(pattern, ast.unparse(node))
    }  # fmt: skip


def test_imports_run_one_way() -> None:
    graph = read_graph()
    upward = {f"{low} -> {high}" for low in graph for high in graph[low] if rank_of(high) > rank_of(low)}
    assert sorted(upward) == []


def test_no_modules_import_each_other() -> None:
    left = dict(read_graph())
    while ends := {module for module, used in left.items() if not used & left.keys()}:
        left = {module: used for module, used in left.items() if module not in ends}
    while starts := left.keys() - set().union(*left.values()):  # these only import from a circle
        left = {module: used for module, used in left.items() if module not in starts}
    assert sorted(left) == []


def test_the_root_holds_no_more_than_it_should_and_packages_alone_list_what_they_export():
    allowed = {f"{name}.py" for name in ("__init__", "__main__", "experiment", *LOW)} | {"py.typed"}
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} <= allowed and len(allowed) <= 10
    assert {name for name in find(ast.Name, "__all__$") if not name.endswith("__init__.py")} == set()


@pytest.mark.parametrize(("kind", "pattern", "owner"), [
    (ast.Assert, "", set()),  # no assert decides anything
    (ast.UnaryOp, "-100$", {"transfer_set/batch.py"}),  # the ignored label is written once
    (ast.Call, r"print\(", {"cli/format.py"}), (ast.Call, r"figure\.savefig\(", {"report/figures.py"}),
    (ast.Call, r"Environment\(", {"report/page.py"}),
])  # fmt: skip
def test_what_has_one_owner_is_in_one_place(kind: type[ast.AST], pattern: str, owner: set[str]) -> None:
    assert find(kind, pattern) == owner
