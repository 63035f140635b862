"""The 4-bit checkpoint that an adapter was trained on, to the Hub: other quantized weights do not fit the adapter."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from quantkd.errors import DataError
from quantkd.files import read_object
from quantkd.hub.cards import CARD_NAME, render_checkpoint_card
from quantkd.hub.repository import PUSH_ATTEMPTS, Files, HubRepository, PushedRepository, refuse_secrets
from quantkd.models.adapter_files import CONFIG
from quantkd.models.provenance import PROVENANCE_NAME, Provenance
from quantkd.remote import VOCABULARIES

_INDEX = "model.safetensors.index.json"
_FILES = (
    "config.json", "generation_config.json", _INDEX, "chat_template.jinja", "tokenizer_config.json", PROVENANCE_NAME,
    "model*.safetensors",
)  # fmt: skip


def push_checkpoint(
    folder: Path,
    repo_id: str,
    private: bool = True,
    license: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    attempts: int = PUSH_ATTEMPTS,
) -> PushedRepository:
    """Upload a checkpoint of `quantize` or of trained scales as a model repository, in one commit."""
    files, facts = read_checkpoint(folder, token), Provenance.read(folder)
    repository = HubRepository(repo_id, "model", private, token, revision)

    def make(name: str) -> Files:
        return {**files, CARD_NAME: render_checkpoint_card(name, facts, license=license).encode()}

    return repository.replace(make, _is_ours, "checkpoint", _FILES, "Upload 4-bit checkpoint", attempts)


def _is_ours(names: Collection[str]) -> bool:
    return PROVENANCE_NAME in names and CONFIG not in names


def read_checkpoint(folder: Path, token: str | None) -> dict[str, Path]:
    """The files of a push without the page; refuses a secret or a local path in them, and other folders."""
    if "quantized_from" not in (Provenance.read(folder).export or {}):
        raise DataError(f"{folder} is not a checkpoint of `quantkd quantize`; expected one with {PROVENANCE_NAME}.")
    files = {path.name: path for each in (*_FILES, *VOCABULARIES) for path in sorted(folder.glob(each))}
    shards = read_object(files[_INDEX]).get("weight_map") if _INDEX in files else None
    if lacking := set(map(str, (shards or {"": "model.safetensors"}).values())) - set(files):
        raise DataError(f"{folder} holds no {min(lacking)}. Take the folder that `quantkd quantize` wrote.")
    refuse_secrets(files, token)
    return files
