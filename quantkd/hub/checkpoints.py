"""The 4-bit checkpoint that an adapter was trained on, to the Hub: other quantized weights do not fit the adapter."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from safetensors import SafetensorError, safe_open

from quantkd.errors import DataError
from quantkd.hub.cards import CARD_NAME, check_license, render_checkpoint_card
from quantkd.hub.repository import PUSH_ATTEMPTS, HubRepository, Operation, PushedRepository
from quantkd.models.provenance import PROVENANCE_NAME, Provenance
from quantkd.remote import check_shareable, find_secrets, retry

_CONFIG, _WEIGHTS = "config.json", "model*.safetensors"
_TEXTS = (_CONFIG, "generation_config.json", "model.safetensors.index.json", "chat_template.jinja", PROVENANCE_NAME)
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def push_checkpoint(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    attempts: int = PUSH_ATTEMPTS,
) -> PushedRepository:
    """Upload a checkpoint of `quantize` or of trained scales as a model repository, in one commit."""
    check_license(license)
    repository = HubRepository(repo_id, "model", token=token, branch=revision)
    files, facts = read_checkpoint(folder, token), Provenance.read(folder)

    def push() -> PushedRepository:
        repository.ensure(private)
        commit, there = repository.read(_CONFIG.__eq__, "checkpoint")
        page = render_checkpoint_card(repository.repo_id, facts, license=license).encode()
        added = [CommitOperationAdd(name, content) for name, content in {CARD_NAME: page, **files}.items()]
        # One file in place of several, or the other way round: transformers would load those of the push before.
        stale = [name for name in there if name not in files and (name in _TEXTS or fnmatch(name, _WEIGHTS))]
        operations: list[Operation] = [*added, *map(CommitOperationDelete, stale)]
        return repository.commit(operations, "Upload 4-bit checkpoint", commit)

    return retry(push, attempts)


def read_checkpoint(folder: Path, token: str | None) -> dict[str, bytes | Path]:
    """The files of a push without the page; refuses a secret or a local path in them, and other folders."""
    secrets = find_secrets(token)
    if "quantized_from" not in (Provenance.read(folder).export or {}):
        raise DataError(f"{folder} is not a checkpoint of `quantkd quantize`; expected one with {PROVENANCE_NAME}.")
    texts = {name: (folder / name).read_bytes() for name in (*_TEXTS, *_TOKENIZER) if (folder / name).is_file()}
    weights = sorted(folder.glob(_WEIGHTS))
    for name, data in texts.items():
        check_shareable(name, data, secrets, paths=name not in _TOKENIZER)
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                header = f"{file.metadata()} {list(file.keys())}".encode()
        except SafetensorError as error:
            raise DataError(f"{path} is not a safetensors file: {error}. Write the checkpoint again.") from error
        check_shareable(path.name, header, secrets)
    return {**texts, **{path.name: path for path in weights}}
