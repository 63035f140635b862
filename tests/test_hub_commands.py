"""Every command that takes an adapter or a set takes one on the Hub, pinned to its commit, and trusts none of it."""

import json
import re

import pytest
from hub_runs import PUSHED
from test_hub_strangers import TRAPS

from quantkd import TransferSet
from quantkd.evaluation.arms import Arm
from quantkd.hub import push_adapter, push_transfer_set

pytest_plugins = ["hub_runs"]


@pytest.fixture
def trapped(hub, run, training_set):
    """An adapter and a set on the Hub, with pickles and another base model beside them; and the adapter's commit."""
    push_adapter(run / "student", "user/student")
    files = hub.files("model", "user/student")
    fields = {**json.loads(files["adapter_config.json"]), "base_model_name_or_path": "evil/model"}
    bad = {**files, **TRAPS, "adapter_config.json": json.dumps(fields).encode(), "evil.py": b"raise AssertionError"}
    commit = hub.repositories["model", "user/student"].add("upload", bad).sha
    push_transfer_set(training_set, "user/held")
    hub.requests.clear()
    return commit


@pytest.fixture
def say(cli, caplog):
    caplog.set_level("INFO", "quantkd.remote")

    def say(*words):
        caplog.clear()
        return cli.ok(*words) + caplog.text

    return say


def test_every_command_that_takes_an_adapter(hub, run, trapped, tiny_model_path, training_set, tmp_path, say, cli):
    base = ["--model_name_or_path", tiny_model_path, "--dtype", "float32"]
    held = hub.repositories["dataset", "user/held"].commits[-1].sha
    folder, first = str(run / "student"), hub.repositories["model", "user/student"].commits[1].sha
    kl = {}
    for name, commit in ((folder, None), ("user/student", trapped), (f"user/student@{first}", first)):
        place = tmp_path / f"arm{len(kl)}"
        text = say("evaluate", *base, "--adapter", name, "--held_out", "user/held", "--arm", "x", "--run_dir", place)
        assert f"Transfer set user/held at {held}, digest {training_set.digest}" in text
        assert (f"Adapter user/student at {commit}" in text) == (commit is not None)
        means = Arm.read(place / "evaluation" / "x.json").fidelity.means
        kl[name] = means["kl"]
        assert f"x.json: KL {kl[name]:.4f} nats per token, perplexity {means['perplexity']:.2f}, " in text
        assert f"{100 * means['top1_agreement']:.1f}% on 8 rows" in text
    assert len(set(kl.values())) == 1 and kl[folder] > 0

    base += ["--held_out", "user/held"]
    text = say("view", *base, "--adapter", f"user/student@{trapped}", "--output", tmp_path / "page.html")
    assert f"Adapter user/student at {trapped}" in text
    assert float(re.search(r"KL [\d.]+ before, ([\d.]+) after", text)[1]) == pytest.approx(kl[folder], abs=1e-4)

    for form in ("merged", "adapter"):
        out = tmp_path / form
        words = f"--form {form} --adapter user/student --output_dir {out}".split()
        words += ["--save_dtype", "float32"] if form == "merged" else []
        text = say("export", *base, *words)
        assert f"Adapter user/student at {trapped}" in text
        assert not [file for file in out.iterdir() if file.suffix in (".bin", ".pt", ".py")]
        assert "evil" not in "".join(file.read_text() for file in out.glob("*.json") if file.name != "tokenizer.json")
        assert json.loads((out / "quantkd.json").read_text())["transfer_set_digest"] == training_set.digest
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert weights == (run / "student" / "adapter_model.safetensors").read_bytes()

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    words = ["capture", "--model", tiny_model_path, "--prompts", tmp_path / "prompts.jsonl", "--max_new_tokens", "4"]
    words += ["--dtype", "float32", "--teacher_adapter"]
    said = "The base model has no quantized weights; expected for the adapter"
    cli.fails(said, *words, folder, "--output_dir", tmp_path / "refused")
    facts = json.dumps({**json.loads((run / "student" / "quantkd.json").read_text()), "weights": None})
    (run / "student" / "quantkd.json").write_text(facts)  # as if it was not trained on quantized weights
    files = {**hub.files("model", "user/student"), "quantkd.json": facts.encode()}
    trapped = hub.repositories["model", "user/student"].add("of full precision", files).sha
    digests = {}
    for name in (folder, "user/student"):
        out = tmp_path / f"set{len(digests)}"
        text = say(*words, name, "--output_dir", out)
        digests[name] = TransferSet(out).plan.extra["adapter"]["sha256"]
    assert f"Adapter user/student at {trapped}" in text and len(set(digests.values())) == 1

    asked = [path for _, path in hub.requests]
    assert not [path for path in asked if path.endswith((".bin", ".pt", ".py")) or "evil" in path]


def test_every_command_that_takes_a_set(hub, trapped, tiny_model_path, training_set, tmp_path, say):
    commit = hub.repositories["dataset", "user/held"].commits[-1].sha
    base = f"--model_name_or_path {tiny_model_path} --dtype float32 --report_to none --max_steps 1"
    for words in (
        "inspect user/held --rows 0",
        f"verify user/held@{commit}",
        f"verify user/held --teacher {tiny_model_path} --rows 2",
        f"convert user/held {tmp_path}/compact --storage nucleus:0.9",
        f"train {base} --transfer_set user/held --eval_transfer_set user/held@{commit} --output_dir {tmp_path}/student",
    ):
        assert f"Transfer set user/held at {commit}, digest {training_set.digest}" in say(*words.split()), words
    facts = json.loads((tmp_path / "student" / "quantkd.json").read_text())
    assert facts["transfer_set"] == f"user/held at {commit}"


@pytest.mark.parametrize(("name", "said"), [
    ("user/none", "There is no folder 'user/none' here. On the Hub: "), ("./nowhere", "no folder './nowhere'"),
    ("user/student@v9", "Could not fetch adapter_config.json of user/student at v9"),
])  # fmt: skip
def test_what_is_refused_is_refused_in_one_line(hub, trapped, tiny_model_path, cli, name, said):
    words = f"--model_name_or_path {tiny_model_path} --adapter {name} --held_out user/held --arm x --run_dir r"
    cli.fails(said, "evaluate", *words.split())


def test_push(hub, run, small_set, tmp_path, cli, say, monkeypatch):
    folder = tmp_path / "small"
    listed = say("push", run, "user/student", "--dry_run")
    assert {line.split()[-1] for line in listed.splitlines()[:-1]} == PUSHED
    assert "would go to user/student (private)" in listed
    text = say("push", folder, "user/set", "--dry_run", "--public")
    assert "5 files" in text and "(public)" in text and hub.requests == []
    text = say("push", run, "user/student", "--license", "mit")
    commit = hub.repositories["model", "user/student"].commits[-1].sha
    assert f"{hub.endpoint}/user/student at {commit} (private)" in text
    say("push", folder, "user/set", "--public")
    assert not hub.repositories["dataset", "user/set"].private
    cli.fails("--public", "push", folder, "user/set")
    cli.fails("is a transfer set", "push", folder, "user/set", "--base_model", "x")
    cli.fails("expected one adapter", "push", tmp_path, "user/set")
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    for words in ([folder, "user/set"], [run, "user/student"], [run, "s"]):
        code, _, err = cli("push", *words)
        assert code and "no token to push to" in err and "`hf auth login`, or set HF_TOKEN" in err
    assert hub.requests == []
