"""The command line: what it prints, how it fails, and that it decides nothing by itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from quantkd import capture
from quantkd.cli.main import main

PROMPTS = ["One and one?", "Two and two?", "What is the sum of three and four?"]


@pytest.fixture(scope="module")
def set_path(tiny_model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "set"
    capture(str(tiny_model_path), PROMPTS, path, max_new_tokens=8, dtype="float32", progress=False)
    return path


def run(capsys, *words):
    """Exit code, standard output, standard error."""
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_usage(capsys):
    assert run(capsys)[0] == 2
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "capture" in out and "selftest" in out
    code, _, err = run(capsys, "captrue")
    assert code == 2 and "there is no command 'captrue'; the commands are capture," in err
    assert run(capsys, "--version")[1].startswith("quantkd 0.")


def test_help_is_instant_and_loads_no_torch():
    code = (
        "import sys, quantkd.cli.main as m\n"
        "try: m.main(['--help'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip().endswith("False")


def test_inspect_shows_facts_and_alternatives(capsys, set_path, tiny_model_path):
    code, out, _ = run(capsys, "inspect", set_path, "--tokenizer", tiny_model_path, "--rows", 1)
    assert code == 0
    for piece in ("teacher", tiny_model_path.name, "bytes a response token", "entries a token", "tail", "One and one?"):
        assert piece in out
    code, out, _ = run(capsys, "inspect", set_path, "--rows", 1)
    assert code == 0 and "--tokenizer" in out


def test_inspect_as_json(capsys, set_path):
    code, out, _ = run(capsys, "inspect", set_path, "--json", "--rows", 2)
    found = json.loads(out)
    assert code == 0 and found["num_rows"] == 3 and len(found["sample"]) == 2
    assert sum(found["histograms"]["entries"]) == found["num_response_tokens"]
    probabilities = [entry["probability"] for entry in found["sample"][0]["tokens"][0]["entries"]]
    assert probabilities == sorted(probabilities, reverse=True)


def test_inspect_draws_histograms(capsys, set_path, tmp_path):
    assert run(capsys, "inspect", set_path, "--histogram", tmp_path / "h.png")[0] == 0
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_verify_and_convert(capsys, set_path, tmp_path):
    code, out, _ = run(capsys, "verify", set_path)
    assert code == 0 and "3 rows" in out
    code, out, _ = run(capsys, "convert", set_path, tmp_path / "small", "--profile", "compact")
    assert code == 0 and "profile compact" in out
    shard = next((tmp_path / "small").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, _, err = run(capsys, "verify", tmp_path / "small")
    assert code == 1 and shard.name in err


def test_errors_are_one_line_and_exit_with_one(capsys, tmp_path, set_path, tiny_model_path):
    code, _, err = run(capsys, "inspect", tmp_path / "nothing")
    assert code == 1 and "nothing" in err and "Traceback" not in err
    code, _, err = run(
        capsys,
        "capture",
        "--model",
        tiny_model_path,
        "--prompts",
        tmp_path / "no.jsonl",
        "--output_dir",
        tmp_path / "s",
    )
    assert code == 1 and "no.jsonl" in err
    code, _, err = run(
        capsys, "train", "--model_name_or_path", tiny_model_path, "--transfer_set", set_path, "--output_dir",
        tmp_path / "o", "--temperature", "4.0",
    )  # fmt: skip
    assert code == 1 and "capture again with --temperatures 4.0" in err
    code, _, err = run(
        capsys, "capture", "--model", tiny_model_path, "--prompts", "x.jsonl", "--output_dir", tmp_path / "s",
        "--attn_implementation", "flash_attention_2",
    )  # fmt: skip
    assert code == 1 and "x.jsonl" in err
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    code, _, err = run(
        capsys, "capture", "--model", tiny_model_path, "--prompts", tmp_path / "p.jsonl", "--output_dir",
        tmp_path / "s", "--attn_implementation", "flash_attention_2",
    )  # fmt: skip
    assert code == 1 and "FlashAttention2" in err and "Traceback" not in err
    code, _, err = run(capsys, "report", tmp_path)
    assert code == 1


def test_selftest_passes_on_a_sound_model_and_fails_on_a_misaligned_one(capsys, tiny_model_path, monkeypatch):
    code, out, _ = run(capsys, "selftest", tiny_model_path)
    assert code == 0 and out.count("pass") == 7 and "FAIL" not in out

    from quantkd import selftest
    from quantkd.losses import select_targets

    monkeypatch.setattr(selftest, "select_targets", lambda logits, labels: select_targets(logits.roll(1, 1), labels))
    code, out, _ = run(capsys, "selftest", tiny_model_path)
    assert code == 1 and "FAIL  teacher = student" in out


def test_a_config_file_and_flags_mix(capsys, tmp_path, tiny_model_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    config = tmp_path / "capture.yaml"
    config.write_text(
        f"model: {tiny_model_path}\nprompts: {tmp_path / 'p.jsonl'}\nmax_new_tokens: 4\nstorage: topk:3\n"
    )
    code, out, _ = run(capsys, "capture", "--config", config, "--output_dir", tmp_path / "s", "--storage", "topk:2")
    assert code == 0 and "topk(k=2)" in out and "'max_new_tokens': 4" in out
