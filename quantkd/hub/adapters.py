"""Adapters on the Hub: pushed with a page and nothing private; loaded onto the caller's model, without pickles."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from quantkd.errors import DataError, HubError
from quantkd.files import write_file
from quantkd.hub.cards import CARD_NAME, check_license, render_adapter_card
from quantkd.hub.repository import (
    PUSH_ATTEMPTS,
    HubRepository,
    Operation,
    PushedRepository,
    check_shareable,
    persevere,
)
from quantkd.models.student import load_student
from quantkd.names import is_repository_name, public_name, split_revision
from quantkd.remote import RemoteFiles, find_secrets, logger as revisions

logger = logging.getLogger(__name__)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE, _CHART, _PROVENANCE, _TOKENIZER_CONFIG = (
    "adapter_model.bin",
    "gap.png",
    "quantkd.json",
    "tokenizer_config.json",
)
# All that is ever pushed: training_args.bin can hold a token, and nobody knows what the next library leaves behind.
_TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.model", _TOKENIZER_CONFIG, "vocab.json", "vocab.txt",
)  # fmt: skip
# In these "/root" is a token like any other.
_VOCABULARIES = tuple(name for name in _TOKENIZER_FILES if name not in (_TOKENIZER_CONFIG, "chat_template.jinja"))
_FACTS = ("quantkd_version", "transfer_set", "transfer_set_digest", "teacher", "objective", "training", "quantization")
_MAX_HEADER_BYTES = 2**27
_MAX_CONFIG_BYTES = 2**20
_MAX_WEIGHTS_BYTES = 2**36
# What shapes plain LoRA. Other fields import packages, repeat layers or read files, and are refused if they are set.
_FIELDS = (
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_bias", "lora_dropout", "modules_to_save", "r", "rank_pattern", "target_modules", "task_type", "use_dora",
    "use_rslora",
)  # fmt: skip
# Notes of PEFT that change nothing here: the weights are loaded over whatever the start was, if it left the base alone;
# and `auto_mapping`, which it writes where no task type was given, names the base model's class, which is the caller's.
_NOTES = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_type", "peft_version",
    "revision",
)  # fmt: skip
_STARTS_THAT_LEAVE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_MODULE_NAME = re.compile(r"[\w.-]{1,256}")
_ADAPTED = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?A(?:\.weight)?")


class _Adapter(NamedTuple):
    """What an adapter's folder, and the report of the run that it belongs to, say of it."""

    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    results: dict[str, Any] | None
    chart: Path | None


def push_adapter(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    base_model: str | None = None,
    run_dir: str | Path | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    attempts: int = PUSH_ATTEMPTS,
) -> PushedRepository:
    """Upload an adapter as a model repository, in one commit.

    Args:
        path: the adapter's folder, or that of a run that holds just one adapter.
        repo_id: `user/name`, or `name` for one of the token's owner; created if it is missing.
        private: False makes a new repository public, and is needed to push to one that is.
        license: of the adapter, as the Hub names it, such as "apache-2.0"; the card says that none was stated if None.
        base_model: the base model's name on the Hub, where the adapter was trained on a folder.
        run_dir: whose `results.json` and `gap.png` go on the card; looked for in the folder and the one above if None.
        token: with write permission; else that of `hf auth login` or HF_TOKEN.
        revision: the branch; "main" if None.
        commit_message: the commit's title.
        attempts: how many failures in a row that may not come again end the push.

    Returns:
        The repository and its commit.

    Raises:
        DataError: no adapter there, several, or one that is a pickle.
        ConfigError: a public repository without `private=False`, one that holds something else, or a file that holds a
            secret.
        HubError: the Hub could not be reached, or refused.
    """
    check_license(license)
    adapter = _read_adapter(find_adapter(path), base_model, run_dir)
    _collect(adapter, repo_id, license, token)  # a secret in it is found before a repository is created
    base = adapter.config["base_model_name_or_path"]
    if not is_repository_name(base):
        logger.warning(
            "The page names the base model %r, a local folder, so its snippet does not run for others. Push again with "
            "base_model (--base_model user/model).",
            base,
        )
    repository = HubRepository(repo_id, "model", token=token, branch=revision)

    def push() -> PushedRepository:
        repository.ensure(private)
        files = _collect(adapter, repository.repo_id, license, token)
        commit, there = repository.read(ADAPTER_CONFIG.__eq__, "adapter")
        # What an earlier push left and this one does not bring would describe another adapter.
        stale = sorted({*_TOKENIZER_FILES, _CHART, _PROVENANCE} - files.keys() & there.keys())
        operations: list[Operation] = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        return repository.commit(operations, commit_message, commit)

    return persevere(push, repo_id, attempts)


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
    """The names and sizes of what a push would upload."""
    files = _collect(_read_adapter(find_adapter(path), base_model, run_dir), "user/name", None, None)
    sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in files.items()}
    return sorted(sizes.items())


def write_card(folder: Path, repo_id: str, license: str | None = None) -> None:
    """Write the page of a trained adapter, which has no evaluation yet, into its folder."""
    adapter = _Adapter(folder, *_describe(folder, None), None, None)
    write_file(folder / CARD_NAME, _card(adapter, repo_id, license))


def _adapters_in(folder: Path) -> list[Path]:
    """The adapters directly below a folder, without checkpoints and the control of a comparison."""
    found = sorted(each.parent for each in folder.glob(f"*/{ADAPTER_CONFIG}"))
    return [each for each in found if not each.name.startswith("checkpoint-") and not each.name.endswith("-control")]


def _read_adapter(folder: Path, base_model: str | None, run_dir: str | Path | None) -> _Adapter:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        found = f"{_PICKLE}, a pickle" if (folder / _PICKLE).is_file() else "no weights"
        raise DataError(
            f"{folder} holds {found}; expected {ADAPTER_WEIGHTS}. Save the adapter with `save_pretrained`, which "
            "writes safetensors."
        )
    config, facts = _describe(folder, base_model)
    if not config["base_model_name_or_path"]:
        raise DataError(f"{folder / ADAPTER_CONFIG} names no base model; pass base_model (--base_model).")
    report = _find_report(folder) if run_dir is None else Path(run_dir)
    if report is None:
        return _Adapter(folder, config, facts, None, None)
    if not (report / "results.json").is_file():
        raise DataError(f"{report} holds no results.json; build it with `quantkd report {report}`.")
    chart = report / _CHART
    return _Adapter(folder, config, facts, _read_json(report / "results.json"), chart if chart.is_file() else None)


def _describe(folder: Path, base_model: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The adapter's configuration and its provenance, without local paths."""
    config = _read_json(folder / ADAPTER_CONFIG)
    config["base_model_name_or_path"] = public_name(base_model or str(config.get("base_model_name_or_path") or ""))
    written = _read_json(folder / _PROVENANCE) if (folder / _PROVENANCE).is_file() else {}
    facts = {key: value for key, value in written.items() if key in _FACTS}
    if facts.get("teacher"):
        facts["teacher"] = public_name(str(facts["teacher"]))
    return config, facts


def _find_report(folder: Path) -> Path | None:
    """The folder of this adapter's report: its own, or the one above if that holds no other adapter."""
    if (folder / "results.json").is_file():
        return folder
    above = folder.resolve().parent
    return above if (above / "results.json").is_file() and len(_adapters_in(above)) == 1 else None


def _collect(adapter: _Adapter, repo_id: str, license: str | None, token: str | None) -> dict[str, Path | bytes]:
    """Every file of the push with its content, each searched for secrets."""
    files: dict[str, Path | bytes] = {
        CARD_NAME: _card(adapter, repo_id, license).encode(),
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
        if isinstance(content, bytes):
            data = content
        else:
            data = _read_header(content) if name == ADAPTER_WEIGHTS else content.read_bytes()
        check_shareable(name, data, secrets, paths=name not in _VOCABULARIES)
    return files


def _card(adapter: _Adapter, repo_id: str, license: str | None) -> str:
    tokenizer = adapter.folder / _TOKENIZER_CONFIG
    has_template = (adapter.folder / "chat_template.jinja").is_file()
    return render_adapter_card(
        repo_id=repo_id,
        adapter=adapter.config,
        facts=adapter.facts,
        license=license,
        results=adapter.results,
        has_chart=adapter.chart is not None,
        has_tokenizer=tokenizer.is_file(),
        has_chat_template=has_template or (tokenizer.is_file() and bool(_read_json(tokenizer).get("chat_template"))),
    )


def _read_header(path: Path) -> bytes:
    """The part of a safetensors file that can hold text."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, path.stat().st_size):
            raise DataError(f"{path} is not a safetensors file. Save the adapter anew.")
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


def load_adapter(
    base: PreTrainedModel | str,
    adapter: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    is_trainable: bool = False,
    **model_kwargs: Any,
) -> PeftModel:
    """Attach a LoRA adapter from the Hub or a folder to a base model that the caller chose.

    The base model that the adapter names is compared and never loaded. Only safetensors are read. The commit is logged,
    and is `hub_revision` of the model.

    Args:
        base: a loaded model; or its name or folder, loaded in NF4 without remote code.
        adapter: a folder; or `user/name` or `user/name@revision` on the Hub, if there is no such folder here.
        revision: of the repository: a branch, tag or commit. It is fixed to its commit now.
        token: for a private repository.
        is_trainable: keep the adapter trainable.
        **model_kwargs: for a base given by name, what `load_student` takes.

    Returns:
        The model with the adapter.

    Raises:
        DataError: no adapter there, a pickle, a configuration that asks for more than plain LoRA, or one that does not
            fit the base model.
        ConfigError: a revision of a folder.
        HubError: the Hub could not be reached, and the adapter is not in the cache.
    """
    place, folder, files = _find(str(adapter), revision, token)
    config, named = _read_config(folder / ADAPTER_CONFIG, place)
    model = load_student(base, **{"trust_remote_code": False, **model_kwargs}) if isinstance(base, str) else base
    own = _last_part(model.config.name_or_path or "")
    if named and own and named != own:
        logger.warning(
            "The adapter %s says that it was trained on %r; it is attached to %r. If that is another model, its "
            "answers mean nothing.",
            place,
            named,
            own,
        )
    config.inference_mode = not is_trainable
    try:
        weights = load_file(folder / ADAPTER_WEIGHTS)
        if _is_pattern(config.target_modules):  # the weights say as well which modules it means
            config.target_modules = sorted({match[1] for name in weights if (match := _ADAPTED.fullmatch(name))})
            config.exclude_modules = None
        loaded: Any = get_peft_model(model, config)
        result: Any = set_peft_model_state_dict(loaded, weights)
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:500]
        raise DataError(
            f"The adapter {place} does not fit the base model {own or type(model).__name__}: {reason}. Load it on the "
            "model that it was trained on."
        ) from error
    lacking = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or lacking:
        raise DataError(
            f"The adapter {place} does not fit its own configuration: {len(lacking)} weights are missing and "
            f"{len(result.unexpected_keys)} have no place, first {[*lacking, *result.unexpected_keys][0]!r}. Get it "
            "anew, or ask its maker."
        )
    if files is not None:
        revisions.info("Adapter %s", place)
    loaded.hub_revision = place
    if not is_trainable:
        loaded.eval()
    attached: PeftModel = loaded
    return attached


def fetch_adapter(adapter: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """A folder with an adapter's files and descriptions: the one named, or the Hub's cache. Logs the commit."""
    place, folder, files = _find(str(adapter), revision, token)
    if files is not None:
        for name in (CARD_NAME, _PROVENANCE):
            files.fetch(name, max_bytes=_MAX_CONFIG_BYTES)
        revisions.info("Adapter %s", place)
    return folder


def _find(adapter: str, revision: str | None, token: str | None) -> tuple[str, Path, RemoteFiles | None]:
    """Where an adapter is, as it is printed; the folder of its two files; and the repository if it is on the Hub."""
    name, revision = split_revision(adapter, revision)
    files, folder = None, Path(adapter)
    if name is None:
        if not folder.is_dir():
            raise DataError(f"There is no folder {adapter!r}. Give an adapter's folder, or its name on the Hub.")
        found = {file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, _PICKLE) if (folder / file).is_file()}
    else:
        files, found = RemoteFiles(name, "model", revision, token), set()
        try:
            for file, limit in ((ADAPTER_CONFIG, _MAX_CONFIG_BYTES), (ADAPTER_WEIGHTS, _MAX_WEIGHTS_BYTES)):
                if (path := files.fetch(file, max_bytes=limit)) is not None:
                    folder = path.parent  # files of one commit share a folder of the cache
                    found.add(file)
        except HubError as error:
            raise type(error)(f"There is no folder {adapter!r} here. On the Hub: {error}") from error
        if ADAPTER_WEIGHTS not in found and files.holds(_PICKLE):
            found.add(_PICKLE)
    place = adapter if files is None else str(files)
    missing = [file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if file not in found]
    if missing and _PICKLE in found:
        raise DataError(
            f"{place} holds {_PICKLE}, a pickle, which can run any code when it is opened; expected {ADAPTER_WEIGHTS}. "
            "Ask its maker to save it as safetensors."
        )
    if missing:
        raise DataError(f"{place} holds no {missing[0]}; expected an adapter that PEFT saved. Check the name.")
    return place, folder, files


def _read_config(path: Path, place: str) -> tuple[LoraConfig, str]:
    """Plain LoRA from checked fields, and the base model that the adapter names."""
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise DataError(
            f"{path.name} of {place} has {path.stat().st_size} bytes; expected at most {_MAX_CONFIG_BYTES}."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path.name} of {place} is not JSON: {error}. Get the adapter anew.") from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        found = fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
        raise DataError(f"{place} is of the kind {found!r}; expected LORA. Load it with PEFT, if you trust it.")
    defaults = LoraConfig().to_dict()
    strange = sorted(
        name for name, value in fields.items()
        if name not in (*_FIELDS, *_NOTES) and value and value != defaults.get(name)
    )  # fmt: skip
    if strange:
        raise DataError(
            f"{path.name} of {place} sets {', '.join(strange)[:200]}; expected plain LoRA, which needs none of that. "
            "Load it with PEFT, if you trust it."
        )
    start = fields.get("init_lora_weights")
    if not any(start is each or (isinstance(start, str) and start == each) for each in _STARTS_THAT_LEAVE_THE_BASE):
        raise DataError(
            f"{place} started with {str(start)[:80]!r}, which changes the base model's weights as well; expected a "
            "start that leaves them alone. Ask its maker to convert it (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion)."
        )
    names = [fields.get("modules_to_save"), fields.get("layers_pattern")]
    if not _is_pattern(fields.get("target_modules")):
        names += [fields.get("target_modules"), fields.get("exclude_modules")]
    names += [list(fields.get(pattern) or ()) for pattern in ("rank_pattern", "alpha_pattern")]
    for each in names:
        listed = [each] if isinstance(each, str) else each or []
        # PEFT takes a string for a regular expression, and one can be written that never ends.
        if not isinstance(listed, list) or not all(isinstance(n, str) and _MODULE_NAME.fullmatch(n) for n in listed):
            raise DataError(
                f"{path.name} of {place} names the modules {str(each)[:80]!r}; expected plain names such as q_proj. "
                "Load it with PEFT, if you trust it."
            )
    try:
        config = LoraConfig(**{name: fields[name] for name in _FIELDS if name in fields})
    except (TypeError, ValueError) as error:
        raise DataError(f"{path.name} of {place} is not a LoRA configuration: {error}. Get it anew.") from error
    return config, _last_part(str(fields.get("base_model_name_or_path") or ""))


def _is_pattern(modules: Any) -> bool:
    """Whether modules are named by a regular expression. It is never run: one can be written that never ends."""
    return isinstance(modules, str) and not _MODULE_NAME.fullmatch(modules)


def _last_part(name_or_path: str) -> str:
    """The last part of a path or a Hub name, printable: a stranger's text goes to a terminal."""
    name = public_name(name_or_path).split("/")[-1][:100]
    return "".join(character if character.isprintable() else "?" for character in name)
