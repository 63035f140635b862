"""Batched greedy generation for evaluation: the same settings for every model, and a shared prefix computed once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from quantkd.data.encoding import check_context
from quantkd.errors import ConfigError
from quantkd.models.generation import build_generation_config, cache_argument, context_length, generation_mode
from quantkd.models.network import base_network

# A shorter prefix saves less than its own forward pass costs.
_MIN_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class Generated:
    """One answer.

    Args:
        index: the position of its prompt in the list that was given.
        text: the answer without special tokens, and without the stop text and what follows it.
        finished: True if the model ended it (end token or stop text), False if the length limit cut it.
        num_tokens: generated tokens, the end token or the tokens of the stop text included.
    """

    index: int
    text: str
    finished: bool
    num_tokens: int


def generate_greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    stop: str | None = None,
    share_prefix: bool = True,
) -> Iterator[list[Generated]]:
    """Answer prompts greedily, longest first, and hand out each batch as it is done.

    The model's own generation settings (sampling, penalties, forced tokens) are set aside, so that two models are
    compared on their distributions alone; only its end tokens are kept, beside the tokenizer's. Batch size, order and
    prefix sharing change results by no more than the rounding of floating-point sums does.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise ConfigError(f"Found batch_size={batch_size}, max_new_tokens={max_new_tokens}; both must be at least 1.")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ConfigError(
            "The model has a prompt-learning adapter; evaluation supports LoRA-like ones. Merge it first."
        )
    network = base_network(model)
    check_context([len(prompt) for prompt in prompts], [max_new_tokens] * len(prompts), context_length(network))
    settings = build_generation_config(network, tokenizer, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    with generation_mode(network, settings):
        prefix = _find_shared_prefix(prompts) if share_prefix and len(prompts) > 1 else []
        cache = _compute_prefix_cache(network, prefix)
        if cache is None:
            prefix = []
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield _generate_batch(network, tokenizer, settings, prompts, indices, prefix, cache, stop)


def _generate_batch(
    network: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    indices: list[int],
    prefix: list[int],
    cache: DynamicCache | None,
    stop: str | None,
) -> list[Generated]:
    """One batch: the shared prefix, padding in the middle, and each answer cut at its end."""
    # Rows are prefix + padding + rest: the prefix must lie at the same slots as in its cache, the end of every prompt
    # at the right edge. `generate` derives positions from the mask, so padding in the middle shifts none of them.
    rests = [list(prompts[index][len(prefix) :]) for index in indices]
    width = max(map(len, rests))
    pad = settings.pad_token_id
    rows = [prefix + [pad] * (width - len(rest)) + rest for rest in rests]
    masks = [[1] * len(prefix) + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests]
    shared: dict[str, Any] = {}
    if cache is not None:
        shared[cache_argument(network)] = copy.deepcopy(cache)
        shared[cache_argument(network)].batch_repeat_interleave(len(rows))
    stopper = _StopText(tokenizer, stop, len(rows[0]), len(rows))
    with torch.inference_mode():
        output: Tensor = network.generate(
            input_ids=torch.tensor(rows, device=network.device),
            attention_mask=torch.tensor(masks, device=network.device),
            generation_config=settings,
            stopping_criteria=[stopper] if stop else None,
            **shared,
        )
    answers = []
    for row, index in enumerate(indices):
        tokens = output[row, len(rows[0]) :].tolist()
        ends = [place for place, token in enumerate(tokens) if token in settings.eos_token_id]
        stopped = stopper.stopped_after[row]
        count = stopped if stopped is not None else ends[0] + 1 if ends else len(tokens)
        text = str(tokenizer.decode(tokens[:count], skip_special_tokens=True))
        text = text.split(stop)[0] if stopped is not None and stop else text
        answers.append(Generated(index, text, stopped is not None or bool(ends), count))
    return answers


class _StopText(StoppingCriteria):
    """Ends each row of a batch where it first writes the stop text, and keeps after how many tokens that was."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str | None, prompt_width: int, num_rows: int) -> None:
        self.tokenizer, self.stop, self.prompt_width = tokenizer, stop or "", prompt_width
        self.stopped_after: list[int | None] = [None] * num_rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        # No token is shorter than a byte, so as many tokens as the text has bytes reach back to its beginning.
        window = max(self.prompt_width, input_ids.shape[1] - len(self.stop.encode()))
        for row, text in enumerate(self.tokenizer.batch_decode(input_ids[:, window:], skip_special_tokens=True)):
            if self.stopped_after[row] is None and self.stop in text:
                self.stopped_after[row] = input_ids.shape[1] - self.prompt_width
        return torch.tensor([after is not None for after in self.stopped_after], device=input_ids.device)


def _find_shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, short enough that each prompt keeps one token of its own."""
    ordered = sorted(map(tuple, prompts))
    first, last = ordered[0], ordered[-1]  # what the extremes of a sorted list share, all between them share
    longest = min(map(len, prompts)) - 1
    length = next((place for place in range(longest) if first[place] != last[place]), longest)
    return list(first[:length]) if length >= _MIN_PREFIX_TOKENS else []


def _compute_prefix_cache(network: Any, prefix: list[int]) -> DynamicCache | None:
    """The key-value cache of the prefix; None where there is no prefix, or a cache that is not one entry a token."""
    if not prefix:
        return None
    cache = DynamicCache(config=network.config.get_text_config())
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    # Logits are of no use here, and over a long prefix they are larger than the cache.
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}
    with torch.inference_mode():
        network(
            input_ids=torch.tensor([prefix], device=network.device),
            use_cache=True,
            **{cache_argument(network): cache},
            **few,
        )
    return cache
