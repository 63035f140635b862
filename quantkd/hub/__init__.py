"""Adapters and transfer sets on the Hugging Face Hub: pushed without secrets, loaded without trust."""

from quantkd.hub.adapters import fetch_adapter, load_adapter, push_adapter
from quantkd.hub.repository import PushedRepository
from quantkd.hub.sets import push_transfer_set

__all__ = ["PushedRepository", "fetch_adapter", "load_adapter", "push_adapter", "push_transfer_set"]
