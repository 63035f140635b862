"""The 4-bit checkpoint that an adapter was trained on, to the Hub: other quantized weights do not fit the adapter."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd
from safetensors import SafetensorError, safe_open

from quantkd.errors import DataError
from quantkd.hub.cards import CARD_NAME, check_license, render_checkpoint_card
from quantkd.hub.repository import PUSH_ATTEMPTS, HubRepository, PushedRepository
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
    attempts: int = PUSH_ATTEMPTS,
) -> PushedRepository:
    """Upload a checkpoint of `quantize` or of trained scales as a model repository, in one commit."""
    check_license(license)
    facts, secrets = Provenance.read(folder), find_secrets(token)
    made = facts.export or {}
    if "quantized_from" not in made:
        raise DataError(f"{folder} is not a checkpoint of `quantkd quantize`; expected one with {PROVENANCE_NAME}.")
    repository = HubRepository(repo_id, "model", token=token)
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

    def push() -> PushedRepository:
        repository.ensure(private)
        commit, _ = repository.read(_CONFIG.__eq__, "checkpoint")
        page = render_checkpoint_card(repository.repo_id, facts, license=license).encode()
        files: dict[str, bytes | Path] = {CARD_NAME: page, **texts, **{path.name: path for path in weights}}
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        return repository.commit(added, "Upload 4-bit checkpoint", commit)

    return retry(push, attempts)
