"""Every benchmark starts without arguments: what it needs has a default, is found, or is skipped in sight."""

from __future__ import annotations

import argparse
import json
import runpy
import sys

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "benchmarks").glob("[a-z]*.py"))


@pytest.fixture
def sources(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import _sources

    monkeypatch.setattr(_sources, "load_demo_model", lambda: "demo")
    return _sources


class Parsed(Exception):
    """Ends a script once it has its arguments."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_no_argument_is_required(script, sources, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args):
        raise Parsed(parse(self, *args), self.format_help())

    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert "--model" not in ended.value.args[1] or "add_sources(" in script.read_text()


def test_model_and_questions_are_found(sources, monkeypatch, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    sources.add_sources(parser)
    for words, model in (([], "demo"), (["--model", "mine"], "mine")):
        monkeypatch.setattr(sys, "argv", ["script", *words])
        assert sources.parse(parser).model == model
    monkeypatch.setattr(sources, "_FOLDERS", (tmp_path / "none", tmp_path))
    for folder in (None, str(tmp_path)):
        with pytest.raises(SystemExit) as ended:
            sources.find_gsm8k(folder)
        assert not ended.value.code and "name the folder with --gsm8k" in json.loads(capsys.readouterr().out)["skipped"]
    (tmp_path / "train.jsonl").touch()
    assert sources.find_gsm8k(None) == sources.find_gsm8k(str(tmp_path)) == str(tmp_path)
