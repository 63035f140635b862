"""The start on other students: other formats, other families, layers without tokens, wrong checkpoints, processes."""

from __future__ import annotations

import json
import re

import processes
import pytest
import torch
from packed_checkpoints import load_in
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from quantkd.models.initialization import _MAX_INPUTS, initialize_from_error
from quantkd.models.original_weights import OriginalWeights
from quantkd.models.student import attach_lora, load_student
from quantkd.models.weights import dequantize_weight
from tests.conftest import capture_set

IDS = torch.arange(120).view(6, 20)


def start(model, path, ids=IDS, rank=32):
    """The model with adapters of a high rank, set; how many were."""
    model = attach_lora(model, LoraConfig(r=rank, target_modules="all-linear"))
    return model, initialize_from_error(model, OriginalWeights(str(path), model.get_base_model()), ids, progress=False)


def logit_error(model, teacher):
    with torch.no_grad():
        return float((model(IDS).logits.float() - teacher(IDS).logits).norm())


@pytest.mark.parametrize(
    ("config", "left"),
    # LLM.int8 rounds its inputs too, which no correction of weights can mend.
    [("nf4", 0.6), ("fp4", 0.6), ("int8", 0.8), ("hqq", 0.6), ("torchao-int8", 0.6)],
)
def test_every_format_comes_nearer_to_the_teacher(tiny_model, tiny_model_path, config, left):
    student = load_in(config, tiny_model_path)
    before = logit_error(student.eval(), tiny_model)
    model, count = start(student, tiny_model_path)
    assert count == 14
    assert logit_error(model.eval(), tiny_model) < left * before


def test_gpt2_s_weights_lie_the_other_way_round(tmp_path):
    """Its square projections would fit either way; the right one leaves little of the error."""
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()
    for parameter in teacher.parameters():
        parameter.data.mul_(5)
    teacher.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    student = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    model = attach_lora(student, LoraConfig(r=64, target_modules="all-linear", fan_in_fan_out=False))
    assert initialize_from_error(model, OriginalWeights(str(tmp_path), model.get_base_model()), IDS) == 8
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
            original = teacher.get_submodule(name).weight.T
            error = original - dequantize_weight(layer)
            assert (error - product).norm() < 0.1 * error.norm(), name


class Experts(nn.Module):
    """Two experts, the second of which no token goes to."""

    def __init__(self, expert):
        super().__init__()
        self.experts = nn.ModuleList([expert, nn.Linear(64, 64, bias=False)])

    def forward(self, hidden):
        return self.experts[0](hidden)


def test_an_expert_without_tokens_is_corrected_without_inputs(tiny_model, tmp_path):
    tiny_model.model.layers[1].mlp = Experts(tiny_model.model.layers[1].mlp)
    tiny_model.save_pretrained(tmp_path)
    for module in tiny_model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = (module.weight.data * 8).round() / 8
    model, count = start(tiny_model, tmp_path, rank=64)
    assert count == 15
    idle = model.get_base_model().model.layers[1].mlp.experts[1]
    product = idle.lora_B["default"].weight @ idle.lora_A["default"].weight * idle.scaling["default"]
    original = OriginalWeights(str(tmp_path), model.get_base_model()).read("model.layers.1.mlp.experts.1")
    torch.testing.assert_close(idle.get_base_layer().weight + product, original, atol=1e-4, rtol=1e-4)


def test_a_tied_head_and_modules_saved_whole_stay_as_they_are(tiny_model, tmp_path):
    tiny_model.config.tie_word_embeddings = True
    tiny_model.tie_weights()
    tiny_model.save_pretrained(tmp_path)
    student = load_student(str(tmp_path), dtype="float32")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = attach_lora(student, config)
    head = model.get_output_embeddings().weight.clone()
    assert initialize_from_error(model, OriginalWeights(str(tmp_path), model.get_base_model()), IDS) == 4
    assert torch.equal(model.get_output_embeddings().weight, head)


def other_values(tensors):
    return {name: torch.randn_like(value) if "proj" in name else value for name, value in tensors.items()}


def other_shapes(tensors):
    return {name: value[..., :-1].contiguous() if "down_proj" in name else value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "kept", "reason"),
    [(other_values, 0, "it was not quantized from it"), (other_shapes, 12, r"\(64, 127\), and its own \(64, 128\)")],
)
def test_a_checkpoint_of_another_model_is_noticed(tiny_model, tiny_model_path, tmp_path, caplog, change, kept, reason):
    from safetensors.torch import save_file

    save_file(change(tiny_model.state_dict()), tmp_path / "model.safetensors")
    model, count = start(load_student(str(tiny_model_path), dtype="float32"), tmp_path, rank=4)
    assert count == kept and f"{14 - kept} of 14 adapters start from zero" in caplog.text
    assert re.search(reason, caplog.text)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and (kept == 0 or "down_proj" in name):
            assert not parameter.any(), name


def test_an_exact_layer_keeps_a_start_that_can_be_trained(tiny_model, tiny_model_path):
    """An unquantized layer, and ranks above a layer's own: B is zero there, and A is not."""
    model = attach_lora(tiny_model, LoraConfig(r=80, target_modules=["q_proj", "k_proj"]))
    model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight.data.mul_(1.01)
    own = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}
    assert initialize_from_error(model, OriginalWeights(str(tiny_model_path), model.get_base_model()), IDS) == 4
    for name, parameter in model.named_parameters():
        if "lora_A" in name and "layers.0.self_attn.q_proj" in name:
            assert torch.equal(parameter[64:], own[name][64:]) and not torch.equal(parameter[:64], own[name][:64])
        elif "lora_A" in name:
            assert torch.equal(parameter, own[name])
        elif "lora_B" in name:
            assert bool(parameter.any()) == ("layers.0.self_attn.q_proj" in name)


def test_dora_is_left_at_its_own_start(tiny_model, tiny_model_path, caplog):
    for layer in tiny_model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = (layer.weight.data * 8).round() / 8
    model = attach_lora(tiny_model, LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    assert initialize_from_error(model, OriginalWeights(str(tiny_model_path), model.get_base_model()), IDS) == 0
    assert "not a plain LoRA" in caplog.text


def test_one_layer_is_held_at_a_time(tiny_model, tiny_model_path, monkeypatch):
    """What is alive at each correction: one original weight, and at most `_MAX_INPUTS` inputs of one layer."""
    import weakref

    from quantkd.models import initialization

    alive, most = weakref.WeakSet(), []
    read, compute = OriginalWeights.read, initialization.compute_correction

    def watched_read(self, name):
        weight = read(self, name)
        alive.add(weight.untyped_storage())
        return weight

    def watched_compute(error, inputs, rank, **options):
        most.append((len(alive), len(inputs), inputs.numel() + error.numel()))
        return compute(error, inputs, rank, **options)

    monkeypatch.setattr(OriginalWeights, "read", watched_read)
    monkeypatch.setattr(initialization, "compute_correction", watched_compute)
    ids = torch.arange(15_000).view(30, 500) % 300
    start(load_student(str(tiny_model_path), dtype="float32"), tiny_model_path, ids, rank=4)
    assert len(most) == 14
    assert max(count for count, _, _ in most) <= 1
    assert max(tokens for _, tokens, _ in most) <= _MAX_INPUTS
    assert max(numbers for _, _, numbers in most) <= (_MAX_INPUTS + 64) * 128  # the widest layer's


PROCESS = """
import json, sys
import torch
from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, TransferSet
import quantkd.models.initialization as initialization

job = json.loads(sys.argv[1])
args = QuantizedDistillationConfig(
    job["folder"] + "/out", model_init_kwargs={"dtype": "float32"}, disable_tqdm=True, report_to=[], save_strategy="no")
if args.process_index:  # only the main process may compute
    def refuse(*args, **kwargs):
        raise AssertionError("a second process computed the start")
    initialization.initialize_from_error = refuse
trainer = QuantizedDistillationTrainer(job["model"], args, train_dataset=TransferSet.open(job["set"]))
found = {name: p.detach() for name, p in trainer.model.named_parameters() if "lora_" in name}
torch.save(found, f"{job['folder']}/adapters-{args.process_index}.pt")
"""


def test_processes_start_from_the_same_adapters(tiny_model_path, tmp_path):

    capture_set(tiny_model_path, ["What is it?", "And now?"], tmp_path / "set")
    job = json.dumps({"folder": str(tmp_path), "model": str(tiny_model_path), "set": str(tmp_path / "set")})
    (tmp_path / "process.py").write_text(PROCESS)
    for count in (1, 2):
        processes.run([tmp_path / "process.py", job], tmp_path / "out.txt", count)
        if count == 1:
            (tmp_path / "adapters-0.pt").rename(tmp_path / "alone.pt")
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "adapters-0", "adapters-1"))
    for name, value in alone.items():
        assert value.any(), name
        assert torch.equal(value, first[name]) and torch.equal(value, second[name]), name
