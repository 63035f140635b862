"""Adapters and transfer sets on the Hugging Face Hub: pushed without secrets, loaded without trust."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkd.names import lazy

# A push of a transfer set needs neither PEFT nor transformers.
__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "adapters": "fetch_adapter load_adapter push_adapter",
        "repository": "PushedRepository",
        "sets": "push_transfer_set",
    },
)

if TYPE_CHECKING:
    from quantkd.hub.adapters import (
        fetch_adapter as fetch_adapter,
        load_adapter as load_adapter,
        push_adapter as push_adapter,
    )
    from quantkd.hub.repository import PushedRepository as PushedRepository
    from quantkd.hub.sets import push_transfer_set as push_transfer_set
