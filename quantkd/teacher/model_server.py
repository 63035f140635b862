"""A model behind an inference server: its card, and the log-probabilities that it gives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from quantkd.errors import ConfigError, TeacherError
from quantkd.names import public_name
from quantkd.teacher.logprobs import TopLogprobs
from quantkd.teacher.server_client import ServerClient
from quantkd.teacher.server_dialects import DIALECTS, Answer, Completion, Dialect
from quantkd.teacher.teacher import GenerationSettings

# `owned_by` of the model's card at /v1/models.
_OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
_ONE_TOKEN = GenerationSettings(max_new_tokens=1)
_WIDER = 16  # times as many candidates, where one that is needed is not among them
_MAX_FORCED = 32


class ModelServer:
    """One model of a server, asked in the server's own way."""

    def __init__(
        self,
        base_url: str,
        model_name: str | None = None,  # the only one that it serves if None
        *,
        dialect: str | None = None,
        vocab_size: int | None = None,  # the width of its logits, where they are padded and its card does not say
        timeout_seconds: float = 600,
        max_retries: int = 8,
        backoff_seconds: float = 0.5,
    ) -> None:
        if dialect is not None and dialect not in DIALECTS:
            raise ConfigError(f"dialect is one of {', '.join(DIALECTS)}, found {dialect!r}.")
        if vocab_size is not None and _whole(vocab_size, 2**31) is None:
            raise ConfigError(f"vocab_size is {vocab_size!r:.80}; expected a whole number from 1 to {2**31 - 1}.")
        self._client = ServerClient(base_url, timeout_seconds, max_retries, backoff_seconds)
        self.where = self._client.where
        card = self._find_model(model_name)
        meta: Any = card["meta"] if isinstance(card.get("meta"), dict) else {}
        self.name, self.kind = str(card["id"]), dialect or _OWNERS.get(str(card.get("owned_by")), "vllm")
        self.dialect: Dialect = DIALECTS[self.kind]
        given = {**meta, "max_model_len": card.get("max_model_len")}
        contexts = [_whole(given.get(key), 2**31) for key in ("max_model_len", "n_ctx", "n_ctx_train")]
        self.max_context = next((each for each in contexts if each), None)
        self.vocab_size = vocab_size or _whole(given.get("n_vocab"), 2**31)
        self.size_bytes = _whole(given.get("size"), 2**53)

    def ask(self, completion: Completion) -> Answer:
        """Tokens and candidates; answers of another shape than the dialect's become one line."""
        path, body = self.dialect.ask(completion)
        response = self._client.request(path, body)
        answer: Answer = self._parse(path, lambda: self.dialect.read(response, completion))
        return answer

    def score(
        self, sequence: list[int], places: Sequence[int], width: int, needed: Sequence[Collection[int]] | None = None
    ) -> TopLogprobs:
        """The candidates for the tokens of a sequence at `places`: all by one request, or one token after the other."""
        if self.dialect.scores_prompts:
            answer = self.ask(Completion(self.name, sequence[:-1], width, _ONE_TOKEN, score_from=places[0]))
            return answer.candidates.select(places)  # the last token is generated after all before it
        wanted = needed or [()] * len(places)
        pairs = zip(places, wanted, strict=True)
        return TopLogprobs.join([self._score_next(sequence[:place], width, ids) for place, ids in pairs])

    def limit_concurrency(self, concurrency: int) -> int:
        """How many sequences are scored at once: one where each token goes on from the prompt before it."""
        return concurrency if self.dialect.scores_prompts else 1

    def _score_next(self, prompt: list[int], width: int, needed: Collection[int]) -> TopLogprobs:
        """The candidates after a prompt, as many as it takes until all that are needed are among them."""
        asked = Completion(self.name, prompt, width, _ONE_TOKEN, is_cached=True)
        while True:
            # A token that ends inside a character comes without candidates, so another one is drawn in its place.
            for forced in (None, *list(dict.fromkeys(prompt))[:_MAX_FORCED]):
                found = self.ask(replace(asked, forced=forced)).candidates
                if len(found.token_ids):
                    break
            else:
                raise TeacherError(f"{self.where} gave no log-probabilities after {len(prompt)} tokens of a row.")
            if {*found.token_ids.tolist()}.issuperset(needed) or len(found.token_ids) < asked.width:
                return found
            asked = replace(asked, width=_WIDER * asked.width)

    def _find_model(self, name: str | None) -> dict[str, Any]:
        """The model's card, refused if the server has no such model."""
        body = self._client.request("/v1/models", max_retries=2)
        cards: list[dict[str, Any]] = self._parse("/v1/models", lambda: [dict(card) for card in body["data"]])
        fitting = [card for card in cards if name in (None, card.get("id")) and isinstance(card.get("id"), str)]
        fitting = [card for card in fitting if public_name(card["id"]).strip()]
        if len(fitting) == 1 or (fitting and name is not None):
            return fitting[0]
        names = ", ".join(f"{card.get('id')!r:.80}" for card in cards[:8]) or "none"
        asked = "no name was given" if name is None else f"{name!r} was asked for"
        raise ConfigError(
            f"{self.where} serves {names}, and {asked}. Name one of those, or start the "
            "server with that name (vLLM and SGLang: --served-model-name, llama.cpp: --alias)."
        )

    def _parse(self, path: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except TeacherError as error:
            raise TeacherError(
                f"{self.where} gives no usable log-probabilities: {error}. Use a server that gives token ids with "
                "log-probabilities: vLLM's, SGLang's or llama.cpp's."
            ) from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise TeacherError(
                f"{self.where} answered {path} in another shape than expected "
                f"({type(error).__name__}: {error}). Name what it is with dialect ({', '.join(DIALECTS)})."
            ) from error


@contextmanager
def naming_engine_kwargs() -> Iterator[None]:
    """Say of an argument that a server does not take where it came from."""
    try:
        yield
    except TypeError as error:
        raise ConfigError(f"engine_kwargs: {error}. docs/engines.md lists what they may be.") from error


def _whole(value: Any, limit: int) -> int | None:
    """A positive number below the limit; None, as if it were not said, of anything else."""
    return value if type(value) is int and 0 < value < limit else None
