"""A model's name: a folder here, or a repository on the Hub, and what to say when it is neither."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkd.errors import ConfigError


def short_name(name_or_path: str) -> str:
    """The name without the path: where a local folder lies is its owner's business, and its name says enough."""
    path = Path(name_or_path)
    return path.resolve().name if path.is_dir() else name_or_path


def refuse_adapter(name_or_path: str, **model_init_kwargs: Any) -> None:
    """Refuse an adapter where a model is expected: transformers would load the base model that its author names."""
    from transformers import CONFIG_NAME
    from transformers.utils.hub import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    where = {key: model_init_kwargs[key] for key in ("revision", "token", "cache_dir") if key in model_init_kwargs}
    if find_adapter_config_file(name_or_path, **where) is None:
        return
    missing = cached_file(name_or_path, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **where) is None
    if missing:
        raise ConfigError(
            f"{name_or_path} holds an adapter and no model; expected the model that it belongs to. Name that here, and "
            "the adapter as --adapter, or with `quantkd.hub.load_adapter(model, ...)`."
        )


@contextmanager
def naming(name_or_path: str, file: str = "config.json") -> Iterator[None]:
    """Turn what transformers and PEFT say of a model that they cannot find into one line that names it."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        if not (path / file).is_file():
            raise ConfigError(
                f"{name_or_path} holds no {file}; expected a folder that `save_pretrained` wrote, or a name on the Hub."
            )
    elif name_or_path.startswith(("/", "./", "../", "~")) or not name_or_path:
        raise ConfigError(f"There is no folder {name_or_path!r}. Give a checkpoint folder, or a name on the Hub.")
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{name_or_path!r} could not be loaded, neither as a folder here nor from the Hub. Check the name, the "
            f"revision and the network. ({reason})"
        ) from error
