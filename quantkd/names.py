"""Names: what a package exports, and a model's, a folder here or a repository on the Hub, as others may see it."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkd.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__version__ = "0.1.0"

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# "model", "user/model", and either with a revision (@) or a server's tag (:).
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?([@:][\w.-]+)?", re.ASCII)
# What transformers passes on to the Hub's client.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_PATH_STARTS = ("/", "~", "./", "../")


def hub_arguments(model_init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained` that say where on the Hub a model is, and how it is fetched."""
    return {key: value for key, value in model_init_kwargs.items() if key in HUB_ARGUMENTS and value is not None}


def lazy(package: str, exports: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names, by module, are imported when first used."""
    modules = {name: f"{package}.{module}" for module, names in exports.items() for name in names.split()}

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return load, lambda: sorted(modules), sorted(modules)


def public_name(name_or_path: str | os.PathLike[str]) -> str:
    """A name as it is, and of a path the last part, also if the folder is gone or on another machine."""
    name = os.fspath(name_or_path)
    if os.path.isdir(name):  # Path's raises where a name is too long for a file
        return Path(name).resolve().name
    is_path = name.startswith(_PATH_STARTS) or not _NAME.fullmatch(name)
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_path else name


def hide_home(path: str) -> str:
    """A path below the home folder relative to the current folder, so that it still opens; anything else as it is."""
    return os.path.relpath(path) if path.startswith(f"{Path.home()}{os.sep}") else path


def is_repository_name(name: str) -> bool:
    """Whether `name` has the form of a repository's name on the Hub, `user/name`."""
    return _REPOSITORY.fullmatch(name) is not None


def split_revision(place: str, revision: str | None = None) -> tuple[str | None, str | None]:
    """The repository and revision that `user/name` or `user/name@revision` means; None for a path or a folder here."""
    name, mark, behind = place.partition("@")
    if Path(place).exists() or not is_repository_name(name) or (mark and not behind):
        if revision is not None:
            raise ConfigError(f"revision is {revision!r}; only a repository on the Hub has one, and {place} is local.")
        return None, None
    if mark and revision not in (None, behind):
        raise ConfigError(f"{place} names one revision, and revision={revision!r} another. Leave one of them out.")
    return name, behind or revision


def names_gguf(name_or_path: str, gguf_file: str | None = None, **_: Any) -> bool:
    """Whether a GGUF file is the student: named beside a model, or by its own path."""
    return bool(gguf_file) or name_or_path.endswith(".gguf")


def require_folder(name_or_path: str) -> None:
    """Refuse a path where nothing is; a name that may be on the Hub passes."""
    if (not name_or_path or name_or_path.startswith(_PATH_STARTS)) and not Path(name_or_path).expanduser().exists():
        raise ConfigError(f"There is no folder {name_or_path!r}. Give a folder that exists, or a name on the Hub.")


def find_file(name_or_path: str, file: str, **download_kwargs: Any) -> Path | None:
    """A file of a folder or of a repository, fetched into the Hub's cache; None if it is not there."""
    folder = Path(name_or_path)
    if folder.exists():
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return Path(hf_hub_download(name_or_path, file, **download_kwargs))
    except (EntryNotFoundError, HFValidationError):
        return None


def refuse_adapter(name_or_path: str, **model_init_kwargs: Any) -> None:
    """Refuse an adapter where a model is expected: transformers would load the base model that its author names."""
    where = hub_arguments(model_init_kwargs)
    files = (find_file(name_or_path, file, **where) for file in ("adapter_config.json", "config.json"))
    if next(files) is not None and next(files) is None:
        raise ConfigError(
            f"{name_or_path} holds an adapter and no model; expected its base model. Name that here, and the adapter "
            "as --adapter, or with `quantkd.hub.load_adapter(model, ...)`."
        )


@contextmanager
def naming(name_or_path: str, file: str = "config.json") -> Iterator[None]:
    """Turn what transformers and PEFT say of a model that they cannot find into one line that names it."""
    require_folder(name_or_path)
    if (path := Path(name_or_path).expanduser()).exists() and not (path / file).is_file():
        refuse_adapter(str(path))
        remedy = " Write the model's tokenizer there: tokenizer.save_pretrained(FOLDER)." * file.startswith("tokenizer")
        raise ConfigError(
            f"{name_or_path} holds no {file}; expected what `save_pretrained` wrote, or a Hub name.{remedy}"
        )
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{name_or_path!r} could not be loaded, neither as a folder here nor from the Hub. Check the name, the "
            f"revision and the network. ({' '.join(str(error).split())})"
        ) from error


def plain_name(model: Any) -> Any:
    """A path as text; a name, and a model that is loaded, as it is."""
    return os.fspath(model) if isinstance(model, os.PathLike) else model


def load_tokenizer(model: Any, **model_init_kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that is stored with a model, which is given by name or loaded."""
    from transformers import AutoTokenizer

    name = model if isinstance(model, str) else model.config.name_or_path
    if not name:
        raise ConfigError("The loaded model names no tokenizer. Pass `tokenizer`, or the trainer's `processing_class`.")
    used = ("revision", "token", "trust_remote_code")
    with naming(name, "tokenizer_config.json"):
        kwargs = {key: model_init_kwargs[key] for key in used if key in model_init_kwargs}
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **kwargs)
        except (OSError, ImportError):
            raise
        except Exception as error:  # of any type, also of the Rust library's own, where a file is not what it should be
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            raise ConfigError(f"The tokenizer of {name!r} could not be read ({reason}). Get its files anew.") from error
    return tokenizer
