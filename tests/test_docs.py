"""README, docs and notebooks do what they say, and what they name exists.

Every block runs, or says above it why it does not.

The blocks of a page run in order, in one namespace and one empty folder, with a tiny random model in place of the one
that the page names. doc_pages.py says what a comment above a block can ask for, doc_stand_ins.py what that gives.
"""

import ast
import configparser
import doctest
import json
import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import build_tiny_model, capture_set
from doc_pages import LANGUAGES, PAGES, REPOSITORY, list_commands, name_of, read_blocks, split_commands, split_launcher
from doc_stand_ins import StandIns

from quantkd.cli.main import COMMANDS, main
from quantkd.models.student import load_student
from quantkd.names import load_tokenizer


def test_what_a_page_imports_is_described_in_the_api():
    text = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    described, missing = {path.split(".")[-1] for path in re.findall(r"^::: (\S+)$", text, re.M)}, []
    for block in (block for page in PAGES for block in read_blocks(page) if block.language == "python"):
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quantkd"):
                missing += [(block.place, each.name) for each in node.names if each.name not in described]
    assert missing == []


@pytest.fixture(scope="module")
def page_model_path(tiny_tokenizer, tmp_path_factory):
    """The tiny model with a context for eight shots and answers that end soon."""
    folder = tmp_path_factory.mktemp("page-model")
    model = build_tiny_model(tiny_tokenizer, layers=1)
    model.config.max_position_embeddings = 2048  # its rotary embeddings have no weights that would have to grow
    model.lm_head.weight.data[tiny_tokenizer.eos_token_id] *= 3
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(page_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, numbers in (("set", range(12)), ("train", range(12)), ("held", range(12, 16))):
            prompts = [f"What is {number} + 2?" for number in numbers]
            # In bfloat16 a model as small as this has so many equal logits that `verify --teacher` finds them.
            capture_set(page_model_path, prompts, f"runs/{name}", max_new_tokens=12)
        words = ["--model_name_or_path", str(page_model_path), "--transfer_set", "runs/set", "--max_steps", "2"]
        main(["train", *words, "--output_dir", "runs/student"])
        load_student(str(page_model_path)).save_pretrained("runs/4bit")  # what it was trained on
        load_tokenizer(str(page_model_path)).save_pretrained("runs/4bit")
    return folder


@pytest.fixture
def stand_ins(page_model_path, made, tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    stand_ins = StandIns(page_model_path, made, monkeypatch, tmp_path / "cache")
    with stand_ins.open:
        yield stand_ins


def run_pycon(block, code, namespace):
    test = doctest.DocTestParser().get_doctest(code, {}, block.place, str(block.page), block.line)
    assert test.examples, f"{block.place} is a session without >>>"
    test.globs, said = namespace, []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test, out=said.append, clear_globs=False)
    assert not said, "".join(said)


def run_bash(block, code, cli):
    for words in split_commands(code):
        _, script, own = split_launcher(words)  # a launcher's processes are those of tests/test_distributed.py
        assert script is None and own[:1] == ["quantkd"], (
            f"{block.place}: the tests run `quantkd` alone. Put `<!-- not run: WHY -->` above a block of its own for "
            f"`{shlex.join(words)}`."
        )
        code, _, err = cli(*own[1:])
        assert code == 0, f"{shlex.join(words)} exited with {code}: {err}"


def read_data(block):
    """What a yaml or json block holds; json may be one object a line."""
    if block.language == "json" and all(line.endswith("}") for line in block.code.splitlines()):
        return [json.loads(line) for line in block.code.splitlines()]
    return list(yaml.safe_load_all(block.code)) if block.language == "yaml" else [json.loads(block.code)]


def run_blocks(blocks, stand_ins, cli):
    namespace = {"__name__": "__main__"}
    for block in blocks:
        for name in block.given:
            stand_ins.give(name)
        code = stand_ins.replace(block.code)
        if block.language == "python":
            # Padded with empty lines, so that a traceback names the line of the page.
            exec(compile("\n" * (block.line - 1) + code, str(block.page), "exec"), namespace)
        elif block.language == "pycon":
            run_pycon(block, code, namespace)
        elif block.language == "bash":
            run_bash(block, code, cli)
        else:
            assert all(read_data(block)), f"{block.place} holds nothing"
            if "file" in block.marks:
                Path(block.marks["file"]).parent.mkdir(parents=True, exist_ok=True)
                Path(block.marks["file"]).write_text(code, encoding="utf-8")


RUN_PAGES = [page for page in PAGES if any(block.is_run for block in read_blocks(page))]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("page", RUN_PAGES, ids=name_of)
def test_blocks_run(page, stand_ins, cli):
    blocks = [block for block in read_blocks(page) if block.is_run]
    missing = {name for block in blocks if (name := block.marks.get("needs")) and find_spec(name) is None}
    run_blocks([block for block in blocks if block.marks.get("needs") not in missing], stand_ins, cli)
    if missing:
        pytest.skip(f"all blocks ran but those that need {', '.join(missing)}, which is not installed")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_overlooked_targets_exist_and_links_resolve(page):
    """Every fence is one of a block that is run, or says why not; no command hides in an indented block."""
    text, blocks = page.read_text(encoding="utf-8"), read_blocks(page)
    fences = re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)
    assert len(fences) == 2 * len(blocks), "a fence without language or margin"
    assert {block.language for block in blocks} <= LANGUAGES | {"text"}
    prose = re.sub(r"```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^ {4,}(?:quantkd|python|pip|make|accelerate) .*$", prose, re.MULTILINE) == []
    for block in blocks:
        if block.language == "python":
            assert ">>>" not in block.code, f"{block.place} is a session: ```pycon"
            compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if file := block.marks.get("file"):
            others = [other.code for other in blocks if other is not block]
            assert any(Path(file).stem in code for code in others), f"{block.place}: no block uses {file}"
        allowed = {"given", "needs", *(["file"] if block.language in ("yaml", "json") else [])}
        assert block.marks.keys() in ({"not run"}, block.marks.keys() & allowed), f"{block.place}: {block.marks}"
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) - targets == set()
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_most_blocks_are_run_and_every_command_is_on_its_page():
    """What needs a GPU, an engine or minutes are commands; of each other language at most one block has such a need."""
    blocks = [block for page in PAGES for block in read_blocks(page) if block.language in LANGUAGES]
    assert {"README.md", "docs/training.md", "docs/cli.md"} <= {name_of(page) for page in RUN_PAGES}
    for language in LANGUAGES - {"bash"}:
        left_out = [block.place for block in blocks if block.language == language and not block.is_run]
        assert len(left_out) <= 1, f"{language} blocks need no GPU or engine as a rule; not run: {left_out}"
    page = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(COMMANDS)


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
    assert quoted and [quote for quote in quoted if not any(quote.strip(". ") in message for message in messages)] == []


SAID = {"distil": ["of what the codes leave recovered"], "look_inside": ["rows, ", "top 50"]}
NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_and_holds_no_output(notebook, tiny_model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    document = json.loads(notebook.read_text(encoding="utf-8"))
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in document["cells"]]
    assert len(set(ids)) == len(ids)
    namespace = {"__name__": "__main__"}
    for cell in document["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            code = "".join(cell["source"])
            assert MODEL in code or "SmolLM2" not in code
            exec(compile(code.replace(MODEL, str(tiny_model_path)), f"{notebook.name}:{cell['id']}", "exec"), namespace)
    out = capsys.readouterr().out
    assert [said for said in SAID[notebook.stem] if said not in out] == [] and len(NOTEBOOKS) == len(SAID)
