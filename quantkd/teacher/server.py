"""The server teacher: an inference server that gives token ids with log-probabilities, asked over HTTP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from quantkd.data.encoding import EncodedPrompt
from quantkd.errors import ConfigError, TeacherError
from quantkd.models.generation import find_end_tokens
from quantkd.teacher.logprobs import RowBuilder, check_rule
from quantkd.teacher.model_server import ModelServer
from quantkd.teacher.server_dialects import Completion
from quantkd.teacher.teacher import GenerationSettings, Teacher, locate_targets, seed_of
from quantkd.transfer_set import TransferRow
from quantkd.transfer_set.fingerprint import count_token_ids
from quantkd.transfer_set.rules import StorageRule

logger = logging.getLogger(__name__)

_ENGINE = "The server"


class ServerTeacher(Teacher):
    """A model behind vLLM's, SGLang's or llama.cpp's server, or one that answers as vLLM's does (docs/engines.md).

    `server_kwargs` are `dialect`, `timeout_seconds`, `max_retries` and `backoff_seconds`.
    """

    # Prompts and answers pass as token ids; each prompt is a request of its own, and the server batches them.
    # Neither the address nor the key in the environment variable OPENAI_API_KEY is ever stored.
    preferred_batch_size = 256

    def __init__(
        self,
        base_url: str,
        model_name: str,
        tokenizer: PreTrainedTokenizerBase,
        rule: StorageRule,
        temperatures: Sequence[float],
        settings: GenerationSettings,
        *,
        vocab_size: int | None = None,
        dtype: str = "",
        concurrency: int = 32,
        **server_kwargs: Any,
    ) -> None:
        top_rule = check_rule(rule, temperatures, _ENGINE)
        if concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, found {concurrency}.")
        width, own_ends = _read_config(tokenizer)
        width = vocab_size or width
        # Rows that pad the head beyond the tokenizer count to the tail.
        ids = min(width, count_token_ids(tokenizer))
        super().__init__(model_name, tokenizer, rule, temperatures, settings, vocab_size=ids, dtype=dtype)
        self.rows = RowBuilder(_ENGINE, top_rule, ids, width)
        self.ends = find_end_tokens(tokenizer, own_ends)
        self._concurrency = concurrency
        self._server = ModelServer(base_url, model_name, **server_kwargs)
        self.max_context = self._server.max_context
        self._server.dialect.check(settings)
        # One token, before any work is spent: does it give ids, and as many log-probabilities as the rule needs?
        self._answer(EncodedPrompt(0, tokenizer.encode("1 2 3")), GenerationSettings(max_new_tokens=1))

    def describe(self) -> dict[str, Any]:
        """The engine."""
        return {"engine": "server"}

    def answer(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """Ask for one answer per prompt, `concurrency` at once, with the entries of each token."""
        return _map(lambda prompt: self._answer(prompt, self.settings), prompts, self._concurrency)

    def score(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """Ask for the entries at every supervised token of given answers."""
        return _map(self._score, prompts, self._server.limit_concurrency(self._concurrency))

    def _answer(self, prompt: EncodedPrompt, settings: GenerationSettings) -> TransferRow:
        seed = seed_of(self.settings.seed, prompt.index)
        asked = Completion(self.name, prompt.prompt_ids, self.rows.width, settings, seed, self.ends)
        answer = self._server.ask(asked)
        tokens, reason = answer.token_ids, answer.reason
        ends = [place for place, token in enumerate(tokens) if token in self.ends]
        if ends:  # a server may go on to an end token of its own
            tokens, reason = tokens[: ends[0] + 1], "end"
        if len(tokens) > settings.max_new_tokens:
            raise TeacherError(
                f"{self._server.where} gave {len(tokens)} tokens for prompt {prompt.index}, and at most "
                f"{settings.max_new_tokens} were asked for. Look at the server's settings."
            )
        if not tokens or reason == "stop":
            raise TeacherError(
                f"{self._server.where} ended the answer to prompt {prompt.index} without one of the end tokens "
                f"{self.ends}. Start the server without stop strings, and with the checkpoint's own end tokens."
            )
        places = np.asarray([place for place in answer.places if place < len(tokens)], dtype=np.int64)
        if not len(places):
            raise TeacherError(f"{self._server.where} gave no log-probabilities for prompt {prompt.index}.")
        if len(places) < len(tokens):
            message = "No log-probabilities for %d of %d tokens of the answer to prompt %d, left out of the targets."
            logger.warning(message, len(tokens) - len(places), len(tokens), prompt.index)
        candidates = answer.candidates.select(np.arange(len(places)))
        runs = np.split(places + len(prompt.prompt_ids), np.flatnonzero(np.diff(places) != 1) + 1)
        spans = np.asarray([(run[0], run[-1] + 1) for run in runs])
        return self.rows.build(prompt.index, prompt.prompt_ids + tokens, spans, candidates, finished=reason == "end")

    def _score(self, prompt: EncodedPrompt) -> TransferRow:
        sequence, spans, places = locate_targets(prompt)
        candidates = self._server.score(sequence, places, self.rows.width)
        return self.rows.build(prompt.index, sequence, spans, candidates, finished=sequence[-1] in self.ends)


def _map(
    make: Callable[[EncodedPrompt], TransferRow], prompts: Sequence[EncodedPrompt], most: int
) -> list[TransferRow]:
    with ThreadPoolExecutor(most, "server-teacher") as pool:  # which starts no more threads than there are prompts
        return list(pool.map(make, prompts))  # where one fails, those that wait are not started


def _read_config(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int | list[int] | None]:
    """V and the end tokens of the checkpoint that the tokenizer came from, as far as it has configs."""
    try:
        config = AutoConfig.from_pretrained(tokenizer.name_or_path).get_text_config()
    except (OSError, ValueError):  # a tokenizer alone; the server has the model
        message = "The tokenizer has no model's config beside it; taking its size, %d, as the width of the logits. "
        logger.warning(message + "If they are padded beyond that, name their width with vocab_size.", len(tokenizer))
        return len(tokenizer), None
    try:
        generation = GenerationConfig.from_pretrained(tokenizer.name_or_path)
    except OSError:  # a checkpoint without one; its config names the end tokens
        generation = GenerationConfig.from_model_config(config)
    return int(config.vocab_size), generation.eos_token_id
