"""Loading a student: names and configs, checkpoints that are quantized already, and every refusal."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from families import build
from packed_checkpoints import load_in, require_package
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HqqConfig

from quantkd.cli.arguments import StudentArguments, load_student_from
from quantkd.errors import ConfigError
from quantkd.hub import load_adapter
from quantkd.models import student
from quantkd.models.cpu_repacking import keep_trainable_on_cpu
from quantkd.models.merging import merge_adapters
from quantkd.models.student import attach_lora, check_trainable, choose_kernel, format_of, load_student
from quantkd.models.weights import dequantize_weight
from tests.conftest import refused

IDS = torch.arange(120).view(6, 20)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def write_config(folder, quantization):
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "Qwen3"])
def test_how_much_is_quantized_and_adapted_is_said(family, tmp_path, caplog):
    """Experts in one parameter are adapted, and are not quantized; the adapter is one that is loaded again."""
    build(family, 320).save_pretrained(tmp_path / "model")
    caplog.set_level("INFO", "quantkd.models.student")
    model, again = (load_student(str(tmp_path / "model"), dtype="float32") for _ in range(2))
    linear = [each for each in model.modules() if isinstance(each, Linear4bit)]
    packed = sum(each.in_features * each.out_features for each in linear)
    rest = sum(p.numel() for p in model.model.parameters() if not hasattr(p, "quant_state"))
    share = packed / (packed + rest - model.get_input_embeddings().weight.numel())
    assert (share < 0.5) == (family != "Qwen3")
    options = {"lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = attach_lora(model, LoraConfig(r=2, init_lora_weights=False, **options)).eval()
    quantized, _, adapters = [each for each in caplog.records if each.name == "quantkd.models.student"]
    told, rest = f"{share:.0%} of the student's weights, embeddings and head aside, are quantized", ""
    if share < 0.5:
        told, rest = f"Only {told}", "; the largest rest is model.layers.0.mlp.experts, 18,432 weights"
    assert quantized.getMessage() == f"{told}{rest}." and (quantized.levelname == "WARNING") == (share < 0.5)
    assert adapters.getMessage().startswith(("100% of", "99% of")) and "have adapters." in adapters.getMessage()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, adapted(IDS).logits)
    if share < 0.5:
        refused(ConfigError, "experts in one parameter, which are not merged", merge_adapters, loaded)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_a_name_is_transformers_own_config_and_what_is_stored_stays(name, tiny_model_path, tmp_path):
    config = student.default_quantization_config(torch.float32, name)
    assert format_of(config) == name == format_of(config.to_dict())
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_path, quantization_config=config, dtype=torch.float32)
    plain.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = plain.eval()(IDS).logits
        for path, wanted in ((tiny_model_path, name), (tiny_model_path, config), (tmp_path, None), (tmp_path, name)):
            ours = load_student(str(path), quantization_config=wanted, dtype="float32")
            keep_trainable_on_cpu(ours)  # twice is once
            assert torch.equal(ours.eval()(IDS).logits, expected)


def test_torchao_s_4_bit_config_is_evaluated_and_not_trained(tiny_model_path):
    """IntxWeightOnlyConfig runs on a CPU, its 4-bit values in 8-bit integers."""
    require_package("torchao-int8")
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    config = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    model = load_student(str(tiny_model_path), quantization_config=config, dtype="float32")
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert len(layers) == 14
    for layer in layers:
        q, scale, zero = (getattr(layer.weight, part).double() for part in ("qdata", "scale", "zero_point"))
        expected = (q.view(len(q), -1, 32) - zero.view(len(q), -1, 1)) * scale.view(len(q), -1, 1)
        torch.testing.assert_close(dequantize_weight(layer).double(), expected.view_as(q), atol=1e-6, rtol=1e-5)
    refused(ConfigError, r"in torchao, which transformers does not train. Train nf4, fp4 or int8", attach_lora, model)


@pytest.mark.parametrize(("config", "name", "bits"), [
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8", 8),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", 4),  # of old, without its method
    ({"load_in_4bit": True}, "fp4", 4), (BitsAndBytesConfig(load_in_4bit=True), "fp4", 4),  # bitsandbytes' default
    ({"quant_method": "hqq", "nbits": 2}, "hqq", 2), ({"quant_method": "gptq", "bits": 3}, "gptq", 3),
    ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao", None),
    ({"quant_method": "fp8"}, "fp8", None),
])  # fmt: skip
def test_a_quantization_has_a_name_and_a_number_of_bits(config, name, bits):
    assert format_of(config) == name and student.bits_of(config) == bits


def test_a_quantization_is_described_by_what_decides_its_numbers(tiny_model, tiny_model_path):
    assert student.describe_quantization(tiny_model) is None and not student.is_quantized(tiny_model)
    model = attach_lora(load_student(str(tiny_model_path), dtype="float32"))
    described = student.describe_quantization(model)
    assert described == {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32",
    }  # fmt: skip
    assert json.loads(json.dumps(described)) == described
    model.get_base_model().config.quantization_config = described  # as a checkpoint's config.json holds it
    assert student.describe_quantization(model) == described


def test_packed_checkpoints_get_a_kernel_that_can_be_trained_where_it_runs():
    gptq, awq = {"quant_method": "gptq", "bits": 8}, {"quant_method": "awq", "bits": 4}
    assert (choose_kernel(gptq, CPU).backend, choose_kernel(gptq, CPU).bits) == ("torch", 8)
    assert choose_kernel(awq, CPU).backend == "torch_awq"
    assert {choose_kernel(stored, CUDA).backend for stored in (gptq, awq)} == {"auto_trainable"}
    assert choose_kernel({"quant_method": "bitsandbytes", "load_in_4bit": True}, CPU) is None


def test_a_format_is_named_on_the_command_line_or_refused(tiny_model_path):
    eight, four = StudentArguments("m", load_in_8bit=True), StudentArguments("m")
    assert (eight.load_in_8bit, eight.load_in_4bit, four.load_in_4bit) == (True, False, True)
    for name in ("fp4", "int8"):
        args = StudentArguments(str(tiny_model_path), student_format=name, dtype="float32")
        assert format_of(load_student_from(args).config.quantization_config) == name
    with pytest.raises(ConfigError, match=r"student_format is fp4, and another option says int8"):
        StudentArguments(str(tiny_model_path), student_format="fp4", load_in_8bit=True)
    for config, message in (
        ("int3", "student's format is 'int3'; expected one of nf4, fp4, int8. Pass a quantization config"),
        (HqqConfig(nbits=4), "in HQQ, which transformers 5 neither quantizes nor reads.*hqq's own library and pass it"),
    ):
        refused(ConfigError, message, load_student, str(tiny_model_path), quantization_config=config)


@pytest.mark.parametrize(("stored", "wanted", "found"), [
    ({"quant_method": "gptq", "bits": 4}, "nf4", "gptq"), ({"quant_method": "awq", "bits": 4}, "int8", "awq"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "fp4", "nf4"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, BitsAndBytesConfig(load_in_4bit=True), "int8"),
])  # fmt: skip
def test_another_format_than_the_stored_one_is_refused(stored, wanted, found, tmp_path):
    path = write_config(tmp_path, stored)
    assert student.stored_quantization(path) == stored
    with pytest.raises(ConfigError, match=f"is stored in {found} already; a student in .* was asked for. Leave the"):
        load_student(path, quantization_config=wanted)


def test_only_4_bit_bitsandbytes_is_shared_out(tiny_model_path, tmp_path, monkeypatch):
    names = {"int8": "int8", "the format of another library": "hqq"}
    loaded = {said: load_in(name, tiny_model_path) for said, name in names.items()}
    for model in loaded.values():
        check_trainable(model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    message = "The student is in int8, and FSDP or ZeRO-3 would shard its weights.*DDP.*or use nf4"
    refused(ConfigError, message, load_student, str(tiny_model_path), quantization_config="int8", dtype="float32")
    for name, model in loaded.items():  # loaded before
        refused(ConfigError, f"The student is in {name}, and FSDP", check_trainable, model)
    # Stored 4-bit weights would be destroyed by a cast.
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16).to_dict()
    for config, message in (
        ({"quant_method": "gptq", "bits": 4}, "The student is in gptq, and FSDP"),
        (stored, r"is torch.bfloat16, and .* gathered in torch.float32.* stored so; load the"),
    ):
        refused(ConfigError, message, load_student, write_config(tmp_path, config), dtype="float32")


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()])
def test_a_layer_without_a_weight_to_hand_out_is_refused(layer):
    if isinstance(layer, nn.Linear):  # its weight means nothing without a scale beside it, as in transformers' FP8
        layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ConfigError, match=rf"{type(layer).__name__} gives no full-precision weight; expected a linear"):
        dequantize_weight(layer)
    ordinary = nn.Linear(4, 4)
    assert dequantize_weight(ordinary).data_ptr() == ordinary.weight.data_ptr()
