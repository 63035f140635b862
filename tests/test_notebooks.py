"""The notebooks run from top to bottom, in an empty folder, with a tiny model in place of the one they name."""

import json

import pytest
from conftest import REPOSITORY

SAID = {"distil": ["of the gap recovered"], "look_inside": ["rows, ", "top 50"]}
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
