"""What README and docs name exists: commands and their flags, scripts, extras, make targets, links, error messages."""

import ast
import configparser
import re
import runpy
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from doc_pages import PAGES, REPOSITORY, list_commands, name_of, split_launcher

from quantkd.cli.main import COMMANDS

SCRIPTS = ("benchmarks/", "examples/", "tests/")


def list_flags():
    """Each subcommand and script that a page shows, with every flag it is shown with."""
    shown = {}
    for _, words in list_commands():
        _, script, own = split_launcher(words) if words[0] != "python" else ([], words[1], words[1:])
        if script is None and own[:1] == ["quantkd"]:
            own = own[1:]
        elif script is None or not script.startswith(SCRIPTS):
            continue
        flags = {word.split("=")[0] for word in own[1:] if re.match(r"--\w", word)}
        if re.match("[a-z]", "".join(own[:1])):  # not COMMAND
            shown.setdefault(own[0], set()).update(flags)
    return sorted(shown.items())


def test_the_page_of_the_command_line_has_every_command():
    page = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(COMMANDS)


@pytest.mark.parametrize(("name", "flags"), list_flags())
def test_commands_and_scripts_have_the_flags_that_pages_use(name, flags, cli, monkeypatch, capsys):
    if name in COMMANDS:
        code, out, _ = cli(name, "--help")
    else:
        path = REPOSITORY / name
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        monkeypatch.syspath_prepend(path.parent)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        code, out = stop.value.code, capsys.readouterr().out
    assert not code and flags - set(re.findall(r"--[\w-]+", out)) == set()


def test_launchers_take_the_flags_and_files_and_extras_exist_that_pages_use():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    launchers = []
    for place, words in list_commands():
        if words[0] == "accelerate":
            launchers.append(split_launcher(words)[0][2:])
            parsed = launch_command_parser().parse_args([*launchers[-1], "script.py"])
            assert parsed.training_script == "script.py", f"{place}: {words}"
        for word in words:
            assert not word.startswith(SCRIPTS) or (REPOSITORY / word).exists(), f"{place}: there is no {word}"
            if words[0] == "pip" and (named := re.fullmatch(r"(?:quantkd|\.)\[(.+)\]", word)):
                assert set(named[1].split(",")) <= set(setup["options.extras_require"]), f"{place}: {word}"
    assert ["--num_processes", "1"] in launchers


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist_and_relative_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) - targets == set()
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_troubleshooting_quotes_messages_that_exist():
    messages = []  # every string in the package's source, with ... for what is filled in
    for path in sorted((REPOSITORY / "quantkd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                messages.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(re.sub(r"%[sdr]", "...", node.value))
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert quoted
    assert [quote for quote in quoted if not any(quote.strip(". ") in message for message in messages)] == []
