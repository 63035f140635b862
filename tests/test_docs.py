"""README and docs do what they say: Python blocks run, commands and their flags exist, make targets and links resolve.

A block after the line `<!-- runnable -->` is run: the blocks of a page in order, in one namespace and one empty folder,
with a tiny random model in place of the one that the page names. A runnable bash block holds `quantkd` commands only.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r"^(?P<mark><!-- runnable -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"^<!-- runnable", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it starts at, and whether it is marked to be run."""

    language: str
    code: str
    line: int
    runnable: bool


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["language"], match["code"], text[: match.start("code")].count("\n") + 1, match["mark"] is not None)
        for match in BLOCK.finditer(text)
    ]


def read_commands(block: Block) -> list[list[str]]:
    """The commands of a bash block, each as its words; continuation lines joined, comments left out."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def list_quantkd_commands() -> dict[str, set[str]]:
    """Each subcommand that any page shows, with every flag it is shown with."""
    shown: dict[str, set[str]] = {}
    for page in PAGES:
        for block in read_blocks(page):
            for words in read_commands(block) if block.language == "bash" else []:
                if words[0] == "quantkd" and len(words) > 1 and not words[1].startswith("-"):
                    flags = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
                    shown.setdefault(words[1], set()).update(flags)
    return shown


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


@pytest.fixture
def run_quantkd(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Run the command line in this process, as its entry point would; a failing exit code fails the test."""
    from quantkd.cli.main import main

    def run(words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", words)
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        assert not code, f"{shlex.join(words)} exited with {code}"

    return run


RUNNABLE_PAGES = [page for page in PAGES if any(block.runnable for block in read_blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE_PAGES, ids=name_of)
def test_runnable_blocks_run(
    page: Path,
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_quantkd: Callable[[list[str]], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, numbers in (("prompts.jsonl", range(20)), ("held_out.jsonl", range(20, 26))):
        rows = [{"prompt": f"A box holds {n} pens. How many pens are in {n + 1} boxes?"} for n in numbers]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in read_blocks(page):
        if not block.runnable:
            continue
        code = block.code.replace(MODEL, tiny_model_path.as_posix())
        if block.language == "python":
            # Padded with empty lines, so that a traceback names the line of the page.
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), namespace)
        else:
            for words in read_commands(Block(block.language, code, block.line, True)):
                assert words[0] == "quantkd", f"{name_of(page)}:{block.line}: a runnable block runs quantkd alone"
                run_quantkd(words)


def test_start_pages_are_runnable() -> None:
    assert {"README.md", "docs/index.md"} <= {name_of(page) for page in RUNNABLE_PAGES}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_mark_stands_before_a_block_that_can_run(page: Path) -> None:
    marked = [block.language for block in read_blocks(page) if block.runnable]
    assert set(marked) <= {"python", "bash"}
    assert len(marked) == len(MARK.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_are_python(page: Path) -> None:
    for block in read_blocks(page):
        if block.language == "python" and ">>>" not in block.code:
            compile("\n" * (block.line - 1) + block.code, str(page), "exec")


@pytest.mark.parametrize(("command", "flags"), sorted(list_quantkd_commands().items()))
def test_commands_have_help_and_the_flags_that_pages_use(
    command: str, flags: set[str], run_quantkd: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run_quantkd(["quantkd", command, "--help"])
    text = capsys.readouterr().out
    assert flags - set(re.findall(r"--[\w-]+", text)) == set()
    assert f"examples:\n  quantkd {command}" in text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named - targets == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def read_messages() -> list[str]:
    """Every string in the package's source, with ... for what is filled in."""
    messages = []
    for path in sorted((REPOSITORY / "quantkd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                messages.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(re.sub(r"%[sdr]", "...", node.value))
    return messages


def test_troubleshooting_quotes_messages_that_exist() -> None:
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    messages = read_messages()
    assert quoted
    assert [quote for quote in quoted if not any(quote.strip(". ") in message for message in messages)] == []
