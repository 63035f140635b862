"""The command line: what it prints, how it fails, and that it decides nothing by itself."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import safetensors

from quantkd.cli.main import COMMANDS, main
from quantkd.loss.states import TargetStates
from tests.conftest import TRAINING_PROMPTS, refused
from tests.fake_hub import TOKEN
from tests.hub_runs import damage


def test_usage(cli):
    assert cli()[0] == 2
    code, out, _ = cli("--help")
    assert code == 0 and "capture" in out and "selftest" in out
    code, _, err = cli("captrue")
    assert code == 2 and "there is no command 'captrue'; the commands are capture," in err
    assert cli("--version")[1].startswith("quantkd 0.")


def test_help_is_there_within_half_a_second_and_loads_nothing_heavy():
    code = (
        "import atexit, os, sys\n"
        "heavy = {'torch', 'numpy', 'transformers', 'trl', 'peft', 'datasets'}\n"
        "quiet = ('TQDM_DISABLE', 'HF_HUB_DISABLE_PROGRESS_BARS')\n"
        "atexit.register(lambda: print('loaded', *heavy & set(sys.modules), *map(os.environ.get, quiet)))\n"
        "from quantkd.cli.main import run\nsys.argv = ['quantkd', '--help']\nrun()"
    )
    # What the user set stays.
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    environment.pop("TQDM_DISABLE", None)
    seconds, words = [], [sys.executable, "-c", code]
    for _ in range(5):  # the best of five: how busy the machine is does not count
        start = time.perf_counter()
        out = subprocess.run(words, capture_output=True, text=True, check=True, env=environment, timeout=120).stdout
        seconds.append(time.perf_counter() - start)
        assert out.startswith("usage: quantkd") and out.splitlines()[-1] == "loaded 1 0"
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_shows_examples_that_it_takes(name, cli):
    code, out, _ = cli(name, "--help")
    options, _, examples = out.partition("examples:\n")
    assert code == 0 and examples.startswith(f"  quantkd {name}")
    shown = re.sub(r"\\\n", " ", examples).splitlines()
    for line in [line.strip() for line in shown if re.match(r" +(quantkd|accelerate launch) ", line)]:
        words = shlex.split(line.split("  ")[0])  # what follows two spaces is said about the command
        assert f"quantkd {name}" in line, f"an example of another command: {line}"
        flags = {word for word in words[words.index("quantkd") :] if word.startswith("--")}
        assert flags - set(re.findall(r"--[\w-]+", options)) == set(), line


def test_help_gives_defaults_and_none_where_there_is_none(cli):
    _, out, _ = cli("train", "--help")
    shown = " ".join(out.split())
    assert "the rest is cross- entropy. (default: 1.0)" in shown and "or zero. (default: covariance)" in shown
    assert "SUPPRESS" not in out and "(default: None)" not in out and "(default: )" not in out


def test_inspect_verify_and_convert(cli, training_set, tiny_model_path, tmp_path):
    out = cli.ok("inspect", training_set.sources[0], "--tokenizer", tiny_model_path, "--rows", 1)
    expected = ("teacher", tiny_model_path.name, "bytes per response token", "entries per token", " nats ", "tail")
    assert [piece for piece in (*expected, TRAINING_PROMPTS[0]) if piece not in out] == []
    assert "--tokenizer" in cli.ok("inspect", training_set.sources[0], "--rows", 1)
    found = json.loads(cli.ok("inspect", training_set.sources[0], "--json", "--rows", 2))
    assert found["num_rows"] == 8 and len(found["sample"]) == 2
    assert sum(found["histograms"]["entries"]) == found["num_response_tokens"]
    probabilities = [entry["probability"] for entry in found["sample"][0]["tokens"][0]["entries"]]
    assert probabilities == sorted(probabilities, reverse=True)

    def state():
        return dict(os.environ), signal.getsignal(signal.SIGTERM), logging.getLogger("quantkd.experiment").level

    before, words = state(), ("verify", training_set.sources[0])
    out = cli.ok(*words)
    assert "8 rows" in out and cli.ok(*words) == out and state() == before
    small = ("convert", training_set.sources[0], tmp_path / "small", "--storage", "nucleus:0.9")
    assert "nucleus(max_k=64, p=0.9)" in cli.ok(*small)
    shard = next((tmp_path / "small").glob("*.safetensors"))
    shard.write_bytes(damage(shard.read_bytes()))
    cli.fails(shard.name, "verify", tmp_path / "small")


def test_selftest_passes_on_a_sound_model_and_fails_on_a_misaligned_one(cli, tiny_model_path, monkeypatch):
    out = cli.ok("selftest", tiny_model_path)
    assert out.count("pass") == 7 and "FAIL" not in out
    sound = TargetStates.at_targets
    misaligned = lambda self, *places: sound(TargetStates(self.values.roll(1, 1)), *places)  # noqa: E731
    monkeypatch.setattr(TargetStates, "at_targets", misaligned)
    code, out, _ = cli("selftest", tiny_model_path)
    assert code == 1 and "FAIL  teacher = student" in out


@pytest.mark.parametrize(("words", "code", "said"), [
    ("capture --frobnicate 1", 2, "required"), ("CONFIG unknown.yaml --output_dir o", 2, "no option --colour"),
    ("capture --model M --prompts p --output_dir o --colour", 2, "no option --colour"),
    ("CONFIG bad.yaml", 1, "is not YAML: see line 2. Exp"), ("capture --config=text.yaml", 1, "text.yaml holds a str"),
    ("CONFIG no.yaml", 1, "No such file or directory"), ("CONFIG", 2, "expected one argument"),
    ("capture --model ./nowhere --prompts p.jsonl --output_dir o", 1, "no folder './nowhere'"),
    ("capture --model empty --prompts p.jsonl --output_dir o", 1, "empty holds no config.json"),
    ("capture --model no/model --prompts p.jsonl --output_dir o", 1, "'no/model' could not be"),
    ("OUT p.jsonl", 1, "p.jsonl is a file; the"), ("OUT p.jsonl/x", 1, "p.jsonl is a file; the"),
    ("OUT o --storage x", 1, "the storage rule 'x'"),
    ("OUT o --teacher_adapter empty", 1, "adapter_config.json"),  # before the model is looked for
    ("OUT o --temperature 2", 2, "did you mean --temperatures?"),
    ("OUT o --max_tokens 3", 2, "mean --max_new_"), ("OUT o --seed x", 2, "invalid int value: 'x'"),
    ("inspect SET --rows -1", 2, "found '-1'; expected a whole"), ("TRAIN --num_train_epochs 0", 1, "Nothing would be"),
    ("inspect SET --tokenizer empty", 1, "holds no tokenizer_config.json"), ("TEACHER no.jsonl", 1, "no.jsonl"),
    ("TEACHER p.jsonl --attn_implementation flash_attention_2", 1, "FlashAttention2"),
    ("inspect nothing", 1, "nothing"), ("inspect empty", 1, "neither index.json nor plan.json"),
    ("TRAIN --eval_strategy steps", 1, "there are no held-out rows. Give eval_dataset"),
    ("TRAIN --eval_on_start", 1, "eval_on_start is True, and there are no held-out rows. Give eval_dataset"),
    ("TRAIN --report_to notrack", 1, "names notrack; installed"), ("EXPORT --lora_r 4", 1, "lora_r has no effect here"),
    ("TRAIN --bf16 true --fp16 true", 1, "but not both. `quantkd train --help` lists the"),
    ("CONFIG twice.yaml", 1, "twice.yaml has model in lines 1 and 3. Remove one."),
    ('TRAIN --model_init_kwargs {"revision":"x"}', 1, "for models that Python code gives by name. Use"),
    ('TRAIN --teacher_model_init_kwargs {"a":1}', 1, "for models that Python code gives by name. Use"),
    ("TRAIN --student_format nf4 --bnb_4bit_quant_type fp4", 1, "is nf4, and another option says fp4"),
    ("SWEEP --control ce", 1, "control has no effect here"),
    ("verify SET --rows 3", 1, "rows has no effect without teacher"),
    ("EXPORT --save_dtype float16", 1, "without form=merged or form=requantized"),
    ("view --held_out SET --adapter a --output o.html --model_name_or_path m --use_dora", 1, "use_dora has no effect"),
    ("HELD --lora_alpha 4", 1, "lora_alpha has no effect here"),
    ("HELD --full_precision --load_in_8bit", 1, "load_in_8bit has no effect here"),
    ("HELD --shots 2", 1, "shots has no effect without gsm8k"),
    ("HELD --limit 2", 1, "limit has no effect without gsm8k or prompts"),
    ("HELD --rerun_tasks", 1, "rerun_tasks has no effect without tasks"),
    ("EVALUATE --arm x --prompts p.jsonl --title x", 1, "title has no effect without held_out or gsm8k or"),
    ("EXPORT --student_format nf4", 1, "student_format has no effect here"),
    ("EXPORT --dtype float32", 1, "dtype has no effect here"),
    ("EXPORT --form gguf_adapter --load_in_8bit", 1, "load_in_8bit has no effect here"),
    ("EXPORT --form gguf_adapter --model_revision x", 1, "model_revision has no effect here"),
    ("SCALES --lora_r 4", 1, "lora_r has no effect here"), ("SCALES --use_dora", 1, "use_dora has no effect here"),
    ("SCALES --init loftq", 1, "init has no effect here"), ("SCALES --init_from m", 1, "init_from has no effect here"),
    ("TRAIN --load_in_8bit --use_bnb_nested_quant false", 1, "use_bnb_nested_quant has no effect without load_in_4bit"),
    ("HELD --load_in_8bit --bnb_4bit_quant_type fp4", 1, "bnb_4bit_quant_type has no effect without load_in_4bit"),
    ("STORED --bnb_4bit_quant_type fp4", 1, "bnb_4bit_quant_type has no effect here"),
    ("TRAIN --gguf_file m.gguf --bnb_4bit_quant_type fp4", 1, "bnb_4bit_quant_type has no effect here"),
    ("TRAIN --scales_learning_rate 0.1", 1, "scales_learning_rate has no effect without train_scales"),
    ("TRAIN --train_scales --student_format int8", 1, "the student has no 4-bit layer of bitsandbytes"),
    ("TRAIN --train_scales --use_dora", 1, "train_scales takes plain LoRA"),
    ("TRAIN --train_scales --push_to_hub", 1, "train_scales changes the student below it. Leave one of them"),
    ("TRAIN --use_peft false", 1, "leave use_peft on, or train its scales with train_scales"),
    ("SWEEP --train_scales", 1, "Leave train_scales out"),
    ("SWEEP --resume_from_checkpoint x", 1, "Leave resume_from_checkpoint out"),
    ("TRAIN --lora_r 0", 1, "positive integer value but the value passed is 0. (`quantkd --tr"),
    (f"HELD --title {'x' * 1001}", 1, "The title has 1001 characters; expected at most 1000"),
    ("evaluate --run_dir r --arm x --full_precision", 1, "required: --model_"),
    ("NOWHERE --held_out empty", 1, "neither index.json nor plan.json"),
    ("NOWHERE --prompts p.txt", 1, "'p.txt' is neither a file"), ("selftest empty", 1, "empty holds no config.json"),
    ("NOWHERE --prompts p.jsonl --adapter empty", 1, "adapter_config"),
    ("view --held_out SET --adapter empty --output o.html --model_name_or_path no", 1, "adapter_config.json"),
    ("capture --model_name_or_path ./no --prompts p.jsonl --output_dir o", 1, "no folder './no'"),
])  # fmt: skip
def test_wrong_input_is_one_line(cli, tmp_path, monkeypatch, training_set, tiny_model_path, words, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "bad.yaml").write_text(f"seed: 1\nhub_token: {TOKEN}: x\n")
    (tmp_path / "text.yaml").write_text("hello\n")
    (tmp_path / "twice.yaml").write_text("model: m\nprompts: p\nmodel: n\n")
    (tmp_path / "unknown.yaml").write_text("model: m\nprompts: p\ncolour: blue\n")
    shutil.copytree(tiny_model_path, "stored", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads(Path("stored/config.json").read_text())
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    Path("stored/config.json").write_text(json.dumps({**config, "quantization_config": nf4}))
    named, train = ["--model_name_or_path", tiny_model_path], ["--transfer_set", training_set.sources[0]]
    train, evaluate = [*named, *train, "--output_dir", "o"], ["evaluate", *named, "--run_dir", "r"]
    stands_for = {
        "SET": training_set.sources, "OUT": ["capture", "--model", "no", "--prompts", "p.jsonl", "--output_dir"],
        "TEACHER": ["capture", "--model", tiny_model_path, "--output_dir", "o", "--prompts"],
        "SCALES": ["train", *train, "--train_scales", "--use_peft", "false"],
        "STORED": [*evaluate, "--arm", "x", "--held_out", *training_set.sources, "--model_name_or_path", "stored"],
        "CONFIG": ["capture", "--config"], "TRAIN": ["train", *train], "EVALUATE": evaluate,
        "SWEEP": ["sweep", *train, "--space", "alpha=0,1", "--eval_fraction", 0.3],
        "EXPORT": ["export", *named, "--output_dir", "o", "--adapter", "a", "--form", "adapter"],
        "HELD": [*evaluate, "--arm", "x", "--held_out", training_set.sources[0]],
        "NOWHERE": ["evaluate", "--model_name_or_path", "no", "--run_dir", "r", "--arm", "x"],
    }  # fmt: skip
    found, out, err = cli(*(part for word in words.split() for part in stands_for.get(word, [word])))
    last = [line for line in err.splitlines() if "quantkd " in line][-1]
    assert found == code and said in last
    assert [text for text in ("Traceback", "usage:", TOKEN[-6:]) if text in out + err] == []
    assert not list(tmp_path.rglob("*.safetensors"))


FULL = "[enforce fail] . PytorchStreamWriter failed writing file"
NO_SPACE = "Error while serializing: No space left on device"


@pytest.mark.parametrize(("raised", "said"), [
    (safetensors.SafetensorError(NO_SPACE), NO_SPACE), (RuntimeError(FULL), FULL),
    (OSError(f"https://me:{TOKEN}@host with wordsandwordsandwords"), "https://me:[secret]@host with [secret]."),
])  # fmt: skip
def test_a_full_disk_is_one_line_a_bug_is_not_and_no_secret_is_printed(cli, monkeypatch, raised, said):
    monkeypatch.setenv("MY_PASSPHRASE", "wordsandwordsandwords")
    monkeypatch.setattr("quantkd.cli.verify.main", Mock(side_effect=[raised, RuntimeError("a bug")]))
    found, _, err = cli("verify", "x")
    assert found == 1 and said in err and len(err.splitlines()) == 1
    refused(RuntimeError, "a bug", main, ["verify", "x"])
