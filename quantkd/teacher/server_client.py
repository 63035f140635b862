"""The HTTP client of the servers: JSON in, JSON out, bounded in time and bytes, and tried again where that can help."""

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
from typing import Any, NoReturn
from urllib.parse import urlsplit

from quantkd.errors import ConfigError, TeacherError

logger = logging.getLogger(__name__)

_API_KEY = "OPENAI_API_KEY"
_MAX_DELAY_SECONDS = 60.0
MAX_BODY_BYTES = 2**28  # 8,192 tokens of 64 candidates each take some 2**25
_MAX_REFUSAL_BYTES = 2**16
_MAX_AGAIN_BYTES = 2**20  # of a body that is not JSON, and is asked for again
_MAX_DETAIL = 500  # characters of a server's own words in an error


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler, urllib.request.HTTPErrorProcessor):
    """Answers that come within the time limit as a whole, with all headers, `100 Continue` and sizes of chunks."""

    def http_response(self, request: Any, response: Any) -> Any:
        """Of any status: a redirect is not followed, which would take the key to another host."""
        return response

    https_response = http_response

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


class ServerClient:
    """Asks a server for JSON, from any thread; the key, of OPENAI_API_KEY alone, is in no error and no log line."""

    # Answers 408, 429 and 5xx, time-outs, broken connections and bodies that are not JSON are tried again, after a
    # pause that doubles each time or that the server names in Retry-After.

    def __init__(self, base_url: str, timeout_seconds: float, max_retries: int, backoff_seconds: float) -> None:
        numbers = {"timeout_seconds": timeout_seconds, "max_retries": max_retries, "backoff_seconds": backoff_seconds}
        for name, value in numbers.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{name} is {value!r:.80}; expected a number of at least 0.")
        try:
            parts = urlsplit(base_url)
        except ValueError as error:
            raise ConfigError(f"base_url {base_url!r} is not an address: {error}.") from error
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
                        "Check that it runs and is not overloaded; the same command resumes a capture."
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
        request, begun = urllib.request.Request(self._root + path, data=data, headers=headers), ""
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                is_refused, begun = response.status >= 300, f"HTTP {response.status} and then "
                answer = _read(response, _MAX_REFUSAL_BYTES if is_refused else MAX_BODY_BYTES)
            if is_refused:
                self._raise_status(response, answer.decode(errors="replace"), path)
            if len(answer) > MAX_BODY_BYTES:
                raise TeacherError(f"{self.where} answered {path} with more than {MAX_BODY_BYTES} bytes.")
            return json.loads(answer)
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise TeacherError(f"{self.where} shows a certificate that is not trusted: {cause}.") from error
            raise _Again(f"{begun}{type(cause).__name__}: {cause}") from error
        except (ValueError, OverflowError) as error:
            if not begun:
                advice = "Check base_url, and that timeout_seconds is a number above 0"
                raise ConfigError(f"{self.where} cannot be asked for {path} ({error}). {advice}.") from error
            if len(answer) > _MAX_AGAIN_BYTES:
                raise TeacherError(
                    f"{self.where} answered {path} with {len(answer)} bytes that are not JSON. Check base_url."
                ) from error
            raise _Again(f"a body that is not JSON ({error})") from error
        except RecursionError as error:
            raise TeacherError(f"{self.where} answered {path} with JSON that is nested too deeply.") from error

    def _raise_status(self, response: Any, detail: str, path: str) -> NoReturn:
        code: int = response.status
        if self._api_key:
            detail = detail.replace(self._api_key, "***")
        detail = " ".join(detail.split())[:_MAX_DETAIL]
        if code in (408, 429) or code >= 500:
            pause = response.headers.get("Retry-After") or ""
            raise _Again(f"HTTP {code} {detail}", float(pause) if pause.isdecimal() else 0.0)
        advice = "Change what was asked for, or the server's settings"
        if code < 400:
            advice = "It redirects, which is not followed; name the final address as base_url"
        elif "logprobs" in detail:
            advice = "Raise the server's limit (vLLM: --max-logprobs), or ask for fewer by --storage or --top_logprobs"
        elif code in (401, 403):
            advice = f"Set {_API_KEY}"
        elif code == 404:
            advice = "Check base_url, and that the server speaks the OpenAI API"
        raise TeacherError(f"{self.where} refused {path} with HTTP {code}: {detail or 'no reason'}. {advice}.")


class _Again(Exception):
    """A fault that may pass."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
