"""GGUF students: exactly what the file dequantizes to, other codes in the same bytes, and what is no such file."""

import json
import math
import os
import re
import shutil
import struct

import gguf
import numpy as np
import pytest
import torch
from families import build
from gguf_files import encode, stored_weights, write_gguf
from transformers import AutoModelForCausalLM, Gemma3Config, GgufConfig

from quantkd import quantize
from quantkd.cli.arguments import StudentArguments, load_student_from
from quantkd.errors import ConfigError
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.models.codes import moments_of
from quantkd.models.gguf_codes import calibrate_gguf_layer, split_blocks, with_codes
from quantkd.models.gguf_files import GgufTensor, open_gguf
from quantkd.models.gguf_student import load_student_tokenizer
from quantkd.models.initialization import initialize_from_error
from quantkd.models.layer_inputs import Rows
from quantkd.models.original_weights import OriginalWeights
from quantkd.models.provenance import Provenance
from quantkd.models.quantize import calibrate
from quantkd.models.stored_weights import compute_size, describe_weights
from quantkd.models.student import attach_lora, default_lora_config, load_student, name_format
from tests.conftest import build_tiny_model, refused

# What chosen codes leave of the error on correlated inputs at most, a tenth above what was measured.
KINDS = {
    "Q4_0": 0.5, "Q4_1": 0.43, "Q5_0": 0.45, "Q5_1": 0.41, "Q8_0": 0.45,
    "Q2_K": 0.72, "Q3_K": 0.48, "Q4_K": 0.21, "Q5_K": 0.087, "Q6_K": 0.04,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": "llama", "Llama, tied": "llama", "Mistral": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3",
    "Gemma": "gemma", "Gemma 2, soft-capped": "gemma2", "Gemma 3": "gemma3", "SmolLM 3": "smollm3",
    "Granite, scaled": "granite", "OLMo 2": "olmo2", "Phi-3": "phi3", "Starcoder 2": "starcoder2",
}  # fmt: skip
IDS = torch.arange(40).view(2, 20)


@pytest.fixture(scope="module")
def q4_0(tiny_model_path, tmp_path_factory):
    """The tiny Llama in Q4_0, its embeddings in Q8_0 as llama.cpp has them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    return write_gguf(model, tmp_path_factory.mktemp("gguf") / "tiny-Q4_0.gguf", token_embd="Q8_0", output="Q8_0")


def save_model(family, folder):
    """A random model in `folder`, with norms and biases that tell, for some start as zeros."""
    model, generator = build(family, 96), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1 and ARCHITECTURES[family] in ("gemma", "gemma2", "gemma3", "qwen2"):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_weights_are_what_the_file_dequantizes_to(family, tmp_path):
    model = save_model(family, tmp_path / "full")
    path = write_gguf(model, tmp_path / "model.gguf", "Q8_0", architecture=ARCHITECTURES[family])
    student = load_student(str(tmp_path / "full"), gguf_file=str(path))
    read, found = gguf.GGUFReader(path).tensors, stored_weights(student, ARCHITECTURES[family])
    values = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in read}
    assert values.keys() == found.keys()
    for name, expected in values.items():
        assert np.array_equal(found[name].reshape(-1), expected.reshape(-1)) or "norm" in name, name
        assert np.allclose(found[name].reshape(-1), expected.reshape(-1), atol=1e-7, rtol=1e-6)
    close = torch.nn.functional.cosine_similarity(student(IDS).logits, model(IDS).logits, dim=-1).mean()
    assert close > 0.99, "the rows or norms are in another order"
    if family in ("Llama", "Qwen2", "Qwen3", "Gemma 2, soft-capped", "Gemma 3"):  # which transformers reads, too
        options = {"config": model.config, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, **options)
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), theirs.parameters(), strict=True))


def random_tensor(kind):
    """A tensor of random codes and constants, and weights from which it could have been rounded."""
    number = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(12, 2 * gguf.GGML_QUANT_SIZES[number][0]))
    tensor = GgufTensor("blk.0.ffn_up.weight", number, values.shape, encode(values.astype(np.float32), number))
    if not kind.endswith("K"):
        return tensor, torch.from_numpy(values).float()
    exact = tensor.dequantize()  # not rounded from the values, so these are made from it
    return tensor, exact + 0.05 * exact.std() * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_where_the_format_has_them_and_chosen_ones_have_less_error(kind, tiny_model):
    """Every code of every value gives one more step, and the constants stay."""
    tensor, original = random_tensor(kind)
    count = {"2": 4, "3": 8, "4": 16, "5": 32, "6": 64, "8": 255}[kind[1]]
    codes = np.random.default_rng(1).integers(0, count, tensor.shape)
    lowest, highest, values = (
        with_codes(tensor, each).dequantize().double()
        for each in (np.zeros(tensor.shape), np.full(tensor.shape, count - 1), codes)
    )
    expected = lowest + (highest - lowest) * torch.from_numpy(codes) / (count - 1)
    assert torch.allclose(values, expected, atol=1e-6, rtol=1e-6)
    changed, own = split_blocks(with_codes(tensor, codes)), split_blocks(tensor)
    assert torch.equal(changed["constants"], own["constants"])
    assert own["codes"].shape[1] == gguf.GGML_QUANT_SIZES[tensor.kind][0] * int(kind[1]) // 8
    layer = torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
    layer.weight.data, layer.gguf_tensor = tensor.dequantize(), tensor
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(tensor.shape[1], tensor.shape[1], generator=generator) * torch.logspace(-1, 1, tensor.shape[1])
    inputs = torch.randn(2000, tensor.shape[1], generator=generator) @ mixing

    def error():
        difference = original.double() - layer.weight.double()
        return float((inputs.double() @ difference.T).square().sum().detach())

    before = error()
    calibrate_gguf_layer(layer, tiny_model.config, original, moments_of(inputs)[0])
    assert error() < KINDS[kind] * before and torch.equal(layer.weight, tensor.dequantize())
    assert torch.equal(split_blocks(tensor)["constants"], own["constants"])


def test_a_student_trains_and_is_described_by_its_file(
    q4_0, tiny_model_path, make_trainer, tmp_path, held_out, cli, monkeypatch
):
    given = {"gguf_file": str(q4_0)}
    options = {"model_init_kwargs": given, "init_from": str(tiny_model_path), "max_steps": 1, "save_strategy": "steps"}
    message = "no 4-bit layer of bitsandbytes"  # said before the start is computed
    with monkeypatch.context() as patched:
        patched.setattr("quantkd.training.preparation.initialize_from_rows", lambda *_, **__: pytest.fail("computed"))
        both = {"train_scales": True, "peft_config": default_lora_config(2)}
        refused(ConfigError, message, make_trainer, init="covariance", **both, **options)
    trainer = make_trainer(init="covariance", **options)
    student = trainer.model
    assert name_format(student) == "q4_0"
    assert all(not parameter.requires_grad for name, parameter in student.named_parameters() if "lora" not in name)
    assert trainer.args.start == "covariance"
    bare = evaluate_fidelity(load_student(str(tiny_model_path), gguf_file=str(q4_0)), held_out).means["kl"]
    assert evaluate_fidelity(student, held_out).means["kl"] < bare
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "out"
    facts = Provenance.read(folder)
    assert facts.quantization == {"quant_method": "gguf", "format": "q4_0", "gguf_file": "tiny-Q4_0.gguf"}
    assert str(tmp_path) not in (folder / "quantkd.json").read_text(encoding="utf-8")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == tiny_model_path.name
    assert 'gguf_file="tiny-Q4_0.gguf")' in (folder / "README.md").read_text(encoding="utf-8")

    other = write_gguf(AutoModelForCausalLM.from_pretrained(tiny_model_path), tmp_path / "other.gguf", "Q5_0")
    common = ["--adapter", folder, "--model_name_or_path", tiny_model_path, "--gguf_file"]
    words = ["evaluate", "--held_out", held_out.sources[0], "--run_dir", tmp_path / "run", "--arm", "after", *common]
    cli.ok(*words, q4_0)
    arm = json.loads((tmp_path / "run" / "evaluation" / "after.json").read_text(encoding="utf-8"))
    assert arm["title"] == "q4_0, distilled"
    cli.fails("Name the GGUF file that it was trained on", *words, other)
    resumed = {"resume_from_checkpoint": str(folder / "checkpoint-1"), "model": str(tiny_model_path), "calibrate": True}
    refused(ConfigError, "trained on a GGUF file. Name it again", make_trainer, init="covariance", **resumed)
    cli.ok("export", "--form", "merged", "--output_dir", tmp_path / "merged", *common, q4_0)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(IDS).logits.float(), student(IDS).logits.float(), atol=0.5)


def test_bytes_and_digest_are_those_of_the_file(q4_0, tiny_model_path, tmp_path):
    exact, short = (load_student(str(tiny_model_path), gguf_file=str(q4_0), dtype=each) for each in (None, "bfloat16"))
    assert exact.dtype == torch.float32 and short.dtype == torch.bfloat16
    size = compute_size(exact)
    assert size.total == q4_0.stat().st_size
    assert (size.codes, size.constants) == (size.linear_weights // 2, size.linear_weights // 16)
    assert size.bits_per_weight == 4.5 and describe_weights(exact)["sha256"] == describe_weights(short)["sha256"]
    adapted = attach_lora(short)
    assert {each.dtype for name, each in adapted.named_parameters() if "lora" not in name} == {torch.bfloat16}
    assert compute_size(adapted).total > size.total
    moved = shutil.copyfile(q4_0, tmp_path / "moved.gguf")
    student = load_student(str(tiny_model_path), quantization_config=GgufConfig(gguf_file=str(moved)))
    moved.unlink()  # what is mapped stays
    assert describe_weights(student) == describe_weights(exact)


@pytest.mark.usefixtures("no_pictures")
def test_a_file_by_itself(tmp_path, tiny_model, tiny_tokenizer, tiny_model_path, training_set, caplog, cli):
    tiny_model.save_pretrained(tmp_path / "full")
    path = write_gguf(tiny_model, tmp_path / "alone.gguf", tokenizer=tiny_tokenizer)
    alone, named = load_student(str(path)), load_student(str(tmp_path / "full"), gguf_file=str(path))
    assert torch.allclose(alone(IDS).logits, named(IDS).logits, atol=1e-4)
    assert "The config comes from alone.gguf" in caplog.text
    text = "Ann has 3 apples."
    for student in (str(path), alone):
        assert load_student_tokenizer(student)(text).input_ids == tiny_tokenizer(text).input_ids
    of_folder = load_student(str(tmp_path), gguf_file="alone.gguf")
    assert torch.equal(of_folder(IDS).logits, alone(IDS).logits)
    words = ["--model_name_or_path", path, "--init_from", tiny_model_path, "--transfer_set", training_set.sources[0]]
    cli.ok("train", *words, "--output_dir", tmp_path / "out", "--max_steps", "1", "--report_to", "none")
    assert name_format(load_student_from(StudentArguments(str(path)))) == "q4_0"
    facts = Provenance.read(tmp_path / "out")
    assert (facts.training["init"], facts.quantization["gguf_file"]) == ("covariance", "alone.gguf")
    (tmp_path / "out" / "tokenizer_config.json").unlink()  # as adapters of other libraries: then the file's is written
    words = ["--model_name_or_path", tmp_path, "--gguf_file", "alone.gguf", "--adapter", tmp_path / "out"]
    cli.ok("export", "--form", "adapter", *words, "--output_dir", tmp_path / "bare")
    assert (tmp_path / "bare" / "tokenizer.json").is_file()
    scaled = write_gguf(tiny_model, tmp_path / "scaled.gguf", extra={"rope_freqs.weight": np.ones(8, np.float32)})
    refused(ConfigError, r"it scales positions, rope_freqs.weight", load_student, str(scaled))
    load_student(str(tmp_path / "full"), gguf_file="../scaled.gguf")


def change(data, key, code, value):
    """A file's bytes with another number in its metadata."""
    changed, key = bytearray(data), text(f"llama.{key}")
    struct.pack_into("<" + code, changed, changed.index(key) + len(key) + 4, value)
    return changed


@pytest.mark.parametrize(("key", "code", "value", "message"), [
    *((key, "I", 0, "expected a number above 0") for key in (
        "attention.head_count_kv", "attention.head_count", "rope.dimension_count", "embedding_length")),
    *(("rope.freq_base", "f", each, "expected a number above 0") for each in (0, math.nan, math.inf)),
    ("attention.layer_norm_rms_epsilon", "f", math.nan, "expected a number above 0"),
    ("attention.head_count", "I", 3, "3 attention heads in groups of 2"),
    ("block_count", "I", 3, "block_count is 3, and there are tensors of 2 blocks"), ("block_count", "I", 0, "is 0"),
])  # fmt: skip
def test_impossible_metadata_of_a_file_by_itself_is_refused(tiny_model, tmp_path, key, code, value, message):
    path = write_gguf(tiny_model, tmp_path / "odd.gguf")
    path.write_bytes(change(path.read_bytes(), key, code, value))
    refused(ConfigError, message, load_student, str(path))


def test_a_file_by_itself_is_bounded_before_it_is_built(tmp_path):
    many = text("llama.block_count") + number(4, "I") + number(2000, "I")
    layers = b"".join(text(f"blk.{place}.t") + number(1, "I") + number(1) + number(0, "I") + number(place * 32)
                      for place in range(2000))  # fmt: skip
    path = tmp_path / "hostile.gguf"
    path.write_bytes(header(2000, 2) + ARCHITECTURE + many + layers + bytes(2000 * 32 + 32))
    refused(ConfigError, "block_count is 2000", load_student, str(path))
    items = text("tokenizer.ggml.scores") + number(9, "I") + number(6, "I") + number(2**17) + bytes(2**19)
    path.write_bytes(header(1, 2) + ARCHITECTURE + items + TENSOR + number(0) + bytes(500))
    for load in (load_student, load_student_tokenizer):
        refused(ConfigError, "scores has 131,072 items for 0 tokens", load, str(path))


def test_quantize_writes_the_same_file_with_other_codes(
    q4_0, tiny_model_path, training_set, held_out, tmp_path, cli, make_trainer
):
    def kl(file):
        return evaluate_fidelity(load_student(str(tiny_model_path), gguf_file=str(file)), held_out).means["kl"]

    words = ["--gguf_file", q4_0, "--transfer_set", training_set.sources[0], "--output_dir", tmp_path / "out"]
    assert "tiny-Q4_0.gguf with calibrated codes" in cli.ok("quantize", tiny_model_path, *words)
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["quantkd.json", "tiny-Q4_0.gguf"]
    old, new = open_gguf(q4_0), open_gguf(tmp_path / "out" / "tiny-Q4_0.gguf")
    assert len(old.data) == len(new.data) and old.metadata == new.metadata and old.tensors.keys() == new.tensors.keys()
    rest = np.array(old.data), np.array(new.data)
    for name, tensor in old.tensors.items():
        same = np.array_equal(tensor.blocks, new.tensors[name].blocks)
        assert same is not (name.startswith("blk") and "norm" not in name), name
        if not same:
            assert torch.equal(split_blocks(tensor)["constants"], split_blocks(new.tensors[name])["constants"])
    first = min(each.blocks.ctypes.data for each in old.tensors.values()) - old.data.ctypes.data
    assert np.array_equal(rest[0][:first], rest[1][:first]) and kl(new.path) < kl(q4_0)
    facts = Provenance.read(tmp_path / "out")
    assert facts.transfer_set_digest == training_set.digest
    assert facts.export["codes"] == "calibrated" and facts.export["quantized_from"] == tiny_model_path.name
    student = load_student(str(tiny_model_path), gguf_file=str(new.path))
    assert facts.weights == describe_weights(student)
    for file, rate in ((q4_0, 3e-5), (new.path, 1e-4)):
        options = {"model_init_kwargs": {"gguf_file": str(file)}, "init_from": str(tiny_model_path)}
        trainer = make_trainer(init="covariance", learning_rate=None, **options)
        trainer.save_model(str(tmp_path / "adapter"))
        page = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
        assert trainer.args.learning_rate == rate and ("of that name worse" in page) is (file is not q4_0)
    again = quantize(tiny_model_path, training_set, tmp_path / "again", gguf_file=str(q4_0))
    assert (again / "tiny-Q4_0.gguf").read_bytes() == new.path.read_bytes()


def test_a_file_of_another_model_is_refused(q4_0, tiny_model_path, tiny_tokenizer, training_set, tmp_path):
    for family in ("Llama", "Qwen2", "Mamba"):
        build(family, 96).save_pretrained(tmp_path / family)
    model, bias = AutoModelForCausalLM.from_pretrained(tiny_model_path), {"blk.0.attn_q.bias": np.ones(64, np.float32)}
    other = write_gguf(build_tiny_model(tiny_tokenizer, seed=1), tmp_path / "other.gguf")
    lacking = write_gguf(model, tmp_path / "lacking.gguf", leave_out="blk.1.ffn_up.weight")
    more = write_gguf(model, tmp_path / "more.gguf", extra=bias)
    half = write_gguf(model, tmp_path / "half.gguf", "F16")
    for place, file, message in (
        (tiny_model_path, other, r"other.gguf does not fit .*farther from the checkpoint's than zero is"),
        (tmp_path / "Llama", q4_0, r"token_embd.weight of tiny-Q4_0.gguf has the shape \(320, 64\); expected \(96"),
        (tmp_path / "Qwen2", q4_0, "has the architecture llama; expected qwen2"),
        (tmp_path / "Mamba", q4_0, "of the type mamba, whose GGUF files quantkd does not read"),
        (tiny_model_path, lacking, r"no tensor for model.layers.1.mlp.up_proj.weight"),
        (tiny_model_path, more, r"has blk.0.attn_q.bias, which the model LlamaForCausalLM has no weight for"),
        (tmp_path, q4_0, "holds no config.json"), (tmp_path / "nothing", q4_0, "There is no folder"),
        (tiny_model_path, "missing.gguf", "which is no file here and none of"),
    ):  # fmt: skip
        refused(ConfigError, message, load_student, str(place), gguf_file=str(file))
    own, changed = build("Llama", 320), build("Llama", 320)
    own.save_pretrained(tmp_path / "own")
    tied = write_gguf(own, tmp_path / "tied.gguf", leave_out="output.weight")
    refused(ConfigError, "tied.gguf has no output.weight", load_student, str(tmp_path / "own"), gguf_file=str(tied))
    changed.save_pretrained(tmp_path / "changed")
    with torch.no_grad():
        changed.model.layers[-1].mlp.down_proj.weight.normal_()
    last = write_gguf(changed, tmp_path / "last.gguf")
    refused(ConfigError, "last.gguf does not fit", load_student, str(tmp_path / "changed"), gguf_file=str(last))
    Gemma3Config().save_pretrained(tmp_path / "pictures")
    refused(ConfigError, "is of more than text", load_student, str(tmp_path / "pictures"), gguf_file=str(q4_0))
    odd = GgufTensor("odd", gguf.GGMLQuantizationType.Q8_1, (1, 32), np.zeros((1, 40), np.uint8))
    refused(ConfigError, "odd is stored in Q8_1, which the package gguf does not read", odd.dequantize)
    named = {"gguf_file": str(q4_0), "quantization_config": "nf4"}
    refused(ConfigError, "another format was asked for", load_student, str(tiny_model_path), **named)
    words = (tiny_model_path, training_set, tmp_path / "no")
    refused(ConfigError, "it is stored as F16", quantize, *words, gguf_file=str(half))
    assert not (tmp_path / "no").exists()


def test_metadata_that_the_checkpoint_has_otherwise_are_said(tmp_path, caplog):
    """llama.cpp goes by the file: with another base of rotation its log-probabilities differ by up to 6.6."""
    for place, config in (("a", {}), ("b", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})):
        build("Llama", 320, **config).save_pretrained(tmp_path / place)
    file = write_gguf(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), tmp_path / "b.gguf", "F32")
    load_student(str(tmp_path / "b"), gguf_file=str(file))
    assert "llama.cpp goes by the file" not in caplog.text
    load_student(str(tmp_path / "a"), gguf_file=str(file))
    assert re.search(r"b.gguf has llama.rope.freq_base of 500000, and .*/a of 10000. llama.cpp goes by", caplog.text)


def number(value, code="Q"):
    return struct.pack("<" + code, value)


def text(value):
    return number(len(value)) + value.encode()


def header(tensors=0, fields=1, version=3):
    return b"GGUF" + number(version, "I") + number(tensors) + number(fields)


ARCHITECTURE = text("general.architecture") + number(8, "I") + text("llama")
TENSOR = text("t") + number(1, "I") + number(32) + number(0, "I")  # 32 values in F32, then its offset
LARGE = 2**60
KEY, ONE = header(0, 2) + ARCHITECTURE, header(1) + ARCHITECTURE  # another key, or a tensor, follows
HOSTILE = {
    "an empty file": (b"", "too few for a GGUF file"),
    "another file": (b"PK\x03\x04" * 20, "expected b'GGUF'"),
    "an old version": (header(version=1) + ARCHITECTURE, "GGUF version 1"),
    "another byte order": (header(version=3 << 24) + ARCHITECTURE, "big-endian"),
    "many tensors": (header(LARGE) + ARCHITECTURE, "states .* tensors"),
    "tensors that are not there": (header(2**16) + ARCHITECTURE, "ends within its header"),
    "many keys": (header(0, LARGE), "states .* metadata keys"),
    "a long key": (header() + number(LARGE), "a text of"),
    "a long text": (header() + text("a") + number(8, "I") + number(LARGE) + b"x", "a text of"),
    "an array of many numbers": (header() + text("a") + number(9, "I") + number(4, "I") + number(LARGE), "items"),
    "an array of many texts": (header() + text("a") + number(9, "I") + number(8, "I") + number(2**20), "within its"),
    "an array of arrays": (header() + text("a") + number(9, "I") + number(9, "I") + number(2), "an array of type 9"),
    "an unknown type": (header() + text("a") + number(77, "I"), "metadata of type 77"),
    "a key that is no text": (header() + number(1) + b"\xff" + number(4, "I"), "not UTF-8"),
    "a key twice": (KEY + ARCHITECTURE, "twice in its metadata"),
    "no architecture": (header() + text("a") + number(4, "I") + number(1, "I"), "does not name its architecture"),
    "many layers": (KEY + text("llama.block_count") + number(4, "I") + number(2**31, "I"), "states 2147483648 layers"),
    "a part": (KEY + text("split.count") + number(2, "I") + number(3, "H"), "one of 3 parts"),
    "no alignment": (KEY + text("general.alignment") + number(4, "I") + number(0, "I"), "alignment 0"),
    "many dimensions": (ONE + text("t") + number(2**31, "I"), "2147483648 dimensions"),
    "a large tensor": (ONE + text("t") + number(2, "I") + number(2**63) * 2 + number(0, "I") + number(0), "truncated"),
    "an unknown kind": (ONE + text("t") + number(1, "I") + number(32) + number(999, "I") + number(0), "type 999"),
    "no whole blocks": (ONE + text("t") + number(1, "I") + number(33) + number(2, "I") + number(0), "whole blocks"),
    "a crooked offset": (ONE + TENSOR + number(7), "multiple of 32"),
    "an offset beyond the end": (ONE + TENSOR + number(LARGE), "is truncated"),
    "tensors on each other": (header(2) + ARCHITECTURE + TENSOR + number(0) + TENSOR.replace(b"t", b"u") + number(64)
                              + bytes(500), "where another tensor is"),
    "a tensor twice": (header(2) + ARCHITECTURE + TENSOR + number(0) + TENSOR + number(128) + bytes(500), "or twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once(name, tmp_path):
    (tmp_path / "hostile.gguf").write_bytes(HOSTILE[name][0])
    refused(ConfigError, HOSTILE[name][1], open_gguf, tmp_path / "hostile.gguf")


def test_truncations_and_values_that_are_not_finite_are_refused(q4_0, tiny_model_path, tmp_path):
    path, size = shutil.copyfile(q4_0, tmp_path / "cut.gguf"), q4_0.stat().st_size
    for length in (size - 100, size // 2, *range(2000, 0, -7)):
        os.truncate(path, length)  # which is faster than to write it anew
        refused(ConfigError, "", open_gguf, path)
    path = shutil.copyfile(q4_0, tmp_path / "broken.gguf")
    file = open_gguf(path)
    place = file.tensors["blk.1.ffn_up.weight"].blocks.ctypes.data - file.data.ctypes.data
    with path.open("r+b") as opened:
        opened.seek(place)
        opened.write(np.array([np.inf], np.float16).tobytes())
    refused(ConfigError, r"blk.1.ffn_up.weight .* not finite", load_student, str(tiny_model_path), gguf_file=str(path))


@pytest.mark.parametrize(("family", "limits"), [("Qwen2", (0.05, 0.0065)), ("Gemma 3", (0.63, 0.21))])
def test_start_and_codes_of_other_families(family, limits, tmp_path):
    """Biases and shifted norms survive the way from the file to a corrected student."""
    model, plain = save_model(family, tmp_path / "full"), {"token_embd": "F32", "output": "F32"}
    path = write_gguf(model, tmp_path / "model.gguf", architecture=ARCHITECTURES[family], **plain)
    ids = torch.randint(0, 96, (8, 64), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits.log_softmax(-1).detach()

    def kl(student):
        with torch.no_grad():
            return float((expected.exp() * (expected - student(ids).logits.log_softmax(-1))).sum(-1).mean())

    student, adapted = (load_student(str(tmp_path / "full"), gguf_file=str(path)) for _ in range(2))
    before, weights = kl(student), OriginalWeights(str(tmp_path / "full"), student)
    assert calibrate(student, weights, Rows(ids), progress=False) == 12  # in rows of whole blocks
    assert kl(student) < limits[0] * before
    adapted = attach_lora(adapted, default_lora_config(8))
    assert initialize_from_error(adapted, weights, Rows(ids), progress=False) == 14
    assert kl(adapted) < limits[1] * before
