"""The fused loss in the trainer: equal to the path over logits on every family, or off with the reason."""

from functools import partial

import pytest
import torch
from families import FAMILIES, build
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quantkd.models.network import gathered_head, hidden_states_as_logits, why_not_fusable
from tests.conftest import loss_and_gradient, relative


@pytest.fixture
def run(make_trainer, training_set, tiny_tokenizer):
    """The trainer of a model, its loss of three rows, and the gradient."""

    def go(model, fused=True):
        options = {"temperature": 2.0, "alpha": 0.6, "train_dataset": training_set[:3]}
        trainer = make_trainer(model, use_fused_loss=fused, processing_class=tiny_tokenizer, **options)
        return trainer, *loss_and_gradient(trainer, training_set.__getitems__(range(3)), train=False)

    return go


@pytest.fixture
def check_path(run):
    """Loss and gradient with `use_fused_loss` on and off, each on a model of its own; whether it was fused."""

    def check(make_model):
        trainer, loss, gradient = run(make_model())
        plain, plain_loss, plain_gradient = run(make_model(), fused=False)
        assert not plain.uses_fused_loss
        assert loss == pytest.approx(plain_loss, rel=1e-5) and relative(gradient, plain_gradient) < 1e-5
        return trainer

    return check


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"RecurrentGemma"}))
def test_loss_and_gradient_equal_the_logits_path(family, check_path, tiny_tokenizer):
    model = build(family, len(tiny_tokenizer))
    assert why_not_fusable(model) is None and check_path(lambda: model).uses_fused_loss


def test_what_is_not_a_plain_head_is_told_as_the_reason(run, check_path, load_quantized_head, tiny_tokenizer, caplog):
    trainer, *_ = run(build("RecurrentGemma", len(tiny_tokenizer)))
    assert not trainer.uses_fused_loss
    assert caplog.text.count("its logits are not what its head makes of the last hidden states") == 1
    assert not check_path(lambda: load_quantized_head(load_in_8bit=True)).uses_fused_loss
    assert "its head is bitsandbytes's Linear8bitLt, not a plain linear layer" in caplog.text


@pytest.mark.parametrize("family", ["Llama", "Gemma 2, soft-capped", "Cohere, scaled", "Granite, scaled", "Falcon"])
def test_the_model_is_left_as_it_was(family, tiny_tokenizer):
    model = build(family, len(tiny_tokenizer))
    tokens = torch.arange(6).unsqueeze(0)
    before = model(input_ids=tokens).logits
    with hidden_states_as_logits(model):
        hidden = model(input_ids=tokens).logits
    torch.testing.assert_close(model(input_ids=tokens).logits, before)
    with gathered_head(model) as head:
        torch.testing.assert_close(head.logits(hidden[0]), before[0])
    with pytest.raises(RuntimeError), hidden_states_as_logits(model):
        raise RuntimeError
    torch.testing.assert_close(model(input_ids=tokens).logits, before)


def adapt(family, vocab_size, targets, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options)
    return get_peft_model(build(family, vocab_size), config)


def test_an_adapter_on_the_head_is_told_as_the_reason(check_path, run, tiny_tokenizer, caplog):
    adapted = partial(adapt, "Llama", len(tiny_tokenizer), ["q_proj", "lm_head"], init_lora_weights=False)
    assert not check_path(adapted).uses_fused_loss
    assert caplog.text.count("its head is peft's Linear, not a plain linear layer") == 1
    # The adapter is in the logits: against the merged model, which has no adapters and a plain head.
    model, merged = adapted().eval(), adapted().merge_and_unload().eval().requires_grad_(True)
    tokens = torch.arange(6).unsqueeze(0)
    torch.testing.assert_close(model(tokens).logits, merged(tokens).logits, atol=1e-3, rtol=1e-3)
    assert run(adapted())[1] == pytest.approx(run(merged)[1], rel=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_peft_trains_whole_is_fused(tied, check_path, tiny_tokenizer):
    family = "Llama, tied" if tied else "Llama"
    adapted = partial(adapt, family, len(tiny_tokenizer), ["q_proj"], modules_to_save=["lm_head"])
    assert check_path(adapted).uses_fused_loss
    model = adapted()
    wrapper = model.get_output_embeddings()
    with gathered_head(model) as head:
        assert head.weight.requires_grad and head.weight is wrapper.modules_to_save["default"].weight
    with model.disable_adapter(), gathered_head(model) as head:
        assert head.weight is wrapper.original_module.weight and why_not_fusable(model) is None


@pytest.fixture
def load_quantized_head(tiny_model_path):
    def load(dropout=0.0, **options):
        torch.manual_seed(0)
        config = BitsAndBytesConfig(llm_int8_skip_modules=[], **options)
        model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32, quantization_config=config)
        return get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False))

    return load


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_a_4_bit_head_is_fused(double, storage, load_quantized_head, check_path, tiny_tokenizer):
    config = {"quant_type": "nf4", "use_double_quant": double, "compute_dtype": torch.float32, "quant_storage": storage}
    config = {f"bnb_4bit_{name}": value for name, value in config.items()}
    load = partial(load_quantized_head, load_in_4bit=True, **config)
    assert type(load().get_output_embeddings()).__name__ == "Linear4bit"
    trainer = check_path(load)
    assert trainer.uses_fused_loss
    with gathered_head(trainer.model) as head:
        assert head.weight.shape == (len(tiny_tokenizer), 64)


def test_the_probe_leaves_no_trace(load_quantized_head, tiny_tokenizer):
    model = load_quantized_head(dropout=0.5, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model.train()
    model.base_model.model.model.layers[0].eval()  # modes are kept layer by layer
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    state = torch.random.get_rng_state()
    assert why_not_fusable(model) is None and torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
        assert not getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False), name
    assert not any("forward" in module.__dict__ for module in model.modules() if type(module) is torch.nn.Linear)


def test_the_router_loss_of_a_mixture_of_experts_is_left_out(run, tiny_tokenizer):
    def model(coefficient):
        made = build("Mixtral", len(tiny_tokenizer))
        made.config.output_router_logits, made.router_aux_loss_coef = coefficient > 0, coefficient
        return made

    losses = [run(model(coefficient), fused)[1] for coefficient in (0.0, 10.0) for fused in (True, False)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
