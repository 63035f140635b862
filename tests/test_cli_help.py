"""`--help`: at once and without torch for the program, with examples and their options for every command."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time

import pytest

from quantkd.cli.main import main


def read_help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert not stop.value.code
    return capsys.readouterr().out


def list_names() -> list[str]:
    """The commands as `quantkd --help` lists them, from a process of its own."""
    text = subprocess.run(
        [sys.executable, "-m", "quantkd", "--help"], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"^  (\w+) +\S", text, re.MULTILINE)


NAMES = list_names()


def test_help_is_there_within_half_a_second() -> None:
    seconds = []
    for _ in range(5):  # the best of five, for a busy machine is not what is measured
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "quantkd", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5, seconds


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['quantkd', '--help']\n"
        "try: runpy.run_module('quantkd', run_name='__main__')\nexcept SystemExit: pass\n"
        "print(*sorted({'torch', 'numpy', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules)), sep=',')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: quantkd" in result.stdout
    assert result.stdout.splitlines()[-1] == ""


def test_every_command_is_listed() -> None:
    asked = "capture inspect verify convert train evaluate report view export push sweep selftest audit demo"
    assert set(asked.split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_shows_examples_that_it_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, _, examples = read_help(capsys, name).partition("examples:\n")
    assert examples.startswith(f"  quantkd {name}")
    shown = re.sub(r"\\\n", " ", examples).splitlines()
    lines = [line.strip() for line in shown if re.match(r" +(quantkd|accelerate launch) ", line)]
    for line in lines:
        words = shlex.split(line.split("  ")[0])  # what follows two spaces is said about the command
        assert f"quantkd {name}" in line, f"an example of another command: {line}"
        flags = {word for word in words[words.index("quantkd") :] if word.startswith("--")}
        assert flags - set(re.findall(r"--[\w-]+", options)) == set(), line
