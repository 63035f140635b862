"""Each undocumented name of another library: it is where it was, and what happens on the day that it is not."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from bitsandbytes.nn import Int8Params, Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, TrainingArguments

from quantkd import foreign
from quantkd.errors import MissingDependencyError
from quantkd.models.student import load_student


def empty_module(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, ModuleType(name))


def adapted(**options):
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4, bias=False))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["1"], init_lora_weights=False, **options))


def test_attention_and_a_cache_that_can_be_repeated(tiny_model, monkeypatch):
    assert foreign.attention_of(tiny_model.config) == "sdpa" and foreign.attention_of(SimpleNamespace()) is None
    with foreign.registered_attention("mine", print):
        assert AttentionInterface()["mine"] is print
        assert AttentionMaskInterface()["mine"] is AttentionMaskInterface()["sdpa"]
    assert "mine" not in AttentionInterface() and "mine" not in AttentionMaskInterface()
    assert "sdpa" in AttentionInterface()
    sliding = LlamaConfig(num_hidden_layers=2, layer_types=["sliding_attention"] * 2, sliding_window=4)
    assert foreign.is_plain_cache(DynamicCache(config=tiny_model.config))
    assert not foreign.is_plain_cache(DynamicCache(config=sliding))
    empty_module(monkeypatch, "transformers.cache_utils")
    assert not foreign.is_plain_cache(DynamicCache(config=tiny_model.config))


def test_the_commit_of_a_model(tmp_path, monkeypatch):
    commit = "c0ffee" + "0" * 34
    cached = tmp_path / "models--user--model"
    for folder in (f"snapshots/{commit}", "refs"):
        (cached / folder).mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = [("user/model", revision, commit) for revision in (None, "main", commit)]
    for name, revision, expected in (*found, ("user/model", "v1", ""), (cached / "snapshots" / commit, None, "")):
        config = transformers.AutoConfig.from_pretrained(name, revision="main" if revision == "v1" else revision)
        foreign.keep_commit(config, revision)
        assert foreign.commit_of(config) == expected, (name, revision)
    config._commit_hash = "abc"  # as earlier releases of transformers do
    foreign.keep_commit(config, None)
    assert foreign.commit_of(config) == "abc" and "abc" not in config.to_json_string()


def test_a_model_s_quantization_ties_keys_and_float32_modules(tiny_model, tiny_model_path):
    student = load_student(str(tiny_model_path), dtype="float32")
    assert foreign.is_trainable(student) and foreign.is_trainable(tiny_model)
    assert student.is_quantized and student.is_loaded_in_4bit
    foreign.remove_quantization(student)
    assert not (student.is_quantized or student.is_loaded_in_4bit or hasattr(student, "hf_device_map"))
    assert not hasattr(student.config, "quantization_config")
    student.hf_quantizer = SimpleNamespace(is_trainable=False)
    assert not foreign.is_trainable(student)
    tiny_model.all_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    foreign.untie_weights(tiny_model)
    assert tiny_model.all_tied_weights_keys == {}
    assert foreign.float32_modules(tiny_model) == set() == foreign.float32_modules(SimpleNamespace())
    tiny_model._keep_in_fp32_modules_strict = {"norm"}
    assert foreign.float32_modules(tiny_model) == {"norm"}
    assert foreign.map_checkpoint([KEY], tiny_model) == ({KEY: KEY}, set())


def test_a_model_that_was_stored_quantized(tiny_model_path, tmp_path):
    first = load_student(str(tiny_model_path), dtype="float32")
    first.save_pretrained(tmp_path / "first")
    again = load_student(str(tmp_path / "first"), dtype="float32")
    with pytest.raises(NotImplementedError):  # the day that it is not raised, `keep_saveable` can go
        again.save_pretrained(tmp_path / "again")
    foreign.keep_saveable(again)
    again.save_pretrained(tmp_path / "again")
    stored = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again")]
    assert stored[0] == stored[1]
    options = {"args": TrainingArguments(str(tmp_path / "out"), use_cpu=True), "train_dataset": []}
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(again, **options)
    with foreign.trainable_without_adapters(again):
        transformers.Trainer(again, **options)
    assert again.is_quantized


KEY = "model.layers.0.mlp.up_proj.weight"
OLD, STATE = SimpleNamespace(), SimpleNamespace(process_index=1, num_processes=2)


@pytest.mark.parametrize(("module", "call", "arguments", "said"), [
    ("transformers.core_model_loading", "map_checkpoint", ([KEY], OLD), r"core_model_loading\.\w+, which reading "),
    ("transformers.conversion_mapping", "map_checkpoint", ([KEY], OLD),
     r"transformers 5[.\d]+ has no \S+conversion_mapping\.\w+, which reading .* expected transformers 5.24"),
    ("transformers.integrations", "installed_trackers", (), "integrations.get_available_reporting_integrations, which"),
    ("transformers.integrations", "shares_weights", (), "has no transformers.integrations.is_deepspeed_zero3_enabled"),
    ("peft.utils.other", "unwrap_trained_module", (OLD,), "has no peft.utils.other.AuxiliaryTrainingWrapper"),
    ("bitsandbytes.functional", "find_unpacking", (), r"bitsandbytes [.\d]+ has no bitsandbytes.functional._convert_"),
    ("", "remove_quantization", (SimpleNamespace(hf_quantizer=OLD),), "quantizers.HfQuantizer.remove_quantization"),
    ("", "trainable_without_adapters", (OLD,), "has no transformers.PreTrainedModel.is_quantized, which train_scales"),
    ("", "untie_weights", (OLD,), "has no transformers.PreTrainedModel.all_tied_weights_keys"),
    ("", "use_one_gpu", (SimpleNamespace(n_gpu=4),), "has no transformers.TrainingArguments._n_gpu"),
    ("", "int8_scales", (SimpleNamespace(weight=OLD),), "has no bitsandbytes.nn.Int8Params.SCB"),
    ("", "spread_harness", (SimpleNamespace(rank=0, world_size=1), STATE),
     "lm_eval .* has no lm_eval.models.huggingface.HFLM._rank"),
])  # fmt: skip
def test_what_a_release_does_not_have_is_named(monkeypatch, module, call, arguments, said):
    empty_module(monkeypatch, module)
    with pytest.raises(MissingDependencyError, match=said):
        found = getattr(foreign, call)(*arguments)
        with found:  # where it is a context
            pass


def test_the_environment_of_the_trainer_and_of_a_harness(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 4
    foreign.use_one_gpu(args)
    assert args.n_gpu == 1 and isinstance(foreign.installed_trackers(), list)
    assert not foreign.is_zero3() and not foreign.shares_weights() and foreign.mixed_precision() == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` writes it
    assert foreign.shares_weights() and foreign.mixed_precision() == "bf16"

    class Harnessed:  # as lm-eval's: the public names read the private ones
        rank = property(lambda self: self._rank)
        world_size = property(lambda self: self._world_size)

    harnessed = Harnessed()
    foreign.spread_harness(harnessed, STATE)
    assert (harnessed.rank, harnessed.world_size, harnessed.accelerator) == (1, 2, STATE)


def test_the_shape_of_a_partitioned_parameter():
    parameter = nn.Parameter(torch.zeros(0))
    assert foreign.shape_of(parameter) == (0,)
    parameter.ds_shape = torch.Size([3, 2])  # as ZeRO-3 leaves it
    assert foreign.shape_of(parameter) == (3, 2)


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_an_adapter_adds(use_dora):
    model = adapted(use_dora=use_dora)
    layer = model.base_model.model[1]
    assert (foreign.lora_variant_of(layer, "default") is not None) == use_dora
    inputs = torch.randn(5, 4)
    merged = foreign.merge_lora(layer, "default", layer.get_base_layer().weight)
    torch.testing.assert_close(inputs @ merged.T, layer(inputs))
    if use_dora:
        layer.lora_variant["default"] = SimpleNamespace()
        with pytest.raises(MissingDependencyError, match=r"peft .* has no peft.tuners.lora.LoraVariant.merge_safe"):
            foreign.merge_lora(layer, "default", layer.get_base_layer().weight)
    del layer.lora_variant
    with pytest.raises(MissingDependencyError, match=r"has no peft.tuners.lora.LoraLayer.lora_variant, which"):
        foreign.merge_lora(layer, "default", layer.get_base_layer().weight)
    assert foreign.merge_lora(nn.Linear(2, 2), "default", torch.zeros(2, 2)) is None


@pytest.mark.parametrize("options", [{"modules_to_save": ["0"]}, {"trainable_token_indices": {"0": [1]}}])
def test_a_module_that_is_trained_whole(options):
    wrapped = adapted(**options).base_model.model[0]
    trained = foreign.unwrap_trained_module(wrapped)
    assert type(trained) is nn.Embedding and foreign.unwrap_trained_module(nn.Linear(2, 2)) is None


def test_bitsandbytes_repacking_and_int8_scales():
    layer = Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32, bias=False)
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    layer = layer.to("cpu").eval()
    assert foreign.repacks_on_cpu(layer) == layer.support_avx512bf16_for_cpu
    assert not foreign.is_repacked(layer.weight.quant_state) and not foreign.repacks_on_cpu(nn.Linear(2, 2))
    if foreign.repacks_on_cpu(layer):
        before = layer.weight.data.clone()
        with torch.no_grad():
            layer(torch.zeros(1, 64))
        assert foreign.is_repacked(layer.weight.quant_state)
        data, state = foreign.find_unpacking()(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(data.flatten(), before.flatten()) and not foreign.is_repacked(state)
    foreign.keep_from_repacking(layer)
    assert not foreign.repacks_on_cpu(layer)
    scales = torch.ones(4)
    weight = Int8Params(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False, has_fp16_weights=False, SCB=scales)
    assert foreign.int8_scales(SimpleNamespace(weight=weight)) is scales
    moved = SimpleNamespace(weight=SimpleNamespace(SCB=None), state=SimpleNamespace(SCB=scales))
    assert foreign.int8_scales(moved) is scales


UNDOCUMENTED = (
    "_attn_implementation", "_commit_hash", "_global_mapping", "_keep_in_fp32_modules_strict", "_n_gpu", "_rank",
    "_world_size", "ACCELERATE_", "AuxiliaryTrainingWrapper", "DynamicLayer", "SCB", "_VALID_DICT_FIELDS",
    "all_tied_weights_keys", "conversion_mapping", "core_model_loading", "ds_shape", "get_delta_weight",
    "get_length_grouped_indices", "hf_device_map", "hf_quantizer", "is_loaded_in_4bit", "lora_variant", "masking_utils",
    "merge_safe", "packing_format_for_cpu", "support_avx512bf16_for_cpu", "transformers.integrations",
)  # fmt: skip


def test_no_other_module_touches_these_names_and_every_function_is_tested_here():
    package = Path(foreign.__file__).parent
    pattern = re.compile("|".join(rf"\b{name}\b" if name[-1] != "_" else name for name in UNDOCUMENTED))
    places = {path for path in package.rglob("*.py") if path.name != "foreign.py"}
    assert [path.name for path in sorted(places) if pattern.search(path.read_text(encoding="utf-8"))] == []
    names = [name for name, value in vars(foreign).items() if getattr(value, "__module__", "") == foreign.__name__]
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in names if not name.startswith("_") and f"foreign.{name}" not in source] == []
