"""Export: the merged weights are the student's own, every form loads in plain transformers and PEFT, a loss is said."""

import copy
import json
import os
import shutil
import weakref
from itertools import product
from pathlib import Path

import pytest
import torch
from families import build
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.hardware import native_compute_dtype
from quantkd.models.export import export_adapter, export_checkpoint, load_exported
from quantkd.models.merging import merge_adapters
from quantkd.models.provenance import Provenance
from quantkd.models.student import default_quantization_config, load_student
from quantkd.models.weights import dequantize_weight
from tests.conftest import refused, save_adapter

IDS = torch.arange(5, 45).view(2, 20)
VARIANTS = {
    "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]}, "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained rows": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
}  # fmt: skip
# The adapted student is loaded anew for each merge, which uses it up.
load = pytest.fixture(lambda tiny_model_path, saved_adapter: lambda: load_adapted(tiny_model_path, saved_adapter))
adapter = pytest.fixture(lambda saved_adapter, tmp_path: Path(shutil.copytree(saved_adapter, tmp_path / "adapter")))


@pytest.fixture(scope="module")
def bases(tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    build("Llama, tied", 320).save_pretrained(folder / "tied")
    assert "lm_head.weight" not in load_file(folder / "tied" / "model.safetensors")
    build("GPT-2", 320, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0).save_pretrained(folder / "GPT-2")
    return {"untied": tiny_model_path, "tied": folder / "tied", "GPT-2": folder / "GPT-2"}


def load_adapted(base, adapter, **options):
    return PeftModel.from_pretrained(load_student(str(base), dtype="float32", **options), adapter)


@pytest.fixture(scope="module")
def saved_adapter(tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(load_student(str(tiny_model_path), dtype="float32"), folder)
    return folder


@pytest.mark.parametrize(("name", "kind"), [*product(VARIANTS, ("untied", "tied")), ("plain", "GPT-2")])
def test_the_merged_model_is_the_adapted_one(name, kind, bases, tiny_tokenizer, tmp_path):
    """Also of GPT-2, whose weights lie the other way round."""
    save_adapter(load_student(str(bases[kind]), dtype="float32"), tmp_path / "adapter", **VARIANTS[name])
    model = load_adapted(bases[kind], tmp_path / "adapter")
    # In training mode, where bitsandbytes computes through the dequantized weight and not its bfloat16 kernel.
    with torch.no_grad():
        expected = model.train()(IDS).logits
        with model.disable_adapter():
            assert (model(IDS).logits - expected).abs().max() > 0.1
    export_checkpoint(model, tiny_tokenizer, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32 and not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4 if kind == "GPT-2" else 2e-4)
    stays_tied = kind != "untied" and name not in ("modules_to_save", "head", "embeddings")  # PEFT trains rows of both
    assert merged.config.tie_word_embeddings == stays_tied


def test_layers_are_let_go_of_one_by_one(monkeypatch, load):
    model = load()
    layers = [weakref.ref(module) for module in model.modules() if hasattr(module, "quant_state")]
    alive = []

    def dequantize(module):
        alive.append(sum(layer() is not None for layer in layers))
        return dequantize_weight(module)

    monkeypatch.setattr("quantkd.models.merging.dequantize_weight", dequantize)
    merge_adapters(model)
    assert alive == list(range(len(layers), 0, -1)) and len(layers) == 14


@pytest.mark.parametrize("config", ["fp4", "int8"])
def test_other_formats_merge(config, tiny_model_path, adapter):
    model = load_adapted(tiny_model_path, adapter, quantization_config=config).train()
    with torch.no_grad():
        expected = model(IDS).logits
        merged = merge_adapters(model, torch.float32)
        # bitsandbytes multiplies int8 by int8: it rounds the activations, too.
        difference = (merged(IDS).logits - expected).abs().mean() / expected.abs().mean()
    assert difference < (0.02 if config == "int8" else 1e-4)


def test_what_an_exported_folder_holds(tiny_model_path, tiny_tokenizer, tmp_path, monkeypatch, load, adapter):
    monkeypatch.setattr(os, "umask", None)  # of the whole process: a file that another thread makes would get it
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt"):
        (adapter / name).write_bytes(b"x")
    (adapter / "quantkd.json").write_text('{"teacher": "T"}')
    out = tmp_path / "out"
    export_adapter(str(adapter), tiny_tokenizer, out / "a", base=str(tiny_model_path))
    export_checkpoint(load(), tiny_tokenizer, out / "m", provenance=Provenance(teacher="T"))
    both = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "quantkd.json"}
    for name, files in (
        ("m", {"config.json", "generation_config.json", "model.safetensors"}),
        ("a", {"adapter_config.json", "adapter_model.safetensors", "README.md"}),
    ):
        assert {file.name for file in (out / name).iterdir()} == both | files
    assert [path.name for path in sorted(out.iterdir())] == ["a", "m"]  # and no temporary folder
    (tmp_path / "plain").mkdir()
    assert (out / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode
    for file in out.rglob("*.json"):
        assert str(tiny_model_path.parent) not in file.read_text(), file
    assert AutoTokenizer.from_pretrained(out / "m").chat_template == tiny_tokenizer.chat_template
    facts = json.loads((out / "m" / "quantkd.json").read_text())
    assert facts["teacher"] == "T" and facts["export"]["form"] == "merged"
    assert facts["export"]["dequantized_from"]["bnb_4bit_quant_type"] == "nf4"


@pytest.mark.parametrize("form", ["merged", "requantized"])
def test_an_exported_model_stops_where_the_chat_template_ends_a_turn(tiny_tokenizer, tmp_path, load, form):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "<|bos|>"  # as base models have an end of text beside ChatML
    model = load()
    model.get_base_model().generation_config.eos_token_id = tokenizer.eos_token_id
    folder = export_checkpoint(model, tokenizer, tmp_path / form, form=form)
    ends = tokenizer.convert_tokens_to_ids(["<|bos|>", "<|im_end|>"])
    assert load_exported(folder).generation_config.eos_token_id == sorted(ends)


def test_provenance_is_read_as_it_was_written(tmp_path):
    assert Provenance.read(tmp_path) == Provenance()
    weights = {"sha256": "ab", "sums": [0.5]}
    written = Provenance("0.1", None, "d1", "T", {"alpha": 1.0}, {"seed": 0}, None, weights, {"form": "merged"})
    written.write(tmp_path)
    assert Provenance.read(tmp_path) == written
    for text, message in (
        ("{", "is not JSON"),
        ('{"teacher": "T", "teacher": "S"}', "the key 'teacher' is there twice"),
        ("[]", "holds a list; expected an object"),
        ('{"weights": {"sha256": "ab", "sums": 5}}', r"weights in .* is .*; expected a sha256 and sums"),
        ('{"weights": {"sums": []}}', r"weights in .* is .*; expected a sha256 and sums"),
        ('{"teacher": ["T"]}', r"teacher in .* is \['T'\]; expected a str"),
    ):
        (tmp_path / "quantkd.json").write_text(text)
        refused(DataError, message, Provenance.read, tmp_path)
    (tmp_path / "quantkd.json").write_text('{"teacher": "/data/ann/model", "token": "hf_secret"}')
    assert Provenance.read(tmp_path) == Provenance(teacher="model")


def figures_of(model, held_out):
    return evaluate_fidelity(model, held_out, progress=False).to_json()


def test_requantized_is_merged_and_quantized(tiny_tokenizer, tmp_path, training_set, load, monkeypatch):
    for dtype in ("float32", "bfloat16"):
        export_checkpoint(load(), tiny_tokenizer, tmp_path / dtype, dtype=dtype)
    exact, rounded = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    assert all(torch.equal(exact[name].bfloat16(), tensor) for name, tensor in rounded.items())
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"
    model, real = load(), AutoModelForCausalLM.from_pretrained

    def load_alone(*args, **options):  # although the caller holds the model, its weights are gone by now
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(AutoModelForCausalLM, "from_pretrained", load_alone)
        export_checkpoint(model, tiny_tokenizer, tmp_path / "again", dtype="float32", form="requantized")
    assert not (tmp_path / "again" / "merged").exists()
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert quantized.config.quantization_config.bnb_4bit_quant_type == "nf4"
    options = {"quantization_config": default_quantization_config(torch.float32), "dtype": torch.float32}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", **options)
    assert figures_of(quantized, training_set) == figures_of(expected, training_set)
    size = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("again", "float32")]
    assert size[0] < 0.6 * size[1]  # embeddings and head are most of so small a model


def test_the_second_rounding_is_to_the_students_own_format(tiny_model_path, tiny_tokenizer, tmp_path, adapter):
    for config, expected in (
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, ("fp4", False)),
        ({"load_in_8bit": True}, ("nf4", True)),
    ):
        model = load_adapted(tiny_model_path, adapter, quantization_config=BitsAndBytesConfig(**config))
        out = export_checkpoint(model, tiny_tokenizer, tmp_path / expected[0], form="requantized")
        found = AutoConfig.from_pretrained(out).quantization_config
        assert (found["bnb_4bit_quant_type"], found["bnb_4bit_use_double_quant"]) == expected


def test_an_export_takes_a_new_folder_or_leaves_nothing(tiny_tokenizer, tmp_path, monkeypatch, load, adapter):
    with pytest.raises(ConfigError, match="a folder that is not empty; an export is written to a new one"):
        export_adapter(str(adapter), tiny_tokenizer, adapter, base="b")
    (tmp_path / "file").write_text("x")
    refused(ConfigError, "not a folder", export_checkpoint, load(), tiny_tokenizer, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export_adapter(str(adapter), tiny_tokenizer, tmp_path / "empty", base="b")
    assert (tmp_path / "empty" / "adapter_model.safetensors").is_file()

    def fail(folder):
        assert (Path(folder) / "model.safetensors").is_file() and not (tmp_path / "out" / "m").exists()
        raise OSError("No space left on device")

    monkeypatch.setattr(tiny_tokenizer, "save_pretrained", fail, raising=False)
    refused(OSError, "No space", export_checkpoint, load(), tiny_tokenizer, tmp_path / "out" / "m")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_merged_is_said(tiny_model_path, tiny_tokenizer, tmp_path, adapter, load):
    for config, message in (
        (LoraConfig(target_modules=["lm_head"], lora_bias=True), "lora_bias=True"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), "a merge knows LoRA"),
    ):
        with pytest.raises(ConfigError, match=message):
            merge_adapters(get_peft_model(load_student(str(tiny_model_path), dtype="float32"), config))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(DataError, match=r"holds adapter_model\.bin, a pickle.*expected adapter_model\.safetensors"):
        export_adapter(str(adapter), tiny_tokenizer, tmp_path / "out", base="b")
    model = load()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n)[0, 0] = torch.inf
    refused(ConfigError, r"merged weight of .*q_proj is not finite", merge_adapters, model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_has_the_figures_of_the_report_to_the_digit(cli, tiny_model_path, tmp_path, training_set, dtype):
    """The command's scores, and those of a fresh load with nothing but transformers and PEFT."""
    adapter = tmp_path / "trained"
    save_adapter(load_student(str(tiny_model_path), dtype=dtype), adapter)
    run_dir, torch_dtype = tmp_path / "run", getattr(torch, dtype)
    for form, arm in (("merged", "merged"), ("requantized", "requantized"), ("adapter", "after")):
        code, out, err = cli(
            "export", "--form", form, "--model_name_or_path", tiny_model_path, "--adapter", adapter,
            "--output_dir", tmp_path / form, "--held_out", training_set.sources[0], "--run_dir", run_dir,
            "--dtype", dtype, *(() if form == "adapter" else ("--save_dtype", dtype)),
        )  # fmt: skip
        assert code == 0, err
        assert "KL to the teacher on 8 rows" in out
        assert ("the second rounding took part" in err) == (form == "requantized")
        if form == "adapter":
            nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
            config = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch_dtype)
            base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch_dtype, quantization_config=config)
            model = PeftModel.from_pretrained(base, tmp_path / form)
        else:  # where bfloat16 is emulated, all is computed in float32
            computed = torch_dtype if native_compute_dtype() == torch.bfloat16 else torch.float32
            model = AutoModelForCausalLM.from_pretrained(tmp_path / form, dtype=computed)
        reported = json.loads((run_dir / "evaluation" / f"{arm}.json").read_text())
        assert reported["fidelity"]["rows"] == figures_of(model, training_set)["rows"], form
        assert reported["arm"] == arm


def test_a_merge_into_4_bit_is_refused_unless_it_is_accepted(cli, tiny_model_path, tmp_path, adapter):
    words = ["export", "--model_name_or_path", tiny_model_path, "--adapter", adapter]
    words += ["--output_dir", tmp_path / "out", "--form"]
    cli.fails("loses part of what was learned. Give --held_out SET", *words, "requantized")
    cli.fails("invalid choice: 'half'", *words, "half", code=2)
    cli.fails("run_dir has no effect without held_out", *words, "merged", "--run_dir", tmp_path / "run")
    assert not (tmp_path / "out").exists()
    trained_with = AutoTokenizer.from_pretrained(tiny_model_path)
    trained_with.chat_template = "{{ messages[0]['content'] }}"
    trained_with.save_pretrained(adapter)  # as the trainer does
    code, out, err = cli(*words, "requantized", "--accept_loss")
    assert code == 0 and "was not measured" in err and "requantized, 1" in out
    assert load_exported(tmp_path / "out").config.quantization_config.load_in_4bit
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == trained_with.chat_template
