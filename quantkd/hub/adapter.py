"""An adapter and its page to a model repository: the files that plain PEFT and transformers read, and no others."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from quantkd.errors import DataError, HubError
from quantkd.hub.card import check_licence, is_hub_name, render_adapter_card
from quantkd.hub.failures import TransientHubError, wait_to_retry
from quantkd.hub.repository import HubRepository, Operation, PushedRepository
from quantkd.hub.secrets import check_shareable, find_secrets, public_name

logger = logging.getLogger(__name__)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CARD, _CHART, _PROVENANCE, _TOKENIZER_CONFIG = "README.md", "gap.png", "quantkd.json", "tokenizer_config.json"
# All that is ever pushed: training_args.bin can hold a token, and nobody knows what the next library leaves behind.
_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    _TOKENIZER_CONFIG,
    "vocab.json",
    "vocab.txt",
)
# In these "/root" is a token like any other.
_VOCABULARIES = tuple(name for name in _TOKENIZER_FILES if name not in (_TOKENIZER_CONFIG, "chat_template.jinja"))
_FACTS = ("quantkd_version", "transfer_set", "transfer_set_digest", "teacher", "objective", "training", "quantization")
_MAX_HEADER_BYTES = 2**27
_ATTEMPTS = 8


@dataclass(frozen=True)
class _Adapter:
    """What lies in an adapter's folder, and in the folder of the run that it belongs to."""

    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    results: dict[str, Any] | None
    chart: Path | None

    @property
    def base(self) -> str:
        return str(self.config["base_model_name_or_path"])


def push_adapter(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    licence: str | None = None,
    base_model: str | None = None,
    run_dir: str | Path | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    attempts: int = _ATTEMPTS,
) -> PushedRepository:
    """Upload an adapter as a model repository, in one commit.

    Args:
        path: the adapter's folder, or that of a run that holds just one adapter.
        repo_id: `user/name`, or `name` for one of the token's owner; made if it is not there.
        private: False makes a new repository public, and is needed to push to one that is.
        licence: of the adapter, as the Hub names it, such as "apache-2.0"; the card says that none was stated if None.
        base_model: the base model's name on the Hub, where the adapter was trained on a folder.
        run_dir: whose `results.json` and `gap.png` go on the card; looked for in the folder and the one above if None.
        token: with write permission; else that of `hf auth login` or HF_TOKEN.
        revision: the branch; "main" if None.
        commit_message: the commit's title.
        attempts: how often a failure that may pass is met before giving up.

    Returns:
        The repository and its commit.

    Raises:
        DataError: no adapter there, several, or one that is a pickle.
        ConfigError: a public repository without `private=False`, one that holds something else, or a file that holds a
            secret.
        HubError: the Hub could not be reached, or refused.
    """
    check_licence(licence)
    adapter = _read_adapter(find_adapter(path), base_model, run_dir)
    _collect(adapter, repo_id, licence, token)  # a secret in it is found before a repository is made
    if not is_hub_name(adapter.base):
        logger.warning(
            "The page names the base model %r, a folder here, so its snippet works for nobody else. Push again with "
            "base_model (--base_model user/model).",
            adapter.base,
        )
    repository = HubRepository(repo_id, "model", token=token, branch=revision)
    for failures in range(1, attempts + 1):
        try:
            repository.ensure(private)
            files = _collect(adapter, repository.repo_id, licence, token)
            snapshot = repository.read()
            snapshot.check_purpose(repository.repo_id, ADAPTER_CONFIG.__eq__, "adapter")
            ours = {*_TOKENIZER_FILES, _CHART, _PROVENANCE}
            operations: list[Operation] = [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                # What an earlier push left and this one does not bring would describe another adapter.
                *(CommitOperationDelete(name) for name in sorted(ours - set(files)) if name in snapshot.files),
            ]
            return repository.pushed(repository.commit(operations, commit_message, snapshot.commit))
        except TransientHubError as error:
            if failures == attempts:
                raise HubError(
                    f"The push to {repo_id} stopped after {failures} failures in a row: {error} Push again: nothing is "
                    "half done, and files that arrived are not sent again."
                ) from error
            wait_to_retry(failures)
    raise AssertionError("attempts is at least 1")  # pragma: no cover


def find_adapter(path: str | Path) -> Path:
    """The adapter's folder: the one given, or the only one in a run's folder."""
    folder = Path(path)
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    found = _adapters_in(folder) if folder.is_dir() else []
    if len(found) != 1:
        names = f"the adapters {', '.join(each.name for each in found)}" if found else "no adapter_config.json"
        raise DataError(f"{folder} holds {names}; expected one adapter. Name its folder, as `quantkd train` wrote it.")
    return found[0]


def list_adapter_files(
    path: str | Path, *, base_model: str | None = None, run_dir: str | Path | None = None
) -> list[tuple[str, int]]:
    """What a push would upload."""
    files = _collect(_read_adapter(find_adapter(path), base_model, run_dir), "user/name", None, None)
    sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in files.items()}
    return sorted(sizes.items())


def render_card(path: str | Path, repo_id: str, *, licence: str | None = None) -> str:
    """The page that a push would put in front of an adapter."""
    return _card(_read_adapter(find_adapter(path), None, None), repo_id, licence)


def _adapters_in(folder: Path) -> list[Path]:
    """The adapters directly below a folder; checkpoints and the control of a comparison are none to share."""
    found = sorted(each.parent for each in folder.glob(f"*/{ADAPTER_CONFIG}"))
    return [each for each in found if not each.name.startswith("checkpoint-") and not each.name.endswith("-control")]


def _read_adapter(folder: Path, base_model: str | None, run_dir: str | Path | None) -> _Adapter:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise DataError(
            f"{folder} holds {'adapter_model.bin, a pickle' if pickled else 'no weights'}; expected {ADAPTER_WEIGHTS}. "
            "Save the adapter with `save_pretrained`, which writes safetensors."
        )
    config = _read_json(folder / ADAPTER_CONFIG)
    base = base_model or str(config.get("base_model_name_or_path") or "")
    if not base:
        raise DataError(f"{folder / ADAPTER_CONFIG} names no base model; pass base_model (--base_model).")
    config["base_model_name_or_path"] = public_name(base)
    provenance = folder / _PROVENANCE
    facts = {key: value for key, value in (_read_json(provenance) if provenance.is_file() else {}).items()
             if key in _FACTS}  # fmt: skip
    if facts.get("teacher"):
        facts["teacher"] = public_name(str(facts["teacher"]))
    report = _find_report(folder) if run_dir is None else Path(run_dir)
    results = chart = None
    if report is not None:
        if not (report / "results.json").is_file():
            raise DataError(f"{report} holds no results.json; build it with `quantkd report {report}`.")
        results = _read_json(report / "results.json")
        chart = report / _CHART if (report / _CHART).is_file() else None
    return _Adapter(folder, config, facts, results, chart)


def _find_report(folder: Path) -> Path | None:
    """The report of this adapter: beside it, or above it where no other adapter could be meant."""
    if (folder / "results.json").is_file():
        return folder
    above = folder.resolve().parent
    return above if (above / "results.json").is_file() and len(_adapters_in(above)) == 1 else None


def _collect(adapter: _Adapter, repo_id: str, licence: str | None, token: str | None) -> dict[str, Path | bytes]:
    """Every file of the push with its content, each searched for secrets."""
    files: dict[str, Path | bytes] = {
        _CARD: _card(adapter, repo_id, licence).encode(),
        ADAPTER_CONFIG: _to_json(adapter.config),
        ADAPTER_WEIGHTS: adapter.folder / ADAPTER_WEIGHTS,
    }
    if adapter.facts:
        files[_PROVENANCE] = _to_json(adapter.facts)
    for name in _TOKENIZER_FILES:
        if (adapter.folder / name).is_file():
            files[name] = adapter.folder / name
    if _TOKENIZER_CONFIG in files:
        config = _read_json(adapter.folder / _TOKENIZER_CONFIG)
        for key in ("name_or_path", "tokenizer_file", "vocab_file"):
            if isinstance(config.get(key), str):
                config[key] = public_name(config[key])
        files[_TOKENIZER_CONFIG] = _to_json(config)
    if adapter.chart is not None:
        files[_CHART] = adapter.chart
    secrets = find_secrets(token)
    for name, content in files.items():
        if name == ADAPTER_WEIGHTS:
            data = _read_header(adapter.folder / name)
        else:
            data = content if isinstance(content, bytes) else content.read_bytes()
        check_shareable(name, data, secrets, paths=name not in _VOCABULARIES)
    return files


def _card(adapter: _Adapter, repo_id: str, licence: str | None) -> str:
    return render_adapter_card(
        repo_id=repo_id,
        base=adapter.base,
        adapter=adapter.config,
        facts=adapter.facts,
        licence=licence,
        results=adapter.results,
        has_chart=adapter.chart is not None,
        has_tokenizer=(adapter.folder / _TOKENIZER_CONFIG).is_file(),
        has_chat_template=_has_chat_template(adapter.folder),
    )


def _has_chat_template(folder: Path) -> bool:
    config = folder / _TOKENIZER_CONFIG
    in_config = config.is_file() and _read_json(config).get("chat_template")
    return bool(in_config) or (folder / "chat_template.jinja").is_file()


def _read_header(path: Path) -> bytes:
    """The part of a safetensors file that can hold text."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, path.stat().st_size):
            raise DataError(f"{path} is no safetensors file. Save the adapter anew.")
        return file.read(length)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}. Save the adapter, or build the report, anew.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}; expected an object. Write it anew.")
    return value


def _to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
