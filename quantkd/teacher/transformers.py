"""The transformers teacher: answers prompts, or scores given answers, and keeps the entries as it goes."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quantkd.data.encoding import EncodedPrompt
from quantkd.errors import TeacherError
from quantkd.foreign import commit_of
from quantkd.hardware import chunk_bytes, send, wide_dtype
from quantkd.models.generation import build_generation_config, cache_argument, generation_mode
from quantkd.models.network import context_length
from quantkd.models.student import describe_quantization
from quantkd.teacher.teacher import GenerationSettings, Teacher, locate_targets, seed_of
from quantkd.transfer_set import TransferRow
from quantkd.transfer_set.fingerprint import count_token_ids
from quantkd.transfer_set.rules import PickedEntries, Sampled, StorageRule, pick_entries

logger = logging.getLogger(__name__)

# Families whose recurrent state takes in the padding before a prompt: they answer prompts of another length one by one.
_STATE_TAKES_PADDING = {"recurrent_gemma"}
# Random numbers are drawn for this many tokens at a time: each copy to a device takes as long as a small kernel.
_STEPS_PER_DRAW = 64


class TransformersTeacher(Teacher):
    """A causal language model of transformers as a teacher, in the dtype that it is loaded in."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        rule: StorageRule,
        temperatures: Sequence[float],
        settings: GenerationSettings,
        adapter: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            str(model.config.name_or_path),
            tokenizer,
            rule,
            temperatures,
            settings,
            # Rows that pad the head beyond the tokenizer are not counted.
            vocab_size=min(int(model.get_output_embeddings().weight.shape[0]), count_token_ids(tokenizer)),
            max_context=context_length(model),
            revision=commit_of(model.config),
            dtype=str(model.dtype).removeprefix("torch."),
        )
        quantization = describe_quantization(model)
        if quantization is not None:
            logger.warning("The teacher is quantized (%s), and its errors are taught with the rest.", quantization)
        self.model, self.facts = model, {"adapter": adapter, "quantization": quantization}
        self.config = build_generation_config(model, tokenizer, settings.max_new_tokens)

    def describe(self) -> dict[str, Any]:
        """Its adapter and quantization, if it has any."""
        return {name: fact for name, fact in self.facts.items() if fact}

    def answer(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """Generate one answer per prompt, in one batch, keeping the entries of each token as it is generated."""
        if self.model.config.model_type in _STATE_TAKES_PADDING and len({len(each.prompt_ids) for each in prompts}) > 1:
            return [row for prompt in prompts for row in self.answer([prompt])]
        input_ids, mask = self._pad(prompts, [[]] * len(prompts))
        width = input_ids.shape[1]
        recorder = _Recorder(self, prompts)
        with generation_mode(self.model, self.config), torch.inference_mode():
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=self.config,
                logits_processor=LogitsProcessorList([recorder]),
            )
        picks = _stack(recorder.picks)
        rows = []
        for position, (prompt, tokens) in enumerate(zip(prompts, output[:, width:].tolist(), strict=True)):
            ends = [place for place, token in enumerate(tokens) if token in self.config.eos_token_id]
            response = tokens[: ends[0] + 1] if ends else tokens
            rows.append(self._row(prompt, response, picks, position, range(len(response)), finished=bool(ends)))
        return rows

    def score(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """The entries of given answers, teacher-forced in one batch, in pieces that keep few logits in memory."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        # A second piece would begin with an empty recurrent state, and padding would enter it.
        is_recurrent = any("LinearAttention" in type(layer).__name__ for layer in cache.layers)
        if is_recurrent and len(prompts) > 1:
            return [row for prompt in prompts for row in self.score([prompt])]
        completions = [prompt.completion_ids or [] for prompt in prompts]
        input_ids, mask = self._pad(prompts, completions)
        width, end = max(len(prompt.prompt_ids) for prompt in prompts), input_ids.shape[1] - 1
        draws = _entry_draws(prompts, self.rule, self.settings.seed)
        piece = max(1, chunk_bytes(input_ids.device) // (4 * self.vocab_size * len(prompts)))
        # The columns whose logits predict a supervised token, and the place of each among the picks.
        columns = [[place + width - 1 - len(each.prompt_ids) for place in locate_targets(each)[2]] for each in prompts]
        places = {column: place for place, column in enumerate(sorted(set().union(*columns)))}
        picks: list[PickedEntries] = []
        parameters = inspect.signature(self.model.forward).parameters
        cached: dict[str, Any] = {"use_cache": not is_recurrent}
        if not is_recurrent:
            cached[cache_argument(self.model)] = cache
        borders = [0, end] if is_recurrent else [0, *range(width, end, piece), end]
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        with generation_mode(self.model, self.config), torch.inference_mode():
            for start, stop in itertools.pairwise(borders):
                first = max(start, width - 1)  # of the prompt, only what predicts the answer
                kwargs: dict[str, Any] = {"attention_mask": mask[:, :stop], "position_ids": position_ids[:, start:stop]}
                if "logits_to_keep" in parameters:
                    kwargs["logits_to_keep"] = stop - first
                outputs = self.model(input_ids=input_ids[:, start:stop], **kwargs, **cached)
                for column in range(first, stop):
                    logits = outputs.logits[:, column - stop, : self.vocab_size]
                    uniforms = draws.next(logits.device)  # at every step, so that a row's draws are its own
                    if column in places:
                        picks.append(pick_entries(logits, self.rule, self.temperatures, uniforms))
        stacked, rows = _stack(picks), zip(prompts, completions, columns, strict=True)
        ends = set(self.config.eos_token_id)
        return [
            self._row(each, ids, stacked, position, [places[column] for column in own], finished=ids[-1] in ends)
            for position, (each, ids, own) in enumerate(rows)
        ]

    def _pad(self, prompts: Sequence[EncodedPrompt], completions: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """(B, T) token ids and mask: all prompts end in one column, and the completions begin in the next."""
        width, steps = max(len(prompt.prompt_ids) for prompt in prompts), max(map(len, completions))
        rows, masks = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            sequence, before = prompt.prompt_ids + completion, width - len(prompt.prompt_ids)
            after, pad = steps - len(completion), [self.config.pad_token_id]
            rows.append(pad * before + sequence + pad * after)
            masks.append([0] * before + [1] * len(sequence) + [0] * after)
        return send(torch.tensor(rows), self.model.device), send(torch.tensor(masks), self.model.device)

    def _row(
        self,
        prompt: EncodedPrompt,
        response: list[int],
        picks: PickedEntries,
        position: int,
        places: Sequence[int],
        finished: bool,
    ) -> TransferRow:
        """One answer with its entries, those of `places` in the picks, refused if a logit was not finite."""
        steps = torch.as_tensor(places)
        finite = picks.is_finite[steps, position]
        if not bool(finite.all()):
            place = int((~finite).nonzero()[0])
            raise TeacherError(
                f"The teacher's logits for prompt {prompt.index} are not finite at response position {place}. "
                "Expected finite numbers: load the teacher in bfloat16 or float32 instead of float16 (--dtype), "
                "or check its weights."
            )
        keep = picks.keep[steps, position]
        sequence = prompt.prompt_ids + response
        return TransferRow(
            input_ids=np.asarray(sequence, dtype=np.int64),
            spans=np.asarray(prompt.spans or [(len(prompt.prompt_ids), len(sequence))], dtype=np.int64),
            counts=keep.sum(-1).numpy(),
            token_ids=picks.token_ids[steps, position][keep].numpy(),
            logprobs=picks.logprobs[steps, position][keep].float().numpy(),
            log_normalizers=picks.log_normalizers[steps, position].float().numpy(),
            finished=finished,
        )


class _Draws:
    """Uniform numbers: each row of a batch has a stream of its own, which does not depend on the batch it is in."""

    def __init__(
        self, prompts: Sequence[EncodedPrompt], seed: int, purpose: str, count: int, dtype: torch.dtype = torch.float32
    ) -> None:
        seeds = [seed_of(seed, prompt.index, purpose, bits=63) for prompt in prompts]
        self.generators = [torch.Generator().manual_seed(each) for each in seeds]
        self.shape, self.dtype = (_STEPS_PER_DRAW, count), dtype
        self.steps: Iterator[Tensor] = iter(())

    def next(self, device: torch.device) -> Tensor:
        """(B, count) for the next step."""
        if (step := next(self.steps, None)) is None:
            drawn = [torch.rand(self.shape, generator=each, dtype=self.dtype) for each in self.generators]
            self.steps = iter(send(torch.stack(drawn, dim=1).to(wide_dtype(device)), device))
            step = next(self.steps)
        return step


def _entry_draws(prompts: Sequence[EncodedPrompt], rule: StorageRule, seed: int) -> _Draws:
    """(B, n) for the entries of `Sampled(n)`; other rules draw nothing."""
    return _Draws(prompts, seed, "entries", rule.n if isinstance(rule, Sampled) else 0)


class _Recorder(LogitsProcessor):
    """Keeps the entries of every step from the raw logits, then, if asked, samples the token from filtered ones."""

    def __init__(self, teacher: Teacher, prompts: Sequence[EncodedPrompt]) -> None:
        settings = self.settings = teacher.settings
        self.vocab_size, self.rule, self.temperatures = teacher.vocab_size, teacher.rule, teacher.temperatures
        self.entry_draws = _entry_draws(prompts, teacher.rule, settings.seed)
        self.token_draws = _Draws(prompts, settings.seed, "tokens", 1, torch.float64)
        self.picks: list[PickedEntries] = []
        self.warpers: Any = LogitsProcessorList()
        if settings.generation_temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(settings.generation_temperature))
        if settings.top_k:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        padded = scores.shape[-1] - self.vocab_size
        logits = scores[:, : self.vocab_size]
        uniforms = self.entry_draws.next(scores.device)
        self.picks.append(pick_entries(logits, self.rule, self.temperatures, uniforms))
        if not self.settings.do_sample:
            return torch.nn.functional.pad(logits, (0, padded), value=-torch.inf) if padded else scores
        # The draw is ours, by inverse transform from the row's own stream, and `generate` takes its maximum: so a row
        # samples the same answer in any batch, which torch.multinomial on one global stream cannot give.
        cumulative = self.warpers(input_ids, logits).to(wide_dtype(logits.device)).softmax(-1).cumsum(-1)
        draws = self.token_draws.next(scores.device) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, draws, right=True).clamp_max(self.vocab_size - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def _stack(picks: list[PickedEntries]) -> PickedEntries:
    """(steps, B, ...) on the CPU: one transfer per batch instead of one per token."""
    return PickedEntries(
        **{each.name: torch.stack([getattr(pick, each.name) for pick in picks]).cpu() for each in fields(PickedEntries)}
    )
