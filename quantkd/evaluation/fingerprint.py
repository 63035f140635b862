"""A digest of a model, which says whether figures that are there are of the very same one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from quantkd.models.network import base_network
from quantkd.models.stored_weights import list_adapted, list_adapter_parameters

_SAMPLES_PER_WEIGHT = 64
# What a config holds that no forward pass depends on.
_IDLE_CONFIG = ("architectures", "transformers_version", "use_cache", "pad_token_id")


def compute_model_fingerprint(model: Any) -> str:
    """A digest of what decides a model's figures: its weights, config, quantization, dtype and adapters' state."""
    facts = base_network(model).config.to_dict()
    facts = {key: value for key, value in facts.items() if key not in _IDLE_CONFIG and not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    trained = {id(each) for each in list_adapter_parameters(model)}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = parameter.detach()
            digest.update(f"{prefix}.{name} {tuple(values.shape)} {values.dtype}".encode())
            if values.device.type != "meta" and values.numel():
                # What is or was trained is hashed whole; of other weights, which can take 16 GB, a few samples suffice.
                whole = parameter.requires_grad or id(parameter) in trained
                step = 1 if whole else max(1, values.numel() // _SAMPLES_PER_WEIGHT)
                digest.update(values.reshape(-1)[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for module in list_adapted(model):
        scaling = getattr(module, "scaling", {})
        active = sorted((each, scaling.get(each)) for each in module.active_adapters)
        digest.update(f"{module.disable_adapters} {active}".encode())
    return digest.hexdigest()[:16]
