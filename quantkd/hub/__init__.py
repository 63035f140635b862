"""Adapters and transfer sets on the Hugging Face Hub: pushed without secrets, loaded without trust."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Name -> module that holds it: a transfer set is read without PEFT and transformers.
_EXPORTS = {
    "PushedRepository": "repository",
    "fetch_adapter": "loading",
    "load_adapter": "loading",
    "push_adapter": "adapter",
    "push_transfer_set": "sets",
}
__all__ = ["PushedRepository", "fetch_adapter", "load_adapter", "push_adapter", "push_transfer_set"]

if TYPE_CHECKING:
    from quantkd.hub.adapter import push_adapter
    from quantkd.hub.loading import fetch_adapter, load_adapter
    from quantkd.hub.repository import PushedRepository
    from quantkd.hub.sets import push_transfer_set


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'quantkd.hub' has no attribute {name!r}")
    return getattr(importlib.import_module(f"quantkd.hub.{_EXPORTS[name]}"), name)
