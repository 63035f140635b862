"""Weights under the model's names: renamed as transformers renames, refused where it converts or they are quantized."""

import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch
from families import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.core_model_loading import Chunk, WeightConverter

from quantkd.errors import ConfigError
from quantkd.models.original_weights import OriginalWeights

NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("max_shard_size", ["50GB", "100KB"])
def test_every_linear_layer_is_read_from_one_file_or_many(tiny_model, tmp_path, max_shard_size):
    tiny_model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_size == "50GB"
    weights = OriginalWeights(str(tmp_path), tiny_model)
    for name, module in tiny_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert torch.equal(weights.read(name), module.weight), name


def test_the_prefix_of_the_base_model_may_be_missing_or_not(tiny_model, tmp_path):
    tiny_model.model.save_pretrained(tmp_path / "base")  # keys without `model.`
    weights = OriginalWeights(str(tmp_path / "base"), tiny_model)
    assert torch.equal(weights.read(NAME), tiny_model.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(ConfigError, match=r"has no tensor for lm_head\.weight"):
        weights.read("lm_head")
    tiny_model.save_pretrained(tmp_path / "whole")  # keys with it, for a model without a head
    weights = OriginalWeights(str(tmp_path / "whole"), tiny_model.model)
    assert torch.equal(weights.read("layers.1.mlp.down_proj"), tiny_model.model.layers[1].mlp.down_proj.weight)


def test_names_follow_the_mapping_of_transformers(tmp_path):
    """A Mixtral checkpoint as Mistral published it: its experts are merged when it is loaded, its attention is not."""
    model = build("Mixtral", 64)
    model.save_pretrained(tmp_path)
    assert any("block_sparse_moe.experts.0.w1" in key for key in load_file(tmp_path / "model.safetensors"))
    weights = OriginalWeights(str(tmp_path), model)
    for name in ("self_attn.q_proj", "mlp.gate"):  # the latter is `block_sparse_moe.gate` in the file
        name = f"model.layers.0.{name}"
        assert torch.equal(weights.read(name), model.get_submodule(name).weight)
    assert "model.layers.0.mlp.experts.gate_up_proj" in weights._converted


def test_without_the_mapping_the_checkpoint_is_loaded_whole(tiny_model, tmp_path, monkeypatch, caplog):
    tiny_model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", ModuleType("transformers.conversion_mapping"))
    weights = OriginalWeights(str(tmp_path), tiny_model)
    assert "The checkpoint is loaded whole" in caplog.text and "has no transformers.conversion_mapping" in caplog.text
    assert torch.equal(weights.read(NAME), tiny_model.get_submodule(NAME).weight)
    with pytest.raises(ConfigError, match=r"has no tensor for nothing\.weight"):
        weights.read("nothing")


def test_a_weight_that_is_made_of_others_is_refused(tmp_path):
    """transformers 5 splits or permutes some families' linear layers; the mapping's own words say which."""
    mapping = import_module("transformers.conversion_mapping")
    converter = WeightConverter("qkv_proj.weight", ["q_proj.weight", "k_proj.weight", "v_proj.weight"], [Chunk(dim=0)])
    model, names = torch.nn.Module(), ("q_proj", "k_proj", "v_proj")
    model.base_model_prefix = "model"
    model.attn = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in names})
    save_file({"attn.qkv_proj.weight": torch.ones(12, 4)}, tmp_path / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "get_model_conversion_mapping", lambda model: [converter])
        weights = OriginalWeights(str(tmp_path), model)
    for name in names:
        with pytest.raises(ConfigError, match="is made of other tensors"):
            weights.read(f"attn.{name}")


def test_what_is_quantized_already_is_no_original(tiny_model, tiny_model_path, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tiny_model_path, quantization_config=config).save_pretrained(tmp_path / "nf4")
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in tiny_model.state_dict().items()}
    (tmp_path / "fp8").mkdir()
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    for name, found in (("nf4", r"stored as torch\.uint8, quantized already"), ("fp8", "float8_e4m3fn")):
        with pytest.raises(ConfigError, match=found):
            OriginalWeights(str(tmp_path / name), tiny_model).read(NAME)
