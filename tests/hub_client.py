"""The real huggingface_hub client, turned to the small Hub of fake_hub.py."""

from __future__ import annotations

import time
from typing import Any

from fake_hub import TOKEN, FakeHub


class Killed(BaseException):
    """Stands for the end of the pushing process: nothing may catch it, and nothing is sent after it."""


def connect(hub: FakeHub, monkeypatch: Any, cache: Any, *, seconds: float | None = None) -> None:
    """Let huggingface_hub, which read its environment long ago, talk to this Hub, and not sleep between its tries."""
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    from quantkd import remote

    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "no-token"),
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)  # the instance behind `file_exists`, which PEFT calls
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for module in (_http, file_download, remote):
        monkeypatch.setattr(module, "time", _Sleepless())
    plain = _http.default_client_factory()

    class Client(type(plain)):  # type: ignore[misc]
        """The client's own, with a time limit, and an end to everything once it is killed."""

        def send(self, request: Any, **kwargs: Any) -> Any:
            if hub.killed:
                raise Killed
            try:
                return super().send(request, **kwargs)
            finally:
                if hub.killed:
                    raise Killed

    plain.close()
    huggingface_hub.set_client_factory(
        lambda: Client(
            event_hooks={"request": [_http.hf_request_event_hook]},
            follow_redirects=True,
            timeout=seconds,
            trust_env=False,
        )
    )


def disconnect() -> None:
    """Give the client its own factory back."""
    import huggingface_hub
    from huggingface_hub.utils import _http

    huggingface_hub.set_client_factory(_http.default_client_factory)


class _Sleepless:
    """The time module, without the waiting."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        return None
