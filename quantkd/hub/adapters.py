"""Adapters on the Hub: pushed with a page and nothing private; loaded onto the caller's model, without pickles."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from quantkd.errors import DataError
from quantkd.files import read_regular, write_file
from quantkd.hub.cards import CARD_NAME, check_license, render_adapter_card
from quantkd.hub.repository import PUSH_ATTEMPTS, HubRepository, Operation, PushedRepository
from quantkd.models.cpu_repacking import keep_trainable_on_cpu
from quantkd.models.provenance import PROVENANCE_NAME, Provenance, read_object
from quantkd.models.student import load_student
from quantkd.names import is_repository_name, public_name, require_folder, split_revision
from quantkd.remote import RemoteFiles, check_shareable, find_secrets, logger as revisions, retry

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_CHART, _TOKENIZER_CONFIG, _CHAT_TEMPLATE = "gap.png", "tokenizer_config.json", "chat_template.jinja"
# In these "/root" is a token like any other.
_VOCABULARIES = (
    "added_tokens.json", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt",
)  # fmt: skip
# With the page, configuration and weights all that is ever pushed: training_args.bin can hold a token, and nobody knows
# what the next library leaves behind.
_OPTIONAL = (_CHART, PROVENANCE_NAME, _TOKENIZER_CONFIG, _CHAT_TEMPLATE, *_VOCABULARIES)
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

    `path` may be a run's folder with just one adapter. `repo_id` without an owner is one of the token's.
    `private=False` makes a new repository public, and is needed to push to one that is. `base_model` is for an adapter
    that was trained on a local folder. `run_dir` holds the report for the page: by default the adapter's folder or the
    one above. `attempts` failures in a row that may not come again end the push.
    """
    check_license(license)
    files, values = _gather(find_adapter(path), base_model, run_dir)
    _check_secrets({**files, CARD_NAME: render_adapter_card(repo_id, license=license, **values).encode()}, token)
    base = values["adapter"]["base_model_name_or_path"]
    if not is_repository_name(base):
        logger.warning("The page names the base model %r, a local folder: name it with --base_model user/model.", base)
    repository = HubRepository(repo_id, "model", token=token, branch=revision)

    def push() -> PushedRepository:
        repository.ensure(private)
        commit, there = repository.read(CONFIG.__eq__, "adapter")
        page = render_adapter_card(repository.repo_id, license=license, **values).encode()
        added = [CommitOperationAdd(name, content) for name, content in {CARD_NAME: page, **files}.items()]
        # What an earlier push left and this one does not bring would describe another adapter.
        stale = [name for name in _OPTIONAL if name in there and name not in files]
        operations: list[Operation] = [*added, *map(CommitOperationDelete, stale)]
        return repository.commit(operations, commit_message, commit)

    return retry(push, attempts)


def list_adapter_files(
    path: str | Path, *, base_model: str | None = None, run_dir: str | Path | None = None
) -> list[tuple[str, int]]:
    """The names and sizes of what a push would upload."""
    files, values = _gather(find_adapter(path), base_model, run_dir)
    files[CARD_NAME] = render_adapter_card("user/name", license=None, **values).encode()
    _check_secrets(files, None)
    return sorted((name, CommitOperationAdd(name, content).upload_info.size) for name, content in files.items())


def write_card(folder: Path, repo_id: str, license: str | None = None) -> None:
    """Write the page of a trained adapter, which has no evaluation yet, into its folder."""
    write_file(folder / CARD_NAME, render_adapter_card(repo_id, license=license, **_describe(folder, None)))


def find_adapter(path: str | Path) -> Path:
    """The adapter's folder: the one given, or the only one in a run's folder."""
    folder = Path(path)
    if (folder / CONFIG).is_file():
        return folder
    found = _adapters_in(folder) if folder.is_dir() else []
    if len(found) != 1:
        names = f"the adapters {', '.join(each.name for each in found)}" if found else f"no {CONFIG}"
        raise DataError(f"{folder} holds {names}; expected one adapter. Name its folder, as `quantkd train` wrote it.")
    return found[0]


def _adapters_in(folder: Path) -> list[Path]:
    """The adapters directly below a folder, without checkpoints and the control of a comparison."""
    found = sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))
    return [each for each in found if not re.search("^checkpoint-|-control$", each.name)]


def _find_report(folder: Path) -> Path | None:
    """The folder of this adapter's report: its own, or the one above if that holds no other adapter."""
    above = folder.resolve().parent
    places = [folder, *([above] if len(_adapters_in(above)) == 1 else [])]
    return next((place for place in places if (place / "results.json").is_file()), None)


def _gather(
    folder: Path, base_model: str | None, run_dir: str | Path | None
) -> tuple[dict[str, Path | bytes], dict[str, Any]]:
    """The files of a push without the page, and the values that the page is rendered from."""
    _check_files(str(folder), lambda name: (folder / name).is_file())
    values = _describe(folder, base_model)
    if not values["adapter"]["base_model_name_or_path"]:
        raise DataError(f"{folder / CONFIG} names no base model; pass base_model (--base_model).")
    files: dict[str, Path | bytes] = {CONFIG: _to_json(values["adapter"]), WEIGHTS: folder / WEIGHTS}
    if values["facts"] != Provenance():
        files[PROVENANCE_NAME] = values["facts"].to_json().encode()
    files |= {name: folder / name for name in (*_VOCABULARIES, _CHAT_TEMPLATE) if (folder / name).is_file()}
    if (folder / _TOKENIZER_CONFIG).is_file():
        config = read_object(folder / _TOKENIZER_CONFIG)
        paths = {key: config[key] for key in ("name_or_path", "tokenizer_file", "vocab_file") if config.get(key)}
        files[_TOKENIZER_CONFIG] = _to_json({**config, **{key: public_name(str(path)) for key, path in paths.items()}})
    report = _find_report(folder) if run_dir is None else Path(run_dir)
    if report is not None:
        if not (report / "results.json").is_file():
            raise DataError(f"{report} holds no results.json; build it with `quantkd report {report}`.")
        values["results"] = read_object(report / "results.json")
        if (report / _CHART).is_file():
            files[_CHART], values["chart"] = report / _CHART, True
    return files, values


def _describe(folder: Path, base_model: str | None) -> dict[str, Any]:
    """What the page of an adapter says without a report: its configuration and provenance, without local paths."""
    adapter = read_object(folder / CONFIG)
    adapter["base_model_name_or_path"] = public_name(base_model or str(adapter.get("base_model_name_or_path") or ""))
    tokenizer = read_object(folder / _TOKENIZER_CONFIG) if (folder / _TOKENIZER_CONFIG).is_file() else {}
    has_template = bool(tokenizer.get("chat_template")) or (folder / _CHAT_TEMPLATE).is_file()
    return {
        "adapter": adapter, "facts": Provenance.read(folder), "results": None, "chart": False,
        "tokenizer": bool(tokenizer), "chat_template": has_template,
    }  # fmt: skip


def _check_secrets(files: Mapping[str, Path | bytes], token: str | None) -> None:
    """Refuse to push a secret or a local path; of the weights, their header can hold text."""
    secrets = find_secrets(token)
    for name, content in files.items():
        if name == WEIGHTS:
            try:
                with safe_open(content, framework="pt") as weights:
                    data = f"{weights.metadata()} {list(weights.keys())}".encode()
            except SafetensorError as error:
                raise DataError(f"{content!s} is not a safetensors file: {error}. Save the adapter again.") from error
        else:
            data = content if isinstance(content, bytes) else content.read_bytes()
        check_shareable(name, data, secrets, paths=name not in _VOCABULARIES)


def _check_files(place: str, holds: Callable[[str], bool]) -> None:
    """Refuse an adapter without its two files."""
    missing = [name for name in (CONFIG, WEIGHTS) if not holds(name)]
    if WEIGHTS in missing and holds(_PICKLE):
        raise DataError(
            f"{place} holds {_PICKLE}, a pickle, which can run any code when it is opened; expected {WEIGHTS}. Ask its "
            "maker to save it as safetensors."
        )
    if missing:
        raise DataError(f"{place} holds no {missing[0]}; expected an adapter that PEFT saved. Check the name.")


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
    and is `hub_revision` of the model. A `base` given by name is loaded by `load_student`, which takes `model_kwargs`,
    without remote code.
    """
    place, folder, _ = _find(str(adapter), revision, token)
    config, named = _read_config(folder / CONFIG, place)
    model = load_student(base, **{"trust_remote_code": False, **model_kwargs}) if isinstance(base, str) else base
    own = _last_part(model.config.name_or_path or "")
    if named and own and named != own:
        told = "The adapter %s says that it was trained on %r; it is attached to %r, which may be another model."
        logger.warning(told, place, named, own)
    config.inference_mode = not is_trainable
    try:
        weights = load_file(folder / WEIGHTS)
        if _is_pattern(config.target_modules):  # the weights say as well which modules it means
            config.target_modules = sorted({match[1] for name in weights if (match := _ADAPTED.fullmatch(name))})
            config.exclude_modules = None
        loaded: Any = get_peft_model(model, config)
        result: Any = set_peft_model_state_dict(loaded, weights)
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:500]
        name = own or type(model).__name__
        raise DataError(f"The adapter {place} does not fit the base model {name}: {reason}. Load another.") from error
    lacking = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or lacking:
        raise DataError(
            f"The adapter {place} does not fit its own configuration: {len(lacking)} weights are missing, "
            f"{len(result.unexpected_keys)} unexpected, first {[*lacking, *result.unexpected_keys][0]!r}. Get it anew."
        )
    loaded.hub_revision = place
    keep_trainable_on_cpu(loaded)
    attached: PeftModel = loaded if is_trainable else loaded.eval()
    return attached


def fetch_adapter(adapter: str) -> Path:
    """A folder with an adapter's files and descriptions: the one named, or the Hub's cache."""
    _, folder, files = _find(adapter, None, None)
    if files is not None:
        for name in (CARD_NAME, PROVENANCE_NAME):
            files.fetch(name, _MAX_CONFIG_BYTES)
    return folder


def _find(adapter: str, revision: str | None, token: str | None) -> tuple[str, Path, RemoteFiles | None]:
    """Where an adapter is, as it is printed; the folder of its two files; and the repository if it is on the Hub."""
    name, revision = split_revision(adapter, revision)
    folder = Path(adapter)
    if name is None:
        require_folder(adapter)
        _check_files(adapter, lambda file: (folder / file).is_file())
        return adapter, folder, None
    files = RemoteFiles(name, "model", revision, token)
    # Files of one commit share a folder of the cache.
    limits = {CONFIG: _MAX_CONFIG_BYTES, WEIGHTS: _MAX_WEIGHTS_BYTES}
    fetched = {file: path for file, limit in limits.items() if (path := files.fetch(file, limit)) is not None}
    _check_files(str(files), lambda file: file in fetched or (file == _PICKLE and files.holds(file)))
    revisions.info("Adapter %s", files)
    return str(files), fetched[CONFIG].parent, files


def _read_config(path: Path, place: str) -> tuple[LoraConfig, str]:
    """Plain LoRA from checked fields, and the base model that the adapter names."""
    try:
        fields = json.loads(read_regular(path.resolve(), _MAX_CONFIG_BYTES))
        problem = _find_problem(fields)
        config = LoraConfig(**{name: fields[name] for name in _FIELDS if name in fields}) if problem is None else None
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{CONFIG} of {place} is not a LoRA configuration: {error}. Get the adapter anew.") from error
    if config is None:
        raise DataError(f"{CONFIG} of {place} {problem}. Load it with PEFT, if you trust it.")
    return config, _last_part(str(fields.get("base_model_name_or_path") or ""))


def _find_problem(fields: Any) -> str | None:
    """What in the fields of adapter_config.json is not plain LoRA."""
    kind = fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
    if kind != "LORA":
        return f"is of the kind {str(kind)[:80]!r}; expected LORA"
    defaults = LoraConfig().to_dict()
    strange = [name for name, value in fields.items() if value and value != defaults.get(name)]
    if strange := sorted(set(strange) - {*_FIELDS, *_NOTES}):
        return f"sets {', '.join(strange)[:200]}; expected plain LoRA, which needs none of that"
    start = fields.get("init_lora_weights")
    if start not in _STARTS_THAT_LEAVE_THE_BASE:
        return f"started with {str(start)[:80]!r}, which changes the base model's weights; expected another start"
    names = [fields.get("modules_to_save"), fields.get("layers_pattern")]
    if not _is_pattern(fields.get("target_modules")):
        names += [fields.get("target_modules"), fields.get("exclude_modules")]
    names += [list(fields.get(pattern) or ()) for pattern in ("rank_pattern", "alpha_pattern")]
    for each in names:
        listed = [each] if isinstance(each, str) else each or []
        # PEFT takes a string for a regular expression, and one can be written that never ends.
        if not isinstance(listed, list) or not all(isinstance(n, str) and _MODULE_NAME.fullmatch(n) for n in listed):
            return f"names the modules {str(each)[:80]!r}; expected plain names such as q_proj"
    return None


def _is_pattern(modules: Any) -> bool:
    """Whether modules are named by a regular expression. It is never run: one can be written that never ends."""
    return isinstance(modules, str) and not _MODULE_NAME.fullmatch(modules)


def _last_part(name_or_path: str) -> str:
    """The last part of a path or a Hub name, printable: a stranger's text goes to a terminal."""
    name = public_name(name_or_path).split("/")[-1][:100]
    return "".join(character if character.isprintable() else "?" for character in name)
