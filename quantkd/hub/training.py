"""What a Trainer does on the Hub, done with private repositories and named files alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy, SaveStrategy

from quantkd.errors import ConfigError, HubError
from quantkd.hub.adapter import push_adapter, render_card
from quantkd.hub.failures import TransientHubError, wait_to_retry
from quantkd.hub.repository import HubRepository

logger = logging.getLogger(__name__)

_CARD = "README.md"
_OPTIONS = ("licence", "base_model", "run_dir")
_ATTEMPTS = 8
_ATTEMPTS_WHILE_TRAINING = 2


class PushesToHub:
    """Stands before `Trainer` among a class's bases.

    The Trainer's own methods upload the output folder as it is, `training_args.bin` with its token included, into a
    repository that is public unless told otherwise.
    """

    args: Any
    state: Any
    control: Any
    callback_handler: Any
    is_world_process_zero: Any
    save_model: Any
    hub_model_id: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository of `args.hub_model_id`, private unless `args.hub_private_repo` is False."""
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ConfigError(
                f"hub_strategy is {self.args.hub_strategy.value!r}, which uploads optimizer and random states; "
                "expected 'end' or 'every_save', which upload the adapter."
            )
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).resolve().name
        repository = HubRepository(name, "model", token=token or self.args.hub_token)
        for failures in range(1, _ATTEMPTS + 1):
            try:
                repository.ensure(self._is_private(private))
                break
            except TransientHubError:
                if failures == _ATTEMPTS:
                    raise
                wait_to_retry(failures)
        self.hub_model_id = repository.repo_id
        self.push_in_progress = None  # the Trainer waits for it at the end; pushes here are done when they return

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **options: Any,
    ) -> Any:
        """Save the adapter and upload it with its tokenizer, chat template and page, as `quantkd push` does."""
        if not blocking:
            raise ConfigError("blocking is False; an adapter is small, and its upload is waited for. Leave it out.")
        if "license" in options:
            options["licence"] = options.pop("license")  # the Trainer's name for it
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:  # such as the Trainer's own for its page, which tell what here is known from the run
            raise ConfigError(
                f"push_to_hub was given {', '.join(unknown)}; expected {', '.join(_OPTIONS)}. The page is written from "
                "the run itself: leave the others out."
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return push_adapter(
            str(self.args.output_dir),
            self.hub_model_id,
            private=self._is_private(private),
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "Upload adapter",
            **options,
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the adapter's page into the output folder, where the Trainer would write its own."""
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            page = render_card(folder, self.hub_model_id or folder.resolve().name, licence=kwargs.get("license"))
            (folder / _CARD).write_text(page, encoding="utf-8")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Called by the Trainer after each save. A failure here does not end the training."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        progress = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch)}"
        try:
            push_adapter(
                checkpoint_folder,
                self.hub_model_id,
                private=self._is_private(None),
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                commit_message=f"Training in progress, {progress}",
                attempts=_ATTEMPTS_WHILE_TRAINING,
            )
        except HubError as error:
            logger.warning("The adapter of %s was not pushed. %s Training goes on.", progress, error)

    def _is_private(self, private: bool | None) -> bool:
        asked = self.args.hub_private_repo if private is None else private
        return asked is not False
