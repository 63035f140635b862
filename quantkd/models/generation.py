"""Generation on the model's own distribution: of a checkpoint's own settings only its end tokens are kept."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from quantkd.data.encoding import find_turn_end
from quantkd.errors import ConfigError
from quantkd.models.network import evaluation_mode
from quantkd.models.weights import embedding_rows


def find_end_tokens(tokenizer: PreTrainedTokenizerBase, own: int | list[int] | None) -> list[int]:
    """Ids that end an answer: the tokenizer's, the chat template's, and the model's `own`; ascending."""
    ends = {tokenizer.eos_token_id, find_turn_end(tokenizer), *(own if isinstance(own, list) else [own])} - {None}
    if not ends:
        raise ConfigError(
            f"Neither the tokenizer of {tokenizer.name_or_path!r} nor the model names an end-of-sequence token; "
            "expected one to end answers with. Set tokenizer.eos_token."
        )
    return sorted(ends)


def build_generation_config(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Greedy search without any penalty, filter or forced token."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = find_end_tokens(tokenizer, own)
    # Padding is masked, so any id does that the embedding has; a tokenizer's own may have been added without a row.
    ids = (tokenizer.pad_token_id, *ends, 0)
    pad = next(each for each in ids if each is not None and each < embedding_rows(model))
    return GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, use_cache=True
    )


@contextmanager
def generation_mode(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and `config` in place of the model's own, which `generate` would fill gaps from."""
    own = model.generation_config
    with evaluation_mode(model):
        model.generation_config = config
        try:
            yield
        finally:
            model.generation_config = own


def cache_argument(model: Any) -> str:
    """transformers renamed `past_key_values` to `cache` in the course of its fifth version."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
