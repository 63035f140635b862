"""The vLLM teacher, in process: its engine answers or scores, and gives the log-probabilities of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkd.data.encoding import EncodedPrompt
from quantkd.errors import ConfigError, MissingDependencyError, TeacherError
from quantkd.foreign import commit_of, keep_commit
from quantkd.models.generation import find_end_tokens
from quantkd.teacher.logprobs import RowBuilder, TopLogprobs, check_rule
from quantkd.teacher.teacher import GenerationSettings, Teacher, locate_targets, seed_of
from quantkd.transfer_set import TransferRow
from quantkd.transfer_set.fingerprint import count_token_ids
from quantkd.transfer_set.rules import StorageRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ENGINE = "vLLM"
# Other modes hand out what the sampler made of the distribution, or logits without their normalizer.
_LOGPROBS_MODE = "raw_logprobs"


class VLLMTeacher(Teacher):
    """A model run by vLLM in this process; `engine_kwargs` go to `vllm.LLM` (docs/engines.md)."""

    preferred_batch_size = 256

    def __init__(
        self,
        model_name: str,
        tokenizer: PreTrainedTokenizerBase,
        rule: StorageRule,
        temperatures: Sequence[float],
        settings: GenerationSettings,
        **engine_kwargs: Any,
    ) -> None:
        top_rule = check_rule(rule, temperatures, _ENGINE)
        mode = engine_kwargs.setdefault("logprobs_mode", _LOGPROBS_MODE)
        if mode != _LOGPROBS_MODE:
            raise ConfigError(f"vLLM must run with logprobs_mode={_LOGPROBS_MODE!r}, found {mode!r}; leave it out.")
        most = RowBuilder(_ENGINE, top_rule, 2**24, 0).width  # of a vocabulary that is not known yet
        limit = engine_kwargs.setdefault("max_logprobs", max(most, 64))
        if 0 <= limit < most:
            raise ConfigError(
                f"{rule} needs {most} log-probabilities per token, and max_logprobs={limit} allows fewer. "
                "Raise max_logprobs, or choose a smaller rule."
            )
        try:
            from vllm import LLM
        except ImportError as error:
            raise MissingDependencyError(
                f"The vLLM engine needs the package vllm, which cannot be imported here ({error}). "
                "Install it (pip install vllm), or take another --engine."
            ) from error
        self.llm: Any = LLM(model=model_name, **engine_kwargs)
        config = self.llm.model_config
        keep_commit(config.hf_config, config.revision)
        head_size = int(config.get_vocab_size())
        super().__init__(
            model_name,
            tokenizer,
            rule,
            temperatures,
            settings,
            # Rows that pad the head beyond the tokenizer count to the tail.
            vocab_size=min(head_size, count_token_ids(tokenizer)),
            max_context=int(config.max_model_len),
            revision=commit_of(config.hf_config) or str(config.revision or ""),
            dtype=str(config.dtype).removeprefix("torch."),
        )
        self.rows = RowBuilder(_ENGINE, top_rule, self.vocab_size, head_size)
        self.ends = find_end_tokens(tokenizer, config.try_get_generation_config().get("eos_token_id"))

    def describe(self) -> dict[str, Any]:
        """The engine."""
        return {"engine": "vllm"}

    def answer(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """Generate one answer per prompt, keeping the entries of each token."""
        settings = self.settings
        sampling = {"max_tokens": settings.max_new_tokens, **settings.sampling}
        parameters = [self._parameters(seed=seed_of(settings.seed, each.index), **sampling) for each in prompts]
        outputs = self._run([prompt.prompt_ids for prompt in prompts], parameters)
        rows = []
        for prompt, output in zip(prompts, outputs, strict=True):
            answer = output.outputs[0]
            response = list(answer.token_ids)
            sequence = prompt.prompt_ids + response
            spans = np.asarray([[len(prompt.prompt_ids), len(sequence)]], dtype=np.int64)
            finished = bool(response) and response[-1] in self.ends
            rows.append(self.rows.build(prompt.index, sequence, spans, _read(answer.logprobs), finished=finished))
        return rows

    def score(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """Keep the entries at every supervised token of given answers."""
        # The last token's are those of the one token that is generated: so an answer may fill the context to its end.
        located = [locate_targets(prompt) for prompt in prompts]
        parameters = self._parameters(max_tokens=1, temperature=0.0, prompt_logprobs=self.rows.width)
        outputs = self._run([sequence[:-1] for sequence, *_ in located], [parameters] * len(prompts))
        rows = []
        for prompt, (sequence, spans, places), output in zip(prompts, located, outputs, strict=True):
            scored = [_read(output.prompt_logprobs), _read(output.outputs[0].logprobs)]
            candidates = TopLogprobs.join(scored).select(places)
            rows.append(self.rows.build(prompt.index, sequence, spans, candidates, finished=sequence[-1] in self.ends))
        return rows

    def _parameters(self, **kwargs: Any) -> Any:
        """Sampling parameters with `width` entries per token, ending at our end tokens alone."""
        from vllm import SamplingParams

        return SamplingParams(
            logprobs=self.rows.width,
            detokenize=False,
            flat_logprobs=True,  # three lists per row instead of a dictionary per token
            ignore_eos=True,  # the ids that end an answer are those in `stop_token_ids`, for every engine alike
            stop_token_ids=self.ends,
            **kwargs,
        )

    def _run(self, prompts: list[list[int]], parameters: list[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs: list[Any] = self.llm.generate(inputs, parameters, use_tqdm=False)
        if len(outputs) != len(prompts):
            raise TeacherError(f"vLLM answered {len(outputs)} of {len(prompts)} prompts; its log says why.")
        return outputs


def _read(logprobs: Any) -> TopLogprobs:
    """vLLM's flat lists, or its list of one dictionary per token with None where a prompt begins."""
    if hasattr(logprobs, "start_indices"):
        counts = np.asarray(logprobs.end_indices, dtype=np.int64) - np.asarray(logprobs.start_indices, dtype=np.int64)
        return TopLogprobs(
            counts, np.asarray(logprobs.token_ids, dtype=np.int64), np.asarray(logprobs.logprobs, dtype=np.float64)
        )
    return TopLogprobs.from_pairs(
        [[(token, entry.logprob) for token, entry in (target or {}).items()] for target in logprobs or []]
    )
