"""The 4-bit checkpoint that an adapter was trained on, to the Hub: other quantized weights do not fit the adapter."""

from __future__ import annotations

from pathlib import Path

from quantkd.errors import DataError
from quantkd.hub.cards import CARD_NAME, render_checkpoint_card
from quantkd.hub.repository import PUSH_ATTEMPTS, Files, HubRepository, PushedRepository, refuse_secrets
from quantkd.models.provenance import PROVENANCE_NAME, Provenance

_FILES = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.jinja", PROVENANCE_NAME,
    "model*.safetensors",
)  # fmt: skip
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


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
        return {CARD_NAME: render_checkpoint_card(name, facts, license=license).encode(), **files}

    return repository.replace(make, "checkpoint", _FILES, "Upload 4-bit checkpoint", attempts)


def read_checkpoint(folder: Path, token: str | None) -> dict[str, Path]:
    """The files of a push without the page; refuses a secret or a local path in them, and other folders."""
    if "quantized_from" not in (Provenance.read(folder).export or {}):
        raise DataError(f"{folder} is not a checkpoint of `quantkd quantize`; expected one with {PROVENANCE_NAME}.")
    files = {path.name: path for each in (*_FILES, *_TOKENIZER) for path in sorted(folder.glob(each))}
    refuse_secrets(files, _TOKENIZER, token)
    return files
