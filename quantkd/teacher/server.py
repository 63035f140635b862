"""The server teacher: an inference server that gives token ids with log-probabilities, asked over HTTP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from quantkd.data.encoding import EncodedPrompt
from quantkd.errors import ConfigError, TeacherError
from quantkd.teacher.logprobs import (
    build_row,
    check_rule,
    check_temperature_one,
    count_entries,
    end_tokens,
    locate_targets,
    seed_of,
)
from quantkd.teacher.server_client import ServerClient
from quantkd.teacher.server_dialects import DIALECTS, Answer, Completion, Dialect
from quantkd.teacher.teacher import GenerationSettings, Teacher
from quantkd.transfer_set import TransferRow
from quantkd.transfer_set.fingerprint import count_token_ids
from quantkd.transfer_set.rules import StorageRule

logger = logging.getLogger(__name__)

# `owned_by` of the model's card at /v1/models.
_OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
_ENGINE = "The server"

T = TypeVar("T")


class ServerTeacher(Teacher):
    """A model behind vLLM's, SGLang's or llama.cpp's server, or one that answers as vLLM's does.

    Prompts and answers pass as token ids. Each prompt is a request of its own; the server batches them. Log-
    probabilities may differ in the last bits from one run to another; shards that are committed stay as they are.
    Neither the address nor the key in the environment variable OPENAI_API_KEY is ever stored.

    Args:
        base_url: the server's address, such as "http://127.0.0.1:8000/v1".
        model_name: the model's name as the server has it.
        tokenizer: the teacher's tokenizer.
        rule: which entries to keep, `TopK` or `Nucleus`.
        temperatures: (1.0,); a server gives log-probabilities, and other temperatures need all logits.
        settings: how it answers.
        dialect: "vllm", "sglang" or "llama.cpp"; by what the server says about itself if None.
        vocab_size: the width of the teacher's logits; that of the model's config beside the tokenizer if None, or
            the tokenizer's own.
        dtype: the dtype that the server runs the model in, as a note in the set; "" if it is not known.
        concurrency: requests under way at once.
        timeout_seconds: how long one answer may take.
        max_retries: how often a request is tried again.
        backoff_seconds: the first pause before that; it doubles each time.

    Raises:
        ConfigError: a rule, temperature or setting that the server cannot give, or another model than it serves.
        TeacherError: a server that does not answer, or not with token ids and as many log-probabilities as needed.

    Example:
        ServerTeacher("http://127.0.0.1:8000/v1", "SmolLM2", tokenizer, Nucleus(0.95), (1.0,), GenerationSettings())
    """

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
        dialect: str | None = None,
        vocab_size: int | None = None,
        dtype: str = "",
        concurrency: int = 32,
        timeout_seconds: float = 600,
        max_retries: int = 8,
        backoff_seconds: float = 0.5,
    ) -> None:
        check_rule(rule, _ENGINE)
        check_temperature_one(temperatures, _ENGINE)
        if dialect is not None and dialect not in DIALECTS:
            raise ConfigError(f"dialect is one of {', '.join(DIALECTS)}, found {dialect!r}.")
        if concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, found {concurrency}.")
        width, own_ends = _read_config(tokenizer)
        self.head_size = vocab_size or width
        # Rows that pad the head beyond the tokenizer count to the tail.
        ids = min(self.head_size, count_token_ids(tokenizer))
        super().__init__(model_name, tokenizer, rule, temperatures, settings, vocab_size=ids, dtype=dtype)
        self.width = count_entries(rule, ids)
        self.ends = end_tokens(tokenizer, own_ends)
        self._concurrency = concurrency
        self._client = ServerClient(
            base_url, timeout_seconds=timeout_seconds, max_retries=max_retries, backoff_seconds=backoff_seconds
        )
        card = self._find_model()
        self.max_context = card.get("max_model_len") or (card.get("meta") or {}).get("n_ctx_train")
        self._dialect: Dialect = DIALECTS[dialect or _OWNERS.get(str(card.get("owned_by")), "vllm")]
        self._dialect.check(settings)
        # One token, before any work is spent: does it give ids, and as many log-probabilities as the rule needs?
        probe = EncodedPrompt(0, tokenizer.encode("1 2 3"))
        self._answer(probe, GenerationSettings(max_new_tokens=1))

    def describe(self) -> dict[str, Any]:
        """The engine."""
        return {"engine": "server"}

    def answer(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """Ask for one answer a prompt, `concurrency` at once, with the entries of each token."""
        return self._map(lambda prompt: self._answer(prompt, self.settings), prompts)

    def score(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """Ask for the entries at every supervised token of given answers."""
        return self._map(self._score, prompts)

    def _find_model(self) -> dict[str, Any]:
        """The model's card, refused if the server has no such model."""
        body = self._client.request("/v1/models", max_retries=2)
        cards = self._parse(lambda: [dict(card) for card in body["data"]], "/v1/models")
        for card in cards:
            if card.get("id") == self.name:
                return card
        names = ", ".join(repr(card.get("id")) for card in cards[:8]) or "none"
        raise ConfigError(
            f"{self._client.where} serves {names}, and {self.name!r} was asked for. Name one of those, or start the "
            "server with that name (vLLM and SGLang: --served-model-name, llama.cpp: --alias)."
        )

    def _answer(self, prompt: EncodedPrompt, settings: GenerationSettings) -> TransferRow:
        path, body = self._dialect.ask(self._completion(prompt, prompt.prompt_ids, settings))
        response = self._client.request(path, body)
        answer: Answer = self._parse(lambda: self._dialect.read(response), path)
        tokens, reason = answer.token_ids, answer.reason
        ends = [place for place, token in enumerate(tokens) if token in self.ends]
        if ends:  # a server may go on to an end token of its own
            tokens, reason = tokens[: ends[0] + 1], "end"
        if not tokens or reason == "stop":
            raise TeacherError(
                f"{self._client.where} ended the answer to prompt {prompt.index} without one of the end tokens "
                f"{self.ends}, so its distribution at the end is not known. Start the server without stop strings, "
                "and with the checkpoint's own end tokens."
            )
        places = [place for place in answer.places if place < len(tokens)]
        if not places:
            raise TeacherError(f"{self._client.where} gave no log-probabilities for prompt {prompt.index}.")
        if len(places) < len(tokens):
            logger.warning(
                "%s gave no log-probabilities for %d of %d tokens of the answer to prompt %d; these are left out of "
                "the targets.", self._client.where, len(tokens) - len(places), len(tokens), prompt.index,
            )  # fmt: skip
        return self._row(
            prompt.index,
            prompt.prompt_ids + tokens,
            _spans(np.asarray(places, dtype=np.int64) + len(prompt.prompt_ids)),
            answer.candidates.select(np.arange(len(places))),
            finished=reason == "end",
        )

    def _score(self, prompt: EncodedPrompt) -> TransferRow:
        """The last token's entries are those of the one token that is generated after all before it."""
        sequence, spans = locate_targets(prompt)
        completion = self._completion(prompt, sequence[:-1], self.settings)
        path, body = self._dialect.ask_score(completion, int(spans[0, 0]))
        response = self._client.request(path, body)
        candidates = self._parse(lambda: self._dialect.read_score(response, completion), path)
        places = np.concatenate([np.arange(start, stop) for start, stop in spans])
        return self._row(prompt.index, sequence, spans, candidates.select(places), finished=sequence[-1] in self.ends)

    def _completion(self, prompt: EncodedPrompt, prompt_ids: list[int], settings: GenerationSettings) -> Completion:
        seed = seed_of(self.settings.seed, prompt.index)
        return Completion(self.name, prompt_ids, self.width, settings, seed, self.ends)

    def _row(self, index: int, sequence: list[int], spans: Any, candidates: Any, finished: bool) -> TransferRow:
        return build_row(
            index, sequence, spans, candidates, self.rule, self.vocab_size,
            finished=finished, engine=_ENGINE, head_size=self.head_size,
        )  # fmt: skip

    def _parse(self, read: Callable[[], T], path: str) -> T:
        """Answers of another shape than the dialect's become one line."""
        try:
            return read()
        except TeacherError as error:
            raise TeacherError(
                f"{self._client.where} cannot be a teacher: {error}. Take a server that gives token ids with "
                "log-probabilities: vLLM's, SGLang's or llama.cpp's."
            ) from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise TeacherError(
                f"{self._client.where} answered {path} in another shape than expected "
                f"({type(error).__name__}: {error}). Name what it is with dialect ({', '.join(DIALECTS)})."
            ) from error

    def _map(
        self, function: Callable[[EncodedPrompt], TransferRow], prompts: Sequence[EncodedPrompt]
    ) -> list[TransferRow]:
        with ThreadPoolExecutor(min(self._concurrency, max(len(prompts), 1)), "server-teacher") as pool:
            futures = [pool.submit(function, prompt) for prompt in prompts]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # one failed: do not start those that wait
                raise


def _read_config(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int | list[int] | None]:
    """V and the end tokens of the checkpoint that the tokenizer came from, as far as it has configs."""
    try:
        config = AutoConfig.from_pretrained(tokenizer.name_or_path).get_text_config()
    except (OSError, ValueError):  # a tokenizer alone; the model lies with the server
        logger.warning(
            "No config of the teacher lies beside its tokenizer; taking the tokenizer's size, %d, as the width of its "
            "logits. If they are padded beyond that, name their width with vocab_size.", len(tokenizer),
        )  # fmt: skip
        return len(tokenizer), None
    try:
        generation = GenerationConfig.from_pretrained(tokenizer.name_or_path)
    except OSError:  # a checkpoint without one; its config names the end tokens
        generation = GenerationConfig.from_model_config(config)
    return int(config.vocab_size), generation.eos_token_id


def _spans(places: Any) -> Any:
    """(S, 2) runs of neighbours among ascending places."""
    breaks = np.flatnonzero(np.diff(places) != 1)
    starts, stops = places[np.append(0, breaks + 1)], places[np.append(breaks, len(places) - 1)] + 1
    return np.stack([starts, stops], axis=1)
