"""Adapters on the Hub: pushed with a page and nothing private; loaded onto the caller's model, without pickles."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel

from quantkd.errors import DataError, HubError
from quantkd.files import read_object, write_file
from quantkd.hub.cards import CARD_NAME, check_license, render_adapter_card, render_checkpoint_card
from quantkd.hub.checkpoints import push_checkpoint, read_checkpoint
from quantkd.hub.repository import PUSH_ATTEMPTS, Files, HubRepository, PushedRepository, refuse_secrets
from quantkd.models import adapter_files
from quantkd.models.adapter_files import CONFIG, PICKLE, WEIGHTS, check_files
from quantkd.models.cpu_repacking import keep_trainable_on_cpu
from quantkd.models.provenance import PROVENANCE_NAME, Provenance, find_base, require_base
from quantkd.models.student import load_student
from quantkd.names import is_repository_name, public_name, require_folder, split_revision
from quantkd.remote import VOCABULARIES, RemoteFiles, logger as revisions, retry

logger = logging.getLogger(__name__)

_CHART, _TOKENIZER_CONFIG, _CHAT_TEMPLATE = "gap.png", "tokenizer_config.json", "chat_template.jinja"
# With the page and the weights all that is ever pushed: training_args.bin can hold a token, and nobody knows what the
# next library leaves behind.
_OWNED = (CONFIG, _CHART, PROVENANCE_NAME, _TOKENIZER_CONFIG, _CHAT_TEMPLATE, *VOCABULARIES)
_TOKENIZER_PATHS = ("name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file")


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
    `private=False` makes a new repository public, and is needed to push to one that is. The 4-bit checkpoint that a
    run made for its adapter is pushed first, to `repo_id` with `-4bit` at its end, and is the base model; `base_model`
    names another place for it, and is needed for other local folders. `run_dir` holds the report for the page: by
    default the adapter's folder or the one above. `attempts` failures in a row that may not come again end the push.
    """
    check_license(license)
    folder = find_adapter(path)
    base_model = base_model or None  # of a shell's empty variable
    made = _find_made(folder, base_model, token)
    files, values = _gather(folder, base_model if made is None else f"{repo_id}-4bit", run_dir)

    def make(name: str) -> Files:
        return {**files, CARD_NAME: render_adapter_card(name, license=license, **values).encode()}

    refuse_secrets(make(repo_id), token)
    repository = HubRepository(repo_id, "model", private, token, revision)
    if made is not None:
        read_checkpoint(made, token)  # refused before a repository is made
        retry(repository.ensure, attempts)  # and looked at before gigabytes go to the other one
        retry(lambda: repository.read(lambda names: CONFIG in names, "adapter"), attempts)
        pushed = push_checkpoint(made, f"{repo_id}-4bit", private, license, token, revision, attempts)
        # With the owner's name, and as it is now: a later push may bring other codes.
        files, values = _gather(folder, pushed.repo_id, run_dir, pushed.commit)
    if not is_repository_name(base := values["adapter"]["base_model_name_or_path"]):
        logger.warning("The page names the base model %r, a local folder: name it with --base_model user/model.", base)
    if values["facts"].has_chosen_codes:
        logger.warning("The GGUF file of this adapter has chosen codes, and no other of its name fits: upload it, too.")
    return repository.replace(make, lambda names: CONFIG in names, "adapter", _OWNED, commit_message, attempts)


def list_adapter_files(
    path: str | Path, *, base_model: str | None = None, run_dir: str | Path | None = None
) -> list[tuple[str, int]]:
    """The names and sizes of what a push would upload, those of the base's repository after NAME-4bit/."""
    folder = find_adapter(path)
    made = _find_made(folder, base_model or None, None)
    files, values = _gather(folder, base_model or None, run_dir)
    files[CARD_NAME] = render_adapter_card("user/name", license=None, **values).encode()
    refuse_secrets(files, None)
    if made is not None:
        page = render_checkpoint_card("user/name-4bit", Provenance.read(made), license=None).encode()
        base: Files = {CARD_NAME: page, **read_checkpoint(made, None)}
        files |= {f"NAME-4bit/{name}": content for name, content in base.items()}
    return sorted((name, len(each) if isinstance(each, bytes) else each.stat().st_size) for name, each in files.items())


def _find_made(folder: Path, base_model: str | None, token: str | None) -> Path | None:
    """The 4-bit checkpoint that is to be pushed with an adapter; None if there is none, or if it is on the Hub."""
    check_files(str(folder), lambda name: (folder / name).is_file())
    facts, named = Provenance.read(folder), read_object(folder / CONFIG).get("base_model_name_or_path")
    is_elsewhere = base_model is not None and not os.path.isdir(base_model)
    if base_model and is_elsewhere and facts.has_own_base and base_model != named:
        found = RemoteFiles(base_model, "model", None, token).fetch(PROVENANCE_NAME, adapter_files.MAX_CONFIG_BYTES)
        if found is not None and find_base(folder, given=str(found.parent), scaled=facts.has_scales, beside=False):
            return None
    made = require_base(folder, base_model, beside=base_model is None)
    return None if is_elsewhere or facts.has_chosen_codes else made


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
    """The adapters directly below a folder, without checkpoints and the start and control of a comparison."""
    found = sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))
    return [each for each in found if not re.search("^checkpoint-|-(control|start)$", each.name)]


def _find_report(folder: Path) -> Path | None:
    """The folder of this adapter's report: its own, or the one above if that holds no other adapter."""
    above = folder.resolve().parent
    places = [folder, *([above] if len(_adapters_in(above)) == 1 else [])]
    return next((place for place in places if (place / "results.json").is_file()), None)


def _gather(
    folder: Path, base_model: str | None, run_dir: str | Path | None, commit: str | None = None
) -> tuple[dict[str, Path | bytes], dict[str, Any]]:
    """The files of a push without the page, and the values that the page is rendered from."""
    values = _describe(folder, base_model, commit)
    if not values["adapter"]["base_model_name_or_path"]:
        raise DataError(f"{folder / CONFIG} names no base model; pass base_model (--base_model).")
    files: dict[str, Path | bytes] = {CONFIG: _to_json(values["adapter"]), WEIGHTS: folder / WEIGHTS}
    if values["facts"] != Provenance():
        files[PROVENANCE_NAME] = values["facts"].to_json().encode()
    files |= {name: folder / name for name in (*VOCABULARIES, _CHAT_TEMPLATE) if (folder / name).is_file()}
    if (folder / _TOKENIZER_CONFIG).is_file():
        config = read_object(folder / _TOKENIZER_CONFIG)
        paths = {key: public_name(str(config[key])) for key in _TOKENIZER_PATHS if config.get(key)}
        files[_TOKENIZER_CONFIG] = _to_json({**config, **paths})
    report = _find_report(folder) if run_dir is None else Path(run_dir)
    if report is not None:
        file = report / "results.json"
        values["results"] = read_object(file) if file.is_file() else {}
        if values["results"].get("format_version") != 1:
            raise DataError(f"{report} holds no results.json of `quantkd report`. Run that, or name another run_dir.")
        if (report / _CHART).is_file():
            files[_CHART], values["chart"] = report / _CHART, True
    return files, values


def _describe(folder: Path, base_model: str | None, commit: str | None = None) -> dict[str, Any]:
    """What the page of an adapter says without a report: its configuration and provenance, without local paths."""
    adapter = read_object(folder / CONFIG)
    if commit or base_model not in (None, adapter.get("base_model_name_or_path")):
        adapter["revision"] = commit  # of the base model
    adapter["base_model_name_or_path"] = public_name(base_model or str(adapter.get("base_model_name_or_path") or ""))
    tokenizer = read_object(folder / _TOKENIZER_CONFIG) if (folder / _TOKENIZER_CONFIG).is_file() else {}
    has_template = bool(tokenizer.get("chat_template")) or (folder / _CHAT_TEMPLATE).is_file()
    return {
        "adapter": adapter, "facts": Provenance.read(folder), "results": None, "chart": False,
        "tokenizer": bool(tokenizer), "chat_template": has_template,
    }  # fmt: skip


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

    The base model that the adapter names is compared and never loaded; one with other quantized weights than those that
    `quantkd.json` records is refused. Only safetensors are read. The commit is logged, and is `hub_revision` of the
    model. A `base` given by name is loaded by `load_student`, which takes `model_kwargs`, without remote code.
    """
    place, folder, _ = _find(str(adapter), revision, token)
    config, weights, named = adapter_files.read_plain_lora(folder, place)
    model = load_student(base, **{"trust_remote_code": False, **model_kwargs}) if isinstance(base, str) else base
    own = public_name(model.config.name_or_path or "")
    adapter_files.warn_of_another_base(place, named, own)
    Provenance.read(folder).check_weights(model, place)
    config.inference_mode = not is_trainable
    try:
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
        files.fetch(CARD_NAME, adapter_files.MAX_CONFIG_BYTES)
    return folder


def _find(adapter: str, revision: str | None, token: str | None) -> tuple[str, Path, RemoteFiles | None]:
    """Where an adapter is, as it is printed; the folder of its two files; and the repository if it is on the Hub."""
    name, revision = split_revision(adapter, revision)
    folder = Path(adapter).expanduser()
    if name is None:
        require_folder(adapter)
        check_files(adapter, lambda file: (folder / file).is_file())
        return adapter, folder, None
    files = RemoteFiles(name, "model", revision, token)
    # Files of one commit share a folder of the cache.
    limits = {CONFIG: adapter_files.MAX_CONFIG_BYTES, WEIGHTS: 2**36}
    fetched = {file: path for file, limit in limits.items() if (path := files.fetch(file, limit)) is not None}
    check_files(str(files), lambda file: file in fetched or (file == PICKLE and files.holds(file)))
    revisions.info("Adapter %s", files)
    try:
        files.fetch(PROVENANCE_NAME, adapter_files.MAX_CONFIG_BYTES)
    except HubError as error:  # it may not be there, and without a network nobody knows
        logger.warning("%s Whether the base model is the one that the adapter corrects is not checked.", error)
    folder = fetched[CONFIG].parent
    if Provenance.read(folder).has_scales:
        if not is_offline_mode():
            files.fetch(adapter_files.SCALES_NAME, 2**36)
        check_files(str(files), lambda file: (folder / file).is_file())
    return str(files), folder, files
