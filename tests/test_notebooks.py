"""The notebooks run from top to bottom, in an empty folder, with a tiny model in place of the one they name."""

import json

import pytest
from conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_there_are_two():
    assert [notebook.stem for notebook in NOTEBOOKS] == ["distil", "look_inside"]


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
    assert ("of the gap recovered" in out) if notebook.stem == "distil" else ("rows, " in out and "top 50" in out)
