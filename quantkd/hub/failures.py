"""What goes wrong between here and the Hub: which failures pass, which stay, and what is said of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from quantkd.errors import HubError, QuantKDError
from quantkd.hub.secrets import find_secrets, redact

# What the next try may not meet again; 412 says that somebody else has committed since.
_TRANSIENT = (408, 409, 412, 425, 429)
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0
# The base of whatever HTTP library the Hub's client has in this version.
_HTTP_ERRORS = tuple(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


class TransientHubError(HubError):
    """A failure that the next try may not meet: too many requests, a server's fault, a broken connection."""


class OfflineHubError(HubError):
    """HF_HUB_OFFLINE is set, so the Hub is not asked."""


@contextmanager
def hub_errors(what: str, token: str | None = None, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what the Hub's client raises into a HubError that holds no secret."""
    let_through: tuple[type[Exception], ...] = (QuantKDError, *passing)
    try:
        yield
    except let_through:
        raise
    except Exception as error:  # the client wraps some in RuntimeError, and its HTTP library changes between versions
        secrets = find_secrets(token)
        kind, advice = _judge(error)
        reason = " ".join(redact(str(error) or type(error).__name__, secrets).split())
        message = f"Could not {what}: {reason.rstrip('.')}. {advice}"
        # The chain is shown by --traceback, and what holds a secret must not be.
        if any(redact(str(link), secrets) != str(link) for link in _chain(error)):
            raise kind(message) from None
        raise kind(message) from error


def wait_to_retry(failures: int) -> None:
    """Sleep before the next try, longer after each failure in a row."""
    time.sleep(min(_FIRST_WAIT_SECONDS * 2 ** (failures - 1), _LONGEST_WAIT_SECONDS))


def _judge(error: Exception) -> tuple[type[HubError], str]:
    """The kind of a failure, and what to do about it."""
    # Not the context: an earlier error that was handled says nothing of this one.
    chain = _chain(error, with_context=False)
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return OfflineHubError, "Unset HF_HUB_OFFLINE to use the network."
    answers = [getattr(link, "response", None) for link in chain if isinstance(link, HfHubHTTPError)]
    status = next((int(answer.status_code) for answer in answers if answer is not None), None)
    if status is None:  # no answer: broken below HTTP, or one that the client could not read
        passes = any(isinstance(link, (ConnectionError, TimeoutError, *_HTTP_ERRORS)) for link in chain)
    else:
        passes = status in _TRANSIENT or status >= 500
    if passes:
        return TransientHubError, "Check the network, or try again in a while."
    return HubError, "Check the name, the revision and the token's permissions (`hf auth whoami`)."


def _chain(error: BaseException, *, with_context: bool = True) -> list[BaseException]:
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or (link.__context__ if with_context else None)
    return links
