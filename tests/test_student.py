"""Loading a student: transformers' own configs, checkpoints that are quantized already, and every refusal in words."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch
from packed_checkpoints import require_package
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quantkd.cli.arguments import StudentArguments, load_student_from
from quantkd.errors import ConfigError, MissingDependencyError
from quantkd.models import student as student_module, student_formats
from quantkd.models.student import attach_lora, check_trainable, load_student
from quantkd.models.student_formats import (
    build_quantization_config,
    check_format,
    choose_kernel,
    dequantize_weight,
    format_of,
    stored_quantization,
)

IDS = torch.arange(120).view(6, 20)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INT4 = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}
HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}, "skip_modules": ["lm_head"]}


def set_versions(monkeypatch, **versions):
    """What `importlib.metadata` says of packages; None for one that is not installed."""
    real = metadata.version

    def version(name):
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(student_formats.metadata, "version", version)


def write_config(folder, quantization):
    folder.mkdir()
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def projections(model):
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "torchao-int8"])
def test_a_name_stands_for_transformers_own_config(name, tiny_model_path):
    require_package(name)
    config = build_quantization_config(name, torch.float32)
    assert format_of(config) == name
    assert format_of(config.to_dict()) == name
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_path, quantization_config=config, dtype=torch.float32)
    ours = load_student(str(tiny_model_path), quantization_config=name, dtype="float32")
    given = load_student(str(tiny_model_path), quantization_config=config, dtype="float32")
    with torch.no_grad():
        expected = plain.eval()(IDS).logits
        assert torch.equal(ours.eval()(IDS).logits, expected) and torch.equal(given.eval()(IDS).logits, expected)


def test_what_is_stored_quantized_is_loaded_as_it_is(tiny_model_path, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    first = load_student(str(tiny_model_path), quantization_config=config, dtype="float32")
    expected = dequantize_weight(first.model.layers[0].mlp.up_proj)
    first.save_pretrained(tmp_path)
    for wanted in (None, "fp4"):
        again = load_student(str(tmp_path), quantization_config=wanted, dtype="float32")
        assert torch.equal(dequantize_weight(again.model.layers[0].mlp.up_proj), expected)


def test_hqq_s_settings_by_layer(tiny_model_path):
    """As HqqConfig documents them: layers that it does not name stay, and those that it skips."""
    require_package("hqq4")
    from hqq.core.quantize import HQQLinear
    from transformers import HqqConfig

    four, eight = {"nbits": 4, "group_size": 64}, {"nbits": 8, "group_size": 32}
    config = HqqConfig(dynamic_config={"mlp.up_proj": four, "self_attn.q_proj": eight})
    model = load_student(str(tiny_model_path), quantization_config=config, dtype="float32")
    kinds = {
        path.split(".")[-1]: layer.meta["nbits"] for path, layer in projections(model).items() if hasattr(layer, "W_q")
    }
    assert kinds == {"up_proj": 4, "q_proj": 8}
    assert sum(isinstance(module, HQQLinear) for module in model.modules()) == 4
    adapted = attach_lora(model)  # all linear layers, of both kinds
    assert sum(hasattr(module, "lora_A") for module in adapted.modules()) == 14


def test_torchao_s_other_4_bit_config_is_evaluated_and_not_trained(tiny_model_path):
    """IntxWeightOnlyConfig runs on a CPU, its 4-bit values in 8-bit integers."""
    require_package("torchao-int8")
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    config = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    model = load_student(str(tiny_model_path), quantization_config=config, dtype="float32", trainable=False)
    for path, layer in projections(model).items():
        stored = layer.weight
        q, scale, zero = (value.double() for value in (stored.qdata, stored.scale, stored.zero_point))
        groups = q.view(len(q), -1, 32)
        expected = (groups - zero.view(len(q), -1, 1)) * scale.view(len(q), -1, 1)
        torch.testing.assert_close(dequantize_weight(layer).double(), expected.view_as(q), atol=1e-6, rtol=1e-5)
        assert path.endswith("_proj")
    with pytest.raises(ConfigError, match="in torchao, which transformers does not train"):
        check_trainable(model)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),  # of old, without its method
        ({"load_in_4bit": True}, "fp4"),  # bitsandbytes' default
        (BitsAndBytesConfig(load_in_4bit=True), "fp4"),
        (HQQ, "hqq4"),
        ({"quant_method": "hqq", "quant_config": {"mlp.up_proj": {}}}, "hqq"),
        (INT4, "torchao-int4"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}}, "torchao"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),  # of old
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_a_format_has_a_name(config, name):
    assert format_of(config) == name


def test_packed_checkpoints_get_a_kernel_that_can_be_trained_where_it_runs():
    gptq, awq = {"quant_method": "gptq", "bits": 8}, {"quant_method": "awq", "bits": 4}
    assert (choose_kernel(gptq, CPU).backend, choose_kernel(gptq, CPU).bits) == ("torch", 8)
    assert choose_kernel(awq, CPU).backend == "torch_awq"
    assert {choose_kernel(stored, CUDA).backend for stored in (gptq, awq)} == {"auto_trainable"}
    assert choose_kernel({"quant_method": "bitsandbytes", "load_in_4bit": True}, CPU) is None


def test_a_format_by_name_on_the_command_line(tiny_model_path):
    for name in ("fp4", "int8"):
        args = StudentArguments(str(tiny_model_path), student_format=name, dtype="float32")
        assert format_of(load_student_from(args).config.quantization_config) == name
    with pytest.raises(
        ConfigError, match=r"load_in_8bit asks for int8, and student_format for fp4. Set one of the two"
    ):
        StudentArguments(str(tiny_model_path), student_format="fp4", load_in_8bit=True)


def test_an_unknown_format_is_refused(tiny_model_path):
    with pytest.raises(ConfigError, match=r"Expected a student format of nf4, fp4, int8, .* found 'int3'"):
        load_student(str(tiny_model_path), quantization_config="int3")


@pytest.mark.parametrize(
    ("name", "package"), [("hqq4", "hqq"), ("torchao-int8", "torchao"), ("torchao-int4", "torchao")]
)
def test_a_package_that_is_missing_is_named(name, package, tiny_model_path, monkeypatch):
    set_versions(monkeypatch, **{package: None})
    with pytest.raises(
        MissingDependencyError, match=f"needs {package}, which is not installed: pip install '{package}>="
    ):
        load_student(str(tiny_model_path), quantization_config=name)
    set_versions(monkeypatch, **{package: "0.1"})
    with pytest.raises(MissingDependencyError, match=rf"needs {package} [0-9.]+ or newer, found 0.1: pip install"):
        load_student(str(tiny_model_path), quantization_config=name)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("package", ["gptqmodel", "optimum"])
def test_a_packed_checkpoint_names_the_packages_that_it_needs(method, package, tmp_path, monkeypatch):
    path = write_config(tmp_path / method, {"quant_method": method, "bits": 4})
    set_versions(monkeypatch, **{"gptqmodel": "7.7.0", "optimum": "2.3.0", package: None})
    with pytest.raises(MissingDependencyError, match=f"A student in {method} needs {package}, which is not installed"):
        load_student(path)


@pytest.mark.parametrize(
    ("stored", "wanted", "found"),
    [
        ({"quant_method": "gptq", "bits": 4}, "nf4", "gptq"),
        ({"quant_method": "awq", "bits": 4}, "int8", "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "fp4", "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, BitsAndBytesConfig(load_in_4bit=True), "int8"),
    ],
)
def test_another_format_than_the_stored_one_is_refused(stored, wanted, found, tmp_path):
    path = write_config(tmp_path / "stored", stored)
    assert stored_quantization(path) == stored
    with pytest.raises(ConfigError, match=f"is stored in {found} already; a student in .* was asked for. Leave the"):
        load_student(path, quantization_config=wanted)


def test_a_checkpoint_in_hqq_is_refused(tmp_path, monkeypatch):
    set_versions(monkeypatch, hqq="0.2.8")
    with pytest.raises(ConfigError, match=r"a checkpoint in HQQ, which this transformers cannot read. Load the full-"):
        load_student(write_config(tmp_path / "hqq", HQQ))


def test_torchao_int4_is_refused_where_it_cannot_run(tmp_path, monkeypatch):
    set_versions(monkeypatch, torchao="0.18.0")
    with pytest.raises(ConfigError, match=r"torchao-int4, which transformers does not train. Train nf4, fp4, int8"):
        load_student(write_config(tmp_path / "trained", INT4), dtype="bfloat16")
    for device in (CPU, torch.device("xpu")):
        with pytest.raises(ConfigError, match=f"need a CUDA GPU; the device here is {device.type}. Take nf4, fp4"):
            check_format(INT4, device=device, trainable=False)
    with pytest.raises(ConfigError, match=r"compute in bfloat16; torch.float32 was asked for.*Set dtype='bfloat16'"):
        check_format(INT4, device=CUDA, trainable=False, dtype=torch.float32)
    check_format(INT4, device=CUDA, trainable=False, dtype=torch.bfloat16)


def test_torchao_int4_by_name_is_refused_on_a_cpu(tiny_model_path):
    require_package("torchao-int8")
    if torch.cuda.is_available():
        pytest.skip("it runs on this GPU")
    with pytest.raises(ConfigError, match="need a CUDA GPU; the device here is cpu"):
        load_student(str(tiny_model_path), quantization_config="torchao-int4", trainable=False)


def share_by_fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")


def share_by_zero3(monkeypatch):
    monkeypatch.setattr(student_module, "is_deepspeed_zero3_enabled", lambda: True)


@pytest.mark.parametrize("share", [share_by_fsdp, share_by_zero3])
def test_only_4_bit_bitsandbytes_is_shared_out(share, tiny_model_path, tmp_path, monkeypatch):
    message = "The student is in int8, and FSDP or ZeRO-3 would share its weights out.*DDP.*or take nf4"
    loaded = load_student(str(tiny_model_path), quantization_config="int8", dtype="float32")
    check_trainable(loaded)
    loaded.config.quantization_config, loaded.hqq_quantized = None, True
    share(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        load_student(str(tiny_model_path), quantization_config="int8", dtype="float32")
    set_versions(monkeypatch, hqq="0.2.8", gptqmodel="7.7.0", optimum="2.3.0")
    with pytest.raises(ConfigError, match="The student is in hqq, and FSDP"):  # one that was loaded before
        check_trainable(loaded)
    with pytest.raises(ConfigError, match="The student is in gptq, and FSDP"):
        load_student(write_config(tmp_path / "gptq", {"quant_method": "gptq", "bits": 4}))
    check_format(BitsAndBytesConfig(load_in_4bit=True), device=CPU, trainable=True, shared=True)


def test_stored_4_bit_weights_that_a_cast_would_destroy_are_refused(tmp_path, monkeypatch):
    share_by_fsdp(monkeypatch)
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16).to_dict()
    with pytest.raises(ConfigError, match=r"is torch.bfloat16, and .* gathered in torch.float32.* stored so; load the"):
        load_student(write_config(tmp_path / "stored", stored), dtype="float32")


class Scaled(nn.Module):
    """A layer whose weight means nothing without the scale beside it, as in transformers' FP8."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize("layer", [Scaled(), nn.LayerNorm(4), nn.ReLU()])
def test_a_layer_without_a_weight_to_hand_out_is_refused(layer):
    with pytest.raises(ConfigError, match=rf"{type(layer).__name__} gives no full-precision weight; expected a linear"):
        dequantize_weight(layer)


def test_an_ordinary_weight_is_handed_out_itself(tiny_model):
    layer = tiny_model.model.layers[0].mlp.up_proj
    assert dequantize_weight(layer).data_ptr() == layer.weight.data_ptr()
