"""GGUF adapters: the tensors of llama.cpp's converter, PEFT's own product of factors, and what is refused."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from families import build
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from quantkd.errors import ConfigError, DataError
from quantkd.models.gguf_adapters import FILE_NAME, export_gguf_adapter
from quantkd.models.provenance import Provenance
from quantkd.models.stored_weights import describe_weights
from quantkd.models.student import load_student
from tests import conftest
from tests.conftest import REPOSITORY, refused

gguf = pytest.importorskip("gguf")
CONVERTER = REPOSITORY / ".venv-llamacpp" / "llama.cpp" / "convert_lora_to_gguf.py"
FAMILIES = ["Llama", "Qwen2", "Qwen3", "Gemma 3"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of random models whose layers are wide enough for blocks of 32."""
    found = {}
    for family in FAMILIES:
        model = build(family, 320)
        found[family] = (tmp_path_factory.mktemp(family.replace(" ", "")), model)
        model.save_pretrained(found[family][0])
    return found


def save_adapter(model, folder, dtype=torch.float32, **config):
    """A random adapter, in the dtype, in a folder; its PEFT model."""
    wrapped = conftest.save_adapter(copy.deepcopy(model), folder, **{"lora_alpha": 6, **config})
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: each.to(dtype) for name, each in weights.items()}, folder / "adapter_model.safetensors")
    return wrapped


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {each.name: (each.tensor_type.name, tuple(each.shape.tolist()), each.data) for each in reader.tensors}
    return {field.name: field.contents() for field in reader.fields.values()}, tensors


@pytest.mark.skipif(not CONVERTER.is_file(), reason="no llama.cpp sources: make llamacpp-tools")
@pytest.mark.parametrize(("family", "rank", "dtype", "outtype"), [
    ("Llama", 32, torch.float32, "q8_0"), ("Llama", 4, torch.bfloat16, "q8_0"), ("Qwen3", 4, torch.float16, "f16"),
    ("Gemma 3", 8, torch.float32, "f32"),
])  # fmt: skip
def test_tensors_are_those_of_llama_cpps_converter(bases, tmp_path, family, rank, dtype, outtype):
    folder, model = bases[family]
    save_adapter(model, tmp_path / "adapter", dtype, r=rank)
    export_gguf_adapter(str(tmp_path / "adapter"), tmp_path / "ours", base=str(folder), outtype=outtype)
    words = [CONVERTER, tmp_path / "adapter", "--base", folder, "--outtype", outtype, "--outfile", tmp_path / "theirs"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *words], check=True, timeout=120, env=environment, capture_output=True)
    (ours, own), (theirs, other) = read(tmp_path / "ours" / FILE_NAME), read(tmp_path / "theirs")
    assert own.keys() == other.keys() and len(own) == 28
    for name, (kind, shape, data) in own.items():
        assert (kind, shape) == other[name][:2], name
        np.testing.assert_array_equal(data, other[name][2], err_msg=name)
    for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [
    {}, {"use_rslora": True}, {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    {"rank_pattern": {"q_proj": 2, r".*\.down_proj": 7}, "alpha_pattern": {r".*\.k_proj": 3, "up_proj": 11}},
], ids=["plain", "rslora", "one layer", "patterns"])  # fmt: skip
def test_the_file_holds_pefts_product(bases, tmp_path, family, config):
    folder, model = bases[family]
    wrapped = save_adapter(model, tmp_path / "adapter", **config)
    export_gguf_adapter(str(tmp_path / "adapter"), tmp_path / "out", base=str(folder), outtype="f32")
    facts, tensors = read(tmp_path / "out" / FILE_NAME)
    names = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
        "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    checked = 0
    for name, module in wrapped.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        parts = name.split(".")
        key = f"blk.{parts[parts.index('layers') + 1]}.{names[parts[-1]]}.weight"
        a, b = tensors[f"{key}.lora_a"][2], tensors[f"{key}.lora_b"][2]
        found = facts["adapter.lora.alpha"] / len(a) * (b.astype(np.float64) @ a.astype(np.float64))
        expected = module.get_delta_weight("default").detach().double().numpy()
        if family == "Llama" and parts[-1] in ("q_proj", "k_proj"):  # neighbours are rotated together
            heads = 4 if parts[-1] == "q_proj" else 2
            expected = np.concatenate([
                half[[place // 2 + place % 2 * (len(half) // 2) for place in range(len(half))]]
                for half in np.split(expected, heads)
            ])  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        checked += 1
    assert 2 * checked == len(tensors) and checked in (1, 14)


def test_the_metadata_and_the_command(bases, tmp_path, cli, held_out):
    folder, model = bases["Llama"]
    save_adapter(model, tmp_path / "adapter")
    weights = {"sha256": "ab" * 32, "sums": []}
    facts = {"teacher": "org/teacher", "weights": weights, "quantization": {"quant_method": "gguf"}}
    (tmp_path / "adapter" / "quantkd.json").write_text(json.dumps(facts))
    out = export_gguf_adapter(str(tmp_path / "adapter"), tmp_path / "out", base=str(folder))
    facts, tensors = read(out / FILE_NAME)
    assert (facts["general.architecture"], facts["general.type"], facts["adapter.type"]) == ("llama", "adapter", "lora")
    assert facts["quantkd.base.sha256"] == "ab" * 32
    told = json.loads(facts["quantkd.provenance"])
    assert told["teacher"] == "org/teacher" and told["export"]["outtype"] == "q8_0"
    assert told == json.loads((out / "quantkd.json").read_text())
    assert str(tmp_path) not in (out / FILE_NAME).read_bytes().decode(errors="replace")
    assert {kind for kind, *_ in tensors.values()} == {"Q8_0", "F16"}  # rank 4 is no multiple of 32
    assert sorted(each.name for each in out.iterdir()) == [FILE_NAME, "quantkd.json"]
    (tmp_path / "adapter" / "quantkd.json").unlink()
    words = ["export", "--model_name_or_path", folder, "--adapter", tmp_path / "adapter"]
    words += ["--form", "gguf_adapter", "--output_dir"]
    assert "new: gguf_adapter, " in cli.ok(*words, tmp_path / "new", "--outtype", "f16")
    assert (tmp_path / "new" / FILE_NAME).is_file()
    cli.fails("quantkd evaluate --engine server", *words, tmp_path / "b", "--held_out", held_out.sources[0].path)


def test_an_adapter_for_another_file_or_other_tensors_is_refused(bases, tmp_path, caplog):
    folder, model = bases["Llama"]
    files = (write_gguf(model, tmp_path / f"{kind}.gguf", kind) for kind in ("Q4_0", "Q5_0"))
    own, other = (load_student(str(folder), gguf_file=str(file)) for file in files)
    save_adapter(own, tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(folder)
    Provenance(weights=describe_weights(own)).write(tmp_path / "adapter")
    said, where = "base model has quantized weights of digest .* expected for", (tmp_path / "adapter", tmp_path / "out")
    refused(DataError, said, export_gguf_adapter, *map(str, where), base=other)
    export_gguf_adapter(*map(str, where), base=own)
    for format, said in (({"quant_method": "bitsandbytes", "load_in_4bit": True}, "trained on a base .* bitsandbytes"),
                         ({"quant_method": "gptq", "bits": 4}, "trained on a base model in gptq")):  # fmt: skip
        Provenance(quantization=format).write(tmp_path / "adapter")
        refused(DataError, said, export_gguf_adapter, str(where[0]), tmp_path / "no", base=str(folder))
    Provenance(weights={"sha256": "ab", "sums": []}).write(tmp_path / "adapter")  # of a library that leaves no name
    refused(
        DataError, "base model in another format", export_gguf_adapter, str(where[0]), tmp_path / "no", base=str(folder)
    )
    Provenance(quantization={"quant_method": "gguf"}).write(tmp_path / "adapter")
    export_gguf_adapter(str(where[0]), tmp_path / "unchecked", base=str(folder))
    assert "llama.cpp does not check it" in caplog.text
    adapter, where = tmp_path / "other", (str(tmp_path / "other"), tmp_path / "new")
    save_adapter(model, adapter)
    file, weights = adapter / "adapter_model.safetensors", load_file(adapter / "adapter_model.safetensors")
    key = next(each for each in weights if "layers.1.mlp.up_proj" in each and "lora_B" in each)
    AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path / "gpt2")
    AutoConfig.from_pretrained(folder, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    head = {f"base_model.model.lm_head.lora_{part}.weight": torch.ones(shape)
            for part, shape in (("A", (4, 32)), ("B", (320, 4)))}  # fmt: skip
    for message, changed, base, outtype in (
        ("no second factor at .*up_proj", {n: w for n, w in weights.items() if n != key}, folder, "q8_0"),
        ("factors for a layer of 7 x 32 at .*up_proj, where the base model has one of",
         {**weights, key: torch.ones(7, 4)}, folder, "q8_0"),
        ("where the base model has no linear layer",
         {n.replace("layers.1", "layers.9"): w for n, w in weights.items()}, folder, "q8_0"),
        ("outtype is 'q4_0'", weights, folder, "q4_0"),
        ("of the type gpt2, whose GGUF files", weights, tmp_path / "gpt2", "q8_0"),
        ("on the head, which is tied", {**weights, **head}, tmp_path / "tied", "q8_0"),
    ):  # fmt: skip
        save_file(changed, file)
        refused((DataError, ConfigError), message, export_gguf_adapter, *where, base=str(base), outtype=outtype)
    save_adapter(model, adapter, alpha_pattern={"up_proj": 60})  # ten times the others', in the factors
    save_file({name: torch.full_like(each, 6553.5) for name, each in load_file(file).items()}, file)
    said = "numbers do not fit F16: the largest is 65535"
    refused(DataError, said, export_gguf_adapter, *where, base=str(folder))


def test_a_head_of_its_own_takes_an_adapter(bases, tmp_path):
    folder, model = bases["Llama"]
    save_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    assert any(".base_layer." in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    out = export_gguf_adapter(str(tmp_path / "adapter"), tmp_path / "out", base=str(folder))
    names = {each.rsplit(".", 1)[0] for each in read(out / FILE_NAME)[1]}
    assert names == {"blk.0.attn_q.weight", "blk.1.attn_q.weight", "output.weight"}


@pytest.mark.parametrize(("config", "message"), [
    ({"use_dora": True}, "has use_dora; a GGUF adapter holds plain LoRA"),
    ({"modules_to_save": ["norm"]}, "has modules_to_save"), ({"bias": "all"}, "has bias=all"),
    ({"lora_bias": True}, "has lora_bias"), ({"lora_alpha": 0}, "lora_alpha .* is 0, which llama.cpp reads as 1"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "beside the factors of linear layers"),
])  # fmt: skip
def test_other_adapters_are_refused_by_name(bases, tmp_path, config, message):
    folder, model = bases["Llama"]
    save_adapter(model, tmp_path / "adapter", **config)
    refused(DataError, message, export_gguf_adapter, str(tmp_path / "adapter"), tmp_path / "out", base=str(folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("config", "said"), [
    ({"r": 4}, "vLLM: --enable-lora --lora-modules NAME=/"), ({"r": 17}, "--max-lora-rank 32"),
    ({"r": 300}, "--max-lora-rank 320"), ({"r": 513}, "does not serve this adapter as it is (rank 513"),
    ({"use_dora": True}, "(use_dora)"), ({"modules_to_save": ["norm"]}, "(modules_to_save)"),
    ({"alpha_pattern": {"q_proj": 3}}, "(alpha_pattern)"), ({"bias": "all"}, "(bias)"),
])  # fmt: skip
def test_the_adapter_form_says_what_vllm_needs(bases, tmp_path, cli, tiny_tokenizer, config, said):
    folder, model = bases["Qwen2"]
    save_adapter(model, tmp_path / "adapter", **{"target_modules": ["q_proj"], **config})
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    words = ["--form", "adapter", "--model_name_or_path", folder, "--adapter", tmp_path / "adapter"]
    assert said in cli.ok("export", *words, "--output_dir", tmp_path / "out")
    if config == {"r": 4}:
        Provenance(quantization={"quant_method": "gguf"}).write(tmp_path / "adapter")
        assert "It is for a GGUF file" in cli.ok("export", *words, "--output_dir", tmp_path / "gguf")
        cli.fails("gguf_file", "export", *words, "--gguf_file", "m.gguf", "--output_dir", tmp_path / "no")
