"""The 4-bit checkpoint that an adapter was trained on, to the Hub: other quantized weights do not fit the adapter."""

from __future__ import annotations

from pathlib import Path

from quantkd.errors import DataError
from quantkd.hub.cards import CARD_NAME, render_checkpoint_card
from quantkd.hub.repository import PUSH_ATTEMPTS, Files, HubRepository, PushedRepository, refuse_secrets
from quantkd.models.provenance import PROVENANCE_NAME, Provenance

# The first tells a repository of ours.
_FILES = (
    PROVENANCE_NAME, "config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.jinja",
    "tokenizer_config.json", "model*.safetensors",
)  # fmt: skip
# In these "/root" is a token like any other.
VOCABULARIES = (
    "added_tokens.json", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt",
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

    return repository.replace(make, "checkpoint", _FILES, "Upload 4-bit checkpoint", attempts)


def read_checkpoint(folder: Path, token: str | None) -> dict[str, Path]:
    """The files of a push without the page; refuses a secret or a local path in them, and other folders."""
    if "quantized_from" not in (Provenance.read(folder).export or {}):
        raise DataError(f"{folder} is not a checkpoint of `quantkd quantize`; expected one with {PROVENANCE_NAME}.")
    files = {path.name: path for each in (*_FILES, *VOCABULARIES) for path in sorted(folder.glob(each))}
    if not any(name.endswith(".safetensors") for name in files):
        raise DataError(f"{folder} holds no model*.safetensors. Take the folder that `quantkd quantize` wrote.")
    refuse_secrets(files, VOCABULARIES, token)
    return files
