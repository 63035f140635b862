"""Running a causal language model up to its states at the targets of a batch, through its own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from quantkd.hardware import send
from quantkd.loss.states import Head, TargetStates
from quantkd.models.weights import head_width, is_sharded, whole_parameters

# What families do to the logits after the head: the attribute, and the value with which it does nothing.
_NEUTRAL = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}

_OURS = ("labels", "targets", "targets_of", "teacher", "weights")  # of a batch, and not of a model's forward pass


@contextmanager
def run_model(
    model: Any, batch: Mapping[str, Any], *, fused: bool, forward: Callable[..., Any] | None = None
) -> Iterator[tuple[TargetStates, Any]]:
    """Run a model, or `forward`, what is wrapped around it: its states at all (B, T) positions, and its outputs."""
    inputs = {key: value for key, value in batch.items() if key not in _OURS}
    if "position_ids" in inputs:
        # With a cache transformers takes position ids for a continued sequence, and packed rows would see each other.
        inputs["use_cache"] = False
    with hidden_states_as_logits(model) if fused else nullcontext():
        outputs = (model if forward is None else forward)(**inputs)
    with gathered_head(model, outputs.logits.dtype) if fused else nullcontext() as head:
        yield TargetStates(outputs.logits, head), outputs


class Runner:
    """A model that no processes share, looked at once: how wide it is, what it reads, and how it is run."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.width, self.context = head_width(model), context_length(model)
        self.why_not_fused = why_not_fusable(model)

    def run(self, batch: Mapping[str, Any]) -> tuple[TargetStates, Tensor]:
        """The states at a batch's N targets, and the (N,) targets, on one device."""
        device = self.model.get_input_embeddings().weight.device
        moved = {key: send(value, device) for key, value in batch.items() if isinstance(value, Tensor)}
        with run_model(self.model, moved, fused=self.why_not_fused is None) as (states, _):
            targets = moved["targets"].to(states.device) if "targets" in moved else None
            return states.at_targets(moved["labels"].to(states.device), targets)


@contextmanager
def gathered_head(model: Any, dtype: torch.dtype | None = None) -> Iterator[Head]:
    """The head with its family's scale and soft-capping, whole and in floating point; every process must enter."""
    # Gathered without a gradient: right for a frozen head, and `why_not_fusable` refuses a trainable one.
    module, network = _head_module(model), base_network(model)
    config = network.config.get_text_config()
    scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    if isinstance(getattr(network, "logit_scale", None), (int, float)):
        scale *= network.logit_scale
    softcap = getattr(config, "final_logit_softcapping", None)
    with whole_parameters(module) as (weight, bias):
        if dtype is not None and weight is not module.weight:
            weight = weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        yield Head(weight, bias, scale, softcap)


@contextmanager
def hidden_states_as_logits(model: Any) -> Iterator[None]:
    """Inside, the model's `logits` are the last hidden states: the head passes its input through."""
    # The forward pass is the model's own, so whatever wraps it (DDP, FSDP, DeepSpeed, hooks) works as always.
    head, network = _head_module(model), base_network(model)
    config = network.config.get_text_config()
    places = [(config, "final_logit_softcapping"), (config, "logits_scaling"), (network, "logit_scale")]
    saved = [(*each, value) for each in places if type(value := getattr(*each, None)) in (int, float)]
    # FSDP2 puts hooks on what a layer returns, and warns of a view, which the model's slice of its states is.
    is_fsdp = isinstance(head, FSDPModule) or isinstance(model, FSDPModule)

    def pass_through(hidden: Tensor) -> Tensor:
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        if trained and torch.is_grad_enabled():
            hidden = _PassThrough.apply(hidden, *trained)  # type: ignore[no-untyped-call]
        return hidden.clone() if is_fsdp else hidden

    for place, name, _ in saved:
        setattr(place, name, _NEUTRAL[name])
    try:
        with _forward_replaced(head, pass_through):
            yield
    finally:
        for place, name, value in saved:
            setattr(place, name, value)


def why_not_fusable(model: Any, forward: Callable[..., Any] | None = None) -> str | None:
    """Why the loss of this model cannot be taken from its hidden states, tried on two tokens; None if it can."""
    head = _head_module(model)
    if head is None:
        return "the model names no output embeddings"
    if not _is_linear(head):
        library = type(head).__module__.split(".")[0]
        return f"its head is {library}'s {type(head).__name__}, not a plain linear layer"
    if forward is None and (head.weight.device.type == "meta" or head.weight.numel() == 0):
        return "its head's weight is not on this device"
    forward = model if forward is None else forward
    inputs: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    try:
        with torch.no_grad(), undisturbed(model, tokens.device):
            logits = forward(**batch).logits
            if head.weight.requires_grad and is_sharded(head.weight):
                return "its head is trained and sharded over processes"
            with gathered_head(model, inputs[-1].dtype) as whole:
                vocab_size, expected = len(whole.weight), whole.logits(inputs[-1][0])
            with hidden_states_as_logits(model):
                hidden = forward(**batch).logits
    finally:
        hook.remove()
    if logits.shape[-1] != vocab_size or not torch.allclose(logits[0].float(), expected, atol=1e-2, rtol=1e-2):
        return "its logits are not what its head makes of the last hidden states"
    if hidden.shape != inputs[-1].shape or not torch.equal(hidden, inputs[-1]):
        return "it changes what its head returns"
    return None


def _head_module(model: Any) -> Any:
    """The output embeddings; of a head that PEFT trains whole (`modules_to_save`), the copy in use."""
    head = model.get_output_embeddings()
    if not isinstance(head, ModulesToSaveWrapper):
        return head
    if head.disable_adapters or not head.active_adapters:
        return head.original_module
    return head.modules_to_save[head.active_adapters[0]]


def _is_linear(head: nn.Module) -> bool:
    """Whether it is a linear layer and nothing else, be its weight 4-bit; FSDP2 makes a subclass of each layer's."""
    name = type(head).__name__.removeprefix("FSDP")
    return type(head) is nn.Linear or (isinstance(head, nn.Linear) and name in ("Linear", "Linear4bit"))


class _PassThrough(torch.autograd.Function):
    """The hidden states, tied to the head's trained parameters without giving them a gradient."""

    # DDP walks the graph from the model's output to find parameters that will get none. It must find the head's, whose
    # gradient comes from the loss.

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *trained: Tensor) -> Tensor:
        """The hidden states."""
        ctx.count = len(trained)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
        """Their gradient, and none for the parameters."""
        return grad_hidden, *[None] * ctx.count


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode; at the end, and after an error, each layer is in its own mode again."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode; afterwards the random state is what it was, too."""
    with evaluation_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for module in model.modules():  # 4-bit layers train: on some CPUs bitsandbytes repacks their weights otherwise
            module.training = hasattr(module, "quant_state")
        yield


@contextmanager
def recomputed_blocks(model: Any) -> Iterator[None]:
    """Inside, the backward pass runs each of a model's blocks again, in place of what its forward pass would hold."""
    # transformers' own way asks for training mode, and its switch does not say how it was set before.
    network, lists = base_network(model), list[str]()
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(lists)):
            lists.append(f"{name}.")
    blocks = dict.fromkeys(block for name in lists for block in network.get_submodule(name[:-1]))  # some are shared
    config = network.config.get_text_config()
    cached = getattr(config, "use_cache", None)
    with ExitStack() as stack:
        if cached is not None:
            config.use_cache = False  # a block that runs twice would add to it twice
            stack.callback(setattr, config, "use_cache", cached)
        for block in blocks:
            stack.enter_context(_forward_replaced(block, partial(checkpoint, block.forward, use_reentrant=False)))
        yield


@contextmanager
def _forward_replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module's forward pass is another one."""
    own = vars(module).get("forward")  # accelerate's hooks put one there
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def context_length(model: Any) -> int | None:
    """How many tokens a model's positions reach; None if it does not say."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def base_network(model: Any) -> Any:
    """The model of transformers below PEFT's, or the model itself if nothing is around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
