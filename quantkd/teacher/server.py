"""The server teacher: an inference server that gives token ids with log-probabilities, asked over HTTP."""

from __future__ import annotations

import http.client
import io
import itertools
import json
import logging
import os
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from quantkd.data.encoding import EncodedPrompt
from quantkd.errors import ConfigError, TeacherError
from quantkd.models.generation import find_end_tokens
from quantkd.teacher.logprobs import RowBuilder, check_rule, locate_targets, seed_of
from quantkd.teacher.server_dialects import DIALECTS, Answer, Completion, Dialect
from quantkd.teacher.teacher import GenerationSettings, Teacher
from quantkd.transfer_set import TransferRow
from quantkd.transfer_set.fingerprint import count_token_ids
from quantkd.transfer_set.rules import StorageRule

logger = logging.getLogger(__name__)

# `owned_by` of the model's card at /v1/models.
_OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
_ENGINE = "The server"
_API_KEY = "OPENAI_API_KEY"
_MAX_DELAY_SECONDS = 60.0
MAX_BODY_BYTES = 2**28  # 8,192 tokens of 64 candidates each take some 2**25
_MAX_DETAIL = 500  # characters of a server's own words in an error


class ServerTeacher(Teacher):
    """A model behind vLLM's, SGLang's or llama.cpp's server, or one that answers as vLLM's does (docs/engines.md)."""

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
        dialect: str | None = None,
        vocab_size: int | None = None,
        dtype: str = "",
        concurrency: int = 32,
        timeout_seconds: float = 600,
        max_retries: int = 8,
        backoff_seconds: float = 0.5,
    ) -> None:
        top_rule = check_rule(rule, temperatures, _ENGINE)
        if dialect is not None and dialect not in DIALECTS:
            raise ConfigError(f"dialect is one of {', '.join(DIALECTS)}, found {dialect!r}.")
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
        self._client = _Client(base_url, timeout_seconds, max_retries, backoff_seconds)
        card = self._find_model()
        meta = card.get("meta")
        context = card.get("max_model_len") or (meta.get("n_ctx_train") if isinstance(meta, dict) else None)
        self.max_context = context if type(context) is int and context > 0 else None
        self._dialect: Dialect = DIALECTS[dialect or _OWNERS.get(str(card.get("owned_by")), "vllm")]
        self._dialect.check(settings)
        # One token, before any work is spent: does it give ids, and as many log-probabilities as the rule needs?
        self._answer(EncodedPrompt(0, tokenizer.encode("1 2 3")), GenerationSettings(max_new_tokens=1))

    def describe(self) -> dict[str, Any]:
        """The engine."""
        return {"engine": "server"}

    def answer(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """Ask for one answer per prompt, `concurrency` at once, with the entries of each token."""
        return self._map(lambda prompt: self._answer(prompt, self.settings), prompts)

    def score(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """Ask for the entries at every supervised token of given answers."""
        return self._map(self._score, prompts)

    def _find_model(self) -> dict[str, Any]:
        """The model's card, refused if the server has no such model."""
        body = self._client.request("/v1/models", max_retries=2)
        cards: list[dict[str, Any]] = self._parse("/v1/models", lambda: [dict(card) for card in body["data"]])
        for card in cards:
            if card.get("id") == self.name:
                return card
        names = ", ".join(f"{card.get('id')!r:.80}" for card in cards[:8]) or "none"
        raise ConfigError(
            f"{self._client.where} serves {names}, and {self.name!r} was asked for. Name one of those, or start the "
            "server with that name (vLLM and SGLang: --served-model-name, llama.cpp: --alias)."
        )

    def _ask(
        self, prompt: EncodedPrompt, ids: list[int], settings: GenerationSettings, score_from: int | None = None
    ) -> Answer:
        seed = seed_of(self.settings.seed, prompt.index)
        completion = Completion(self.name, ids, self.rows.width, settings, seed, self.ends, score_from)
        path, body = self._dialect.ask(completion)
        response = self._client.request(path, body)
        answer: Answer = self._parse(path, lambda: self._dialect.read(response, completion))
        return answer

    def _answer(self, prompt: EncodedPrompt, settings: GenerationSettings) -> TransferRow:
        answer = self._ask(prompt, prompt.prompt_ids, settings)
        tokens, reason = answer.token_ids, answer.reason
        ends = [place for place, token in enumerate(tokens) if token in self.ends]
        if ends:  # a server may go on to an end token of its own
            tokens, reason = tokens[: ends[0] + 1], "end"
        if len(tokens) > settings.max_new_tokens:
            raise TeacherError(
                f"{self._client.where} gave {len(tokens)} tokens for prompt {prompt.index}, and at most "
                f"{settings.max_new_tokens} were asked for. Look at the server's settings."
            )
        if not tokens or reason == "stop":
            raise TeacherError(
                f"{self._client.where} ended the answer to prompt {prompt.index} without one of the end tokens "
                f"{self.ends}. Start the server without stop strings, and with the checkpoint's own end tokens."
            )
        places = np.asarray([place for place in answer.places if place < len(tokens)], dtype=np.int64)
        if not len(places):
            raise TeacherError(f"{self._client.where} gave no log-probabilities for prompt {prompt.index}.")
        if len(places) < len(tokens):
            message = "No log-probabilities for %d of %d tokens of the answer to prompt %d, left out of the targets."
            logger.warning(message, len(tokens) - len(places), len(tokens), prompt.index)
        breaks, places = np.flatnonzero(np.diff(places) != 1), places + len(prompt.prompt_ids)
        starts, stops = places[np.append(0, breaks + 1)], places[np.append(breaks, len(places) - 1)] + 1
        candidates = answer.candidates.select(np.arange(len(places)))
        spans = np.stack([starts, stops], axis=1)
        return self.rows.build(prompt.index, prompt.prompt_ids + tokens, spans, candidates, finished=reason == "end")

    def _score(self, prompt: EncodedPrompt) -> TransferRow:
        """The last token's entries are those of the one token that is generated after all before it."""
        sequence, spans = locate_targets(prompt)
        answer = self._ask(prompt, sequence[:-1], GenerationSettings(max_new_tokens=1), score_from=int(spans[0, 0]))
        candidates = answer.candidates.select(np.concatenate([np.arange(start, stop) for start, stop in spans]))
        return self.rows.build(prompt.index, sequence, spans, candidates, finished=sequence[-1] in self.ends)

    def _parse(self, path: str, read: Callable[[], Any]) -> Any:
        """Answers of another shape than the dialect's become one line."""
        try:
            return read()
        except TeacherError as error:
            raise TeacherError(
                f"{self._client.where} cannot be a teacher: {error}. Use a server that gives token ids with "
                "log-probabilities: vLLM's, SGLang's or llama.cpp's."
            ) from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise TeacherError(
                f"{self._client.where} answered {path} in another shape than expected "
                f"({type(error).__name__}: {error}). Name what it is with dialect ({', '.join(DIALECTS)})."
            ) from error

    def _map(
        self, function: Callable[[EncodedPrompt], TransferRow], prompts: Sequence[EncodedPrompt]
    ) -> list[TransferRow]:
        with ThreadPoolExecutor(min(self._concurrency, max(len(prompts), 1)), "server-teacher") as pool:
            return list(pool.map(function, prompts))  # where one fails, those that wait are not started


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


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler, urllib.request.HTTPRedirectHandler):
    """Answers that come within the time limit as a whole, with all headers, `100 Continue` and sizes of chunks."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none, which would take the key to another host: urllib then raises the answer as an error."""

    def do_open(self, http_class: Any, req: Any, **kwargs: Any) -> Any:
        """As urllib does, whose time limit is for each wait."""
        timed: Any = type("Timed", (http_class,), {"response_class": _Response})
        return super().do_open(timed, req, **kwargs)


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp: Any = io.BufferedReader(_Bounded(sock, self.fp.detach()))


class _Bounded(io.RawIOBase):
    """What a socket receives until its time limit, counted from now, is over."""

    def __init__(self, sock: Any, raw: io.RawIOBase) -> None:
        self._sock, self._raw, self._deadline = sock, raw, time.monotonic() + sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if (left := self._deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out before the answer's end")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _read(response: Any, limit: int) -> bytes:
    """The body, or a little more than `limit` bytes of it."""
    body = bytearray()
    while len(body) <= limit and (part := response.read1(2**16)):
        body += part
    if response.length and len(body) <= limit:
        raise http.client.IncompleteRead(bytes(body), response.length)
    return bytes(body)


class _Client:
    """Asks a server for JSON, from any thread; the key, of OPENAI_API_KEY alone, is in no error and no log line."""

    # Answers 408, 429 and 5xx, time-outs, broken connections and bodies that are not JSON are tried again, after a
    # pause that doubles each time or that the server names in Retry-After.

    def __init__(self, base_url: str, timeout_seconds: float, max_retries: int, backoff_seconds: float) -> None:
        parts = urlsplit(base_url)
        if parts.username is not None or parts.password is not None:
            raise ConfigError(f"base_url must not carry a name or a password; put the key into {_API_KEY}.")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"base_url is an address such as http://127.0.0.1:8000/v1, found {base_url!r}.")
        self.where = f"The server at {parts.netloc}"
        self._root = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._timeout, self._retries, self._backoff = timeout_seconds, max_retries, backoff_seconds
        self._api_key = os.environ.get(_API_KEY, "").strip()
        if not (self._api_key.isascii() and self._api_key.isprintable()):  # http.client would show it in its error
            raise ConfigError(f"{_API_KEY} holds characters that cannot be sent; expected printable ASCII.")
        self._opener = urllib.request.build_opener(_Handler())

    def request(self, path: str, body: dict[str, Any] | None = None, *, max_retries: int | None = None) -> Any:
        """GET `path`, or POST `body` to it."""
        retries = self._retries if max_retries is None else max_retries
        for attempt in itertools.count():
            try:
                return self._once(path, body)
            except _Again as fault:
                if attempt >= retries:
                    raise TeacherError(
                        f"{self.where} did not answer {path} after {attempt + 1} attempts; the last fault: {fault}. "
                        "Check that it runs and is not overloaded; the same command resumes the capture."
                    ) from fault
                pause = min(self._backoff * 2**attempt, _MAX_DELAY_SECONDS) * random.uniform(0.5, 1)
                pause = max(pause, min(fault.retry_after, _MAX_DELAY_SECONDS))
                logger.info("%s: %s; attempt %d in %.1f s.", self.where, fault, attempt + 2, pause)
                time.sleep(pause)

    def _once(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Accept": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None
        if body is not None:
            headers["Content-Type"], data = "application/json", json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                answer = _read(response, MAX_BODY_BYTES)
            if len(answer) > MAX_BODY_BYTES:
                raise TeacherError(f"{self.where} answered {path} with more than {MAX_BODY_BYTES} bytes.")
            return json.loads(answer)
        except urllib.error.HTTPError as error:
            with error:
                self._raise_status(error, path)
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise TeacherError(f"{self.where} shows a certificate that is not trusted: {cause}.") from error
            raise _Again(f"{type(cause).__name__}: {cause}") from error
        except ValueError as error:
            raise _Again(f"a body that is not JSON ({error})") from error
        except RecursionError as error:
            raise TeacherError(f"{self.where} answered {path} with JSON that is nested too deeply.") from error

    def _raise_status(self, error: urllib.error.HTTPError, path: str) -> NoReturn:
        try:
            detail = _read(error, 2**16).decode(errors="replace")
        except (OSError, http.client.HTTPException) as broken:
            raise _Again(f"HTTP {error.code} and then {type(broken).__name__}") from broken
        if self._api_key:
            detail = detail.replace(self._api_key, "***")
        detail = " ".join(detail.split())[:_MAX_DETAIL]
        if error.code in (408, 429) or error.code >= 500:
            pause = error.headers.get("Retry-After") or ""
            raise _Again(f"HTTP {error.code} {detail}", float(pause) if pause.isdecimal() else 0.0) from error
        advice = {
            401: f"Set {_API_KEY}",
            403: f"Set {_API_KEY}",
            404: "Check base_url, and that the server speaks the OpenAI API",
        }.get(error.code, "Change what was asked for, or the server's settings")
        if "logprobs" in detail:
            advice = "Raise the server's limit (vLLM: --max-logprobs), or choose a smaller storage rule"
        if 300 <= error.code < 400:
            advice = "It redirects, which is not followed; name the final address as base_url"
        raise TeacherError(f"{self.where} refused {path} with HTTP {error.code}: {detail or 'no reason'}. {advice}.")


class _Again(Exception):
    """A fault that may pass."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
