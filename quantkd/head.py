"""Getting hidden states out of a causal language model through its own forward pass, and the head that they go to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Head", "find_head", "hidden_states_as_logits", "why_not_fusable"]

# What families do to the logits after the head: the attribute, where it lies, and the value that makes it do nothing.
_NEUTRAL = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: `cap * tanh(scale * (hidden @ weight.T + bias) / cap)`.

    Args:
        weight: (V, H).
        bias: (V,) or None.
        scale: a factor on the logits (Cohere, Granite); 1.0 for most models.
        softcap: the final soft-capping (Gemma 2); None for most models.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V), in float32, or float64 if the product is."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if logits.dtype != torch.float64:
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def find_head(model: Any) -> Head:
    """The head of a causal language model as it stands now, with the scale and soft-capping of its family.

    Args:
        model: a causal language model, with or without adapters, not wrapped.
    """
    module, network = model.get_output_embeddings(), _network(model)
    config = network.config.get_text_config()
    scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    if isinstance(getattr(network, "logit_scale", None), (int, float)):
        scale *= network.logit_scale
    return Head(module.weight, module.bias, scale, getattr(config, "final_logit_softcapping", None))


@contextmanager
def hidden_states_as_logits(model: Any) -> Iterator[None]:
    """Inside, the model's `logits` are the last hidden states: the head passes its input through.

    The forward pass is the model's own, so whatever wraps it (DDP, FSDP, DeepSpeed, hooks) works as always, and its
    output still carries the gradient.

    Args:
        model: a causal language model, not wrapped; wrappers around it may be called.
    """
    head, network = model.get_output_embeddings(), _network(model)
    config = network.config.get_text_config()
    places = [(config, "final_logit_softcapping"), (config, "logits_scaling"), (network, "logit_scale")]
    saved = [(place, name, value) for place, name in places if _is_plain(value := getattr(place, name, None))]
    own_forward = head.__dict__.get("forward")  # accelerate's hooks put one there
    head.forward = lambda hidden: hidden
    for place, name, _ in saved:
        setattr(place, name, _NEUTRAL[name])
    try:
        yield
    finally:
        if own_forward is None:
            del head.forward
        else:
            head.forward = own_forward
        for place, name, value in saved:
            setattr(place, name, value)


def why_not_fusable(model: Any) -> str | None:
    """Why the loss of this model cannot be taken from its hidden states; None if it can.

    Tries it: on two tokens, the model's logits must be what `find_head` makes of the head's input, and
    `hidden_states_as_logits` must hand out that input.

    Args:
        model: a causal language model, with or without adapters, not wrapped.
    """
    head = model.get_output_embeddings()
    if head is None:
        return "the model names no output embeddings"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, not a plain linear layer"
    if head.weight.device.type == "meta" or head.weight.numel() == 0:
        return "its head's weight is not on this device"
    inputs: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    tokens = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens).logits
            expected = find_head(model).logits(inputs[-1][0])
            with hidden_states_as_logits(model):
                hidden = model(input_ids=tokens).logits
    finally:
        hook.remove()
    if logits.shape[-1] != head.weight.shape[0] or not torch.allclose(
        logits[0].float(), expected, atol=1e-2, rtol=1e-2
    ):
        return "its logits are not what its head makes of the last hidden states"
    if hidden.shape != inputs[-1].shape or not torch.equal(hidden, inputs[-1]):
        return "it changes what its head returns"
    return None


def _network(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
