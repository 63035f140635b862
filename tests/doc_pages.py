"""The fenced blocks of README and docs, and what a comment above a block says of it.

Every bash, python, pycon, yaml and json block is run by test_docs.py. Comments in lines of their own right above it:

    <!-- given: NAME, NAME -->   what is in the folder beforehand, by the names of doc_stand_ins.py; NAME as PATH
    <!-- file: NAME -->          a yaml or json block is this file, for the commands after it
    <!-- needs: PACKAGE -->      run where this extra's package is installed
    <!-- not run: REASON -->     not run; its commands, files and flags must still exist
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Not the changelog, which names what is gone.
PAGES = sorted({*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")} - {REPOSITORY / "CHANGELOG.md"})
LANGUAGES = {"bash", "python", "pycon", "yaml", "json"}
BLOCK = re.compile(r"(?ms)^(?P<marks>(?:<!--[^\n]*-->\n)*)```(?P<language>\w+)\n(?P<code>.*?)^```$")
MARK = re.compile(r"^<!-- (given|file|needs|not run): (\S.*) -->$")
# Words in backticks in the text that are a command: what follows them is held to exist as in a block.
SPAN = re.compile(r"`([^`]+)`")
INLINE = re.compile(r"quantkd [a-z]|accelerate launch |torchrun |python (?:benchmarks|examples)/")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, its language, its text, the line it starts at, and what the comments above it say."""

    page: Path
    language: str
    code: str
    line: int
    marks: dict[str, str]

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    @property
    def given(self) -> list[str]:
        return [name.strip() for name in self.marks.get("given", "").split(",") if name.strip()]

    @property
    def is_run(self) -> bool:
        return self.language in LANGUAGES and "not run" not in self.marks


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def read_blocks(page: Path) -> list[Block]:
    """The blocks of a page in order; a comment above a block that is none of these is its mark "unknown"."""
    text, blocks = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        line = text[: match.start("code")].count("\n") + 1
        marks: dict[str, str] = {}
        for mark in match["marks"].splitlines():
            known = MARK.match(mark)
            marks[known[1] if known else "unknown"] = known[2] if known else mark
        blocks.append(Block(page, match["language"], match["code"], line, marks))
    return blocks


def split_commands(code: str) -> list[list[str]]:
    """The commands of a bash block as words; continuation lines joined, comments and `NAME=value` in front left out."""
    lines = [re.sub(r"^\s*(?:[A-Z_]+=\S* )+", "", line) for line in code.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def split_launcher(words: list[str]) -> tuple[list[str], str | None, list[str]]:
    """The launcher's words, the script that it starts (None for `-m quantkd`), and that one's own words."""
    if words[0] not in ("accelerate", "torchrun"):
        return [], None, words
    for place, word in enumerate(words):
        if words[place : place + 2] == ["-m", "quantkd"]:
            return words[:place], None, words[place + 1 :]
        if word.endswith(".py"):
            return words[:place], word, words[place:]
    return words, None, []


def list_commands() -> list[tuple[str, list[str]]]:
    """Every command of every page with its place: those of the bash blocks, and those in backticks in the text."""
    commands = []
    for page in PAGES:
        for block in read_blocks(page):
            if block.language == "bash":
                commands += [(block.place, words) for words in split_commands(block.code)]
        text = BLOCK.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))
        for span in SPAN.finditer(text):
            if INLINE.match(span[1]):
                place = f"{name_of(page)}:{text[: span.start()].count(chr(10)) + 1}"
                commands.append((place, shlex.split(span[1])))
    return commands
