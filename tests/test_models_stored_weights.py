"""What a model is stored as: its bytes against plain arithmetic, and a digest that an adapter is bound to."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed_checkpoints import load_in
from safetensors.torch import load_file

from quantkd.errors import DataError
from quantkd.hub import load_adapter
from quantkd.models.provenance import Provenance
from quantkd.models.stored_weights import compute_size, describe_weights
from quantkd.models.student import attach_lora, default_lora_config, load_student
from quantkd.names import load_tokenizer

SHAPES = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]  # of one of the two layers
COUNT = 2 * sum(rows * columns for rows, columns in SHAPES)
IDS = torch.arange(40).view(2, 20)
adapter = pytest.fixture(lambda trained, tmp_path: Path(shutil.copytree(trained, tmp_path / "adapter")))


def load(path, **options):
    return load_student(str(path), **{"dtype": "float32", **options})


def test_the_bytes_of_a_model_are_those_of_its_parts(tiny_model, tiny_model_path):
    codes, constants, rank = COUNT // 2, COUNT // 64, 3
    constants += 2 * sum(4 * -(-rows * columns // 64 // 256) + 4 for rows, columns in SHAPES)  # nested, and the mean
    adapters = 2 * 2 * rank * sum(rows + columns for rows, columns in SHAPES)
    rest = 4 * (2 * 320 * 64 + 5 * 64 + 2 * 8)  # embeddings, head, norms, and twice the rotary frequencies
    plain, student = compute_size(tiny_model), attach_lora(load(tiny_model_path), default_lora_config(rank))
    assert vars(plain) == {"codes": 4 * COUNT, "constants": 0, "adapters": 0, "rest": rest, "linear_weights": COUNT}
    assert plain.bits_per_weight == 32 and plain.total == tiny_model.get_memory_footprint()
    factors = [each for name, each in student.named_parameters() if "lora_" in name]
    for dtype, share in ((torch.float32, 2), (torch.bfloat16, 1), (torch.float16, 1)):
        for each in factors:
            each.data = (torch.rand_like(each) + 1e-3).to(dtype).float()
        found = compute_size(student)
        parts = {"codes": codes, "constants": constants, "adapters": share * adapters, "rest": rest}
        assert vars(found) == {**parts, "linear_weights": COUNT}
        assert found.bits_per_weight == 8 * (codes + constants + share * adapters) / COUNT


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "hqq", "torchao-int8", "gptq", "awq"])
def test_a_digest_outlives_what_leaves_the_weights_alone(name, tiny_model_path, tmp_path):
    model = load_in(name, tiny_model_path, tmp_path / "packed")
    first, size = describe_weights(model), compute_size(model)
    assert 4 < size.bits_per_weight < 11 and size.linear_weights == COUNT
    with torch.no_grad():
        model.eval()(IDS)  # on some processors bitsandbytes repacks 4-bit weights here, and moves scales of int8
    assert describe_weights(model) == first and compute_size(model) == size
    assert describe_weights(attach_lora(load_in(name, tiny_model_path, tmp_path / "packed"))) == first
    if name in ("nf4", "fp4", "int8"):
        model.save_pretrained(tmp_path / "saved")
        assert describe_weights(load(tmp_path / "saved")) == first


def test_a_digest_tells_formats_codes_and_constants_apart(tiny_model, tiny_model_path):
    model = load(tiny_model_path)
    layer, seen = model.model.layers[1].mlp.up_proj, {describe_weights(model)["sha256"]}
    for tensor in (layer.weight.data, layer.weight.quant_state.absmax, layer.weight.quant_state.state2.absmax):
        tensor.view(-1)[7 % tensor.numel()] += 1
        seen.add(describe_weights(model)["sha256"])
    layer.weight.quant_state.offset += 1e-3
    seen |= {describe_weights(each)["sha256"] for each in (model, load(tiny_model_path, quantization_config="fp4"))}
    assert len(seen) == 6 and describe_weights(tiny_model) is None


@pytest.fixture(scope="module")
def trained(build_trainer, tmp_path_factory):
    """A saved adapter, with a checkpoint of the step before."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = build_trainer(folder, save_strategy="steps", save_steps=1, lr_scheduler_type="linear")
    trainer.train()
    trainer.save_model()
    return folder


def change_codes(model):
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data ^= 0x11  # each code by one


def change_last_bits(model):
    """As another number of threads averages the constants."""
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.quant_state.offset *= 1 + 2e-7


@pytest.mark.parametrize(("change", "said"), [
    (None, None), (change_last_bits, None), (change_codes, "quantized weights of digest [0-9a-f]{12}; expected"),
    ("fp4", "quantized weights of digest"), ("full", "no quantized weights; expected for the adapter .*, on which it"),
])  # fmt: skip
def test_an_adapter_is_refused_on_other_weights(tiny_model, tiny_model_path, trained, adapter, change, said):
    def build():
        if change == "full":
            return tiny_model
        model = load(tiny_model_path, quantization_config=change if isinstance(change, str) else None)
        if callable(change):
            change(model)
        return model

    assert Provenance.read(adapter).weights == describe_weights(load(tiny_model_path))
    if said is None:
        load_adapter(build(), adapter)
        return
    with pytest.raises(DataError, match=f"The base model has {said}"):
        load_adapter(build(), adapter)
    replace(Provenance.read(adapter), weights=None).write(adapter)  # as of an older version
    load_adapter(build(), adapter)


def test_commands_and_a_resumed_run_refuse_others(cli, build_trainer, tiny_model_path, training_set, adapter, tmp_path):
    other = load(tiny_model_path)
    change_codes(other)
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(str(tiny_model_path)).save_pretrained(tmp_path / "other")
    common = ["--model_name_or_path", tmp_path / "other", "--dtype", "float32", "--adapter", adapter]
    held = ["--held_out", training_set.sources[0]]
    said = "Load the checkpoint that it was trained on"
    cli.fails(said, "evaluate", *held, "--arm", "after", "--run_dir", tmp_path / "run", *common)
    cli.fails(said, "view", *held, "--output", tmp_path / "page.html", *common)
    cli.fails(said, "export", "--form", "merged", "--output_dir", tmp_path / "merged", *common)
    assert not (tmp_path / "merged").exists()
    trainer = build_trainer(adapter, model=str(tmp_path / "other"), save_strategy="steps", save_steps=1)
    with pytest.raises(DataError, match="checkpoint-1: those of digest"):
        trainer.train(resume_from_checkpoint=str(adapter / "checkpoint-1"))


def test_an_adapter_is_saved_in_16_bit(trained):
    files = [trained / name / "adapter_model.safetensors" for name in ("", "checkpoint-2")]
    saved, full = map(load_file, files)
    assert {each.dtype for each in full.values()} == {torch.float32}  # training goes on from it
    assert saved.keys() == full.keys() and all(torch.equal(saved[name], full[name].bfloat16()) for name in full)
    sizes = [file.stat().st_size - int.from_bytes(file.read_bytes()[:8], "little") - 8 for file in files]
    assert 2 * sizes[0] == sizes[1]  # less the headers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_16_bits_are_those_that_the_layers_compute_in(build_trainer, tmp_path, dtype):
    build_trainer(tmp_path, model_init_kwargs={"dtype": dtype}).save_model()
    found = {each.dtype for each in load_file(tmp_path / "adapter_model.safetensors").values()}
    assert found == {getattr(torch, dtype)}
