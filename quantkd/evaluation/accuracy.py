"""Accuracy of a model's own greedy answers: GSM8K in the paper's protocol, and exact match on any prompts."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase, StoppingCriteria

from quantkd.data.encoding import check_context, check_ids, encode_prompts
from quantkd.data.gsm8k import STOP, build_prompt, extract_flexible, extract_strict
from quantkd.data.prompts import Example, check_shots
from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.arms import Accuracy, Arm, EvaluationSettings
from quantkd.evaluation.fingerprint import compute_model_fingerprint
from quantkd.evaluation.records import RecordFile, compute_digest, damaged, date_prompts
from quantkd.evaluation.sharing import deal_batches, gather_rounds, is_writer
from quantkd.foreign import is_plain_cache
from quantkd.hardware import send
from quantkd.models.generation import build_generation_config, cache_argument, generation_mode
from quantkd.models.network import base_network, context_length
from quantkd.models.weights import embedding_rows


@dataclass(frozen=True)
class AnswerRecord:
    """One GSM8K question, what the model wrote, and both verdicts; `finished` is False if the length limit cut it."""

    id: int
    question: str
    prompt: str
    output: str
    gold: str
    prediction_strict: str | None
    prediction_flexible: str | None
    correct_strict: bool
    correct_flexible: bool
    finished: bool
    output_tokens: int


@dataclass(frozen=True)
class PromptRecord:
    """One prompt of any data, and what the model wrote; `correct` by exact match, case and white space aside."""

    id: int
    prompt: str
    output: str
    completion: str | None
    correct: bool | None
    finished: bool
    output_tokens: int


@dataclass(frozen=True)
class Generated:
    """The answer to the prompt at `index`, without special tokens and stop text; `num_tokens` counts those, too."""

    index: int
    text: str
    finished: bool
    num_tokens: int


Record = TypeVar("Record", AnswerRecord, PromptRecord)
# A shorter prefix saves less than its own forward pass costs.
_MIN_PREFIX_TOKENS = 16
# Half of them are written for nothing after the last row's stop text.
_TOKENS_PER_LOOK = 8


@dataclass(frozen=True)
class Questions:
    """GSM8K questions for `evaluate_arm`.

    Args:
        rows: what to answer, as `load_gsm8k` gives them.
        few_shot: training rows that the shots are taken from, at least `max(shots)`; none of them is asked.
        shots: numbers of shots to answer with, such as (0, 8).

    Raises:
        ConfigError: too few `few_shot` rows.
        DataError: a shot that is one of the questions.
    """

    rows: Sequence[Mapping[str, str]]
    few_shot: Sequence[Mapping[str, str]] = ()
    shots: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        if min(self.shots, default=0) < 0:
            raise ConfigError(f"shots are {list(self.shots)}; expected numbers from 0 on.")
        if max(self.shots, default=0) > len(self.few_shot):
            raise ConfigError(f"{max(self.shots)} shots need as many training rows, found {len(self.few_shot)}.")
        shown = self.few_shot[: max(self.shots, default=0)]
        check_shots([row["question"] for row in self.rows], [shot["question"] for shot in shown])

    def measure(self, model: Any, tokenizer: Any, arm: Arm, place: Path, settings: EvaluationSettings) -> Iterator[Arm]:
        """Yield the arm after each number of shots; answers that are in its records are not asked for again."""
        for count in self.shots:
            path, shots = place / f"{arm.name}-{count}-shot.jsonl", self.few_shot[:count]
            given: dict[str, Any] = {"settings": settings, "records_path": path, "fingerprint": arm.fingerprint}
            records = evaluate_gsm8k(model, tokenizer, self.rows, shots=shots, **given)
            graders = ("correct_flexible", "correct_strict")
            verdicts = {grader: [getattr(record, grader) for record in records] for grader in graders}
            answers = [record.prediction_flexible for record in records]
            _, dated = date_prompts(tokenizer, path, settings.chat_template, settings.share)
            asked = {
                "prompts": compute_digest([record.prompt for record in records]),
                "golds": compute_digest([record.gold for record in records]),
                "max_new_tokens": settings.max_new_tokens,
                **dated,
            }
            arm = replace(arm, questions={**arm.questions, f"{count}-shot": Accuracy(verdicts, asked, answers)})
            yield arm


def evaluate_gsm8k(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    *,
    shots: Sequence[Mapping[str, str]] = (),
    settings: EvaluationSettings | None = None,
    records_path: str | Path | None = None,
    fingerprint: str | None = None,
) -> list[AnswerRecord]:
    """Let a model answer GSM8K questions greedily, and grade each answer in both ways.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        tokenizer: its tokenizer.
        rows: rows with `question` and `answer`, as `load_gsm8k` gives them.
        shots: rows of the training set, shown solved before each question: none for 0-shot, eight for 8-shot.
        settings: batch size, length limit, chat template, and whether processes share the questions.
        records_path: a JSONL file that takes every prompt, output and verdict as they come; a partial file of the same
            model and items is taken up where it ended.
        fingerprint: the model's, if it was computed before; it says whose records the file holds.

    Returns:
        One record a row, in the order of `rows`.

    Raises:
        DataError: no rows, an answer without `#### <number>`, a shot that is one of the rows, no chat template where
            one was asked for, a prompt that does not fit into the model's context or vocabulary (the message names the
            row), or a records file of another evaluation.
    """
    check_shots([row["question"] for row in rows], [shot["question"] for shot in shots])
    golds = []
    for index, row in enumerate(rows):
        gold = extract_strict(row["answer"])
        if gold is None:
            raise DataError(f"Row {index} has the answer {row['answer']!r:.80}; expected `#### <number>` at its end.")
        golds.append(gold)

    def grade(answer: Generated, prompt: str) -> AnswerRecord:
        strict, flexible, gold = extract_strict(answer.text), extract_flexible(answer.text), golds[answer.index]
        return AnswerRecord(
            answer.index, rows[answer.index]["question"], prompt, answer.text, gold, strict, flexible, strict == gold,
            flexible == gold, answer.finished, answer.num_tokens,
        )  # fmt: skip

    asked = [build_prompt(row["question"], shots) for row in rows]
    task = _Task(AnswerRecord, f"GSM8K {len(shots)}-shot", asked, golds, grade, STOP)
    return _answer(model, tokenizer, task, settings or EvaluationSettings(), records_path, fingerprint)


def evaluate_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    settings: EvaluationSettings | None = None,
    records_path: str | Path | None = None,
) -> list[PromptRecord]:
    """Let a model answer any prompts greedily; where a completion is given, compare by exact match."""

    def grade(answer: Generated, prompt: str) -> PromptRecord:
        completion = examples[answer.index].completion
        correct = None if completion is None else answer.text.casefold().split() == completion.casefold().split()
        return PromptRecord(answer.index, prompt, answer.text, completion, correct, answer.finished, answer.num_tokens)

    golds = [example.completion for example in examples]
    task = _Task(PromptRecord, "Prompts", examples, golds, grade)
    return _answer(model, tokenizer, task, settings or EvaluationSettings(), records_path, None)


@dataclass(frozen=True)
class _Task(Generic[Record]):
    """What is asked, and how an answer becomes a record."""

    kind: type[Record]
    description: str
    asked: Sequence[Any]
    golds: Sequence[str | None]
    grade: Callable[[Generated, str], Record]
    stop: str | None = None


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: _Task[Record],
    settings: EvaluationSettings,
    records_path: str | Path | None,
    fingerprint: str | None,
) -> list[Record]:
    """Answer the prompts that the records file does not hold yet, and return all records in order."""
    if not task.asked:
        raise DataError("There is nothing to evaluate: 0 rows were given; expected at least one.")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ConfigError("The model has a prompt-learning adapter; evaluation takes LoRA-like ones. Merge it first.")
    network, limit, share = base_network(model), settings.max_new_tokens, settings.share
    dating, dated = date_prompts(tokenizer, records_path, settings.chat_template, share)
    prompts = encode_prompts(dating, task.asked, chat_template=settings.chat_template)
    check_ids(tokenizer, prompts, embedding_rows(network))
    check_context([len(prompt) for prompt in prompts], [limit] * len(prompts), context_length(network))
    file, done = None, {}
    if records_path is not None:
        facts = {
            "model": fingerprint or compute_model_fingerprint(model),
            "prompts": compute_digest(prompts),
            "golds": list(task.golds),
            "max_new_tokens": limit,
            **dated,
        }
        file = RecordFile(Path(records_path), facts, task.kind, len(prompts), share=share)
        for line, record in enumerate(file.existing, start=1):
            count = min(max(record.output_tokens, 1 if record.finished else limit), limit)
            answer = Generated(record.id, record.output, record.finished, count)
            again = vars(task.grade(answer, str(tokenizer.decode(prompts[record.id]))))
            for name, found in vars(record).items():
                if found != again[name]:
                    raise damaged(file.path, line, f"{name} is {found!r:.80}, expected {again[name]!r:.80}")
        done = {record.id: record for record in file.existing}
    left = [index for index in range(len(prompts)) if index not in done]
    mine = deal_batches([len(prompts[index]) for index in left], settings.batch_size, share)
    batches = [[left[place] for place in batch] for batch in mine]
    answers = (
        [task.grade(one, str(tokenizer.decode(prompts[one.index]))) for one in batch]
        for batch in generate_greedy(network, tokenizer, prompts, batches, limit, task.stop)
    )
    quiet = None if settings.progress and is_writer(share) else True  # None: shown where there is a terminal
    with tqdm(total=len(prompts), initial=len(done), desc=task.description, unit="answer", disable=quiet) as bar:
        for records in gather_rounds(answers, -(-len(left) // settings.batch_size), share):
            done.update({record.id: record for record in records})
            if file is not None:
                file.append(asdict(record) for record in records)
            bar.update(len(records))
    if file is not None:
        file.replace(asdict(record) for record in done.values())
    return [done[index] for index in range(len(prompts))]


def generate_greedy(
    network: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batches: Sequence[list[int]],
    max_new_tokens: int,
    stop: str | None = None,
) -> Iterator[list[Generated]]:
    """Answer prompts greedily, and hand out each batch, a list of places in `prompts`, as it is done."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    # Of the model's own settings only the end tokens are kept: two models are compared by their distributions alone.
    settings = build_generation_config(network, tokenizer, max_new_tokens)
    pad, asked = settings.pad_token_id, [prompts[index] for batch in batches for index in batch]
    with generation_mode(network, settings):
        prefix = find_shared_prefix(asked) if len(asked) > 1 else []
        cache = _compute_prefix_cache(network, prefix)
        prefix = prefix if cache is not None else []
        for indices in batches:
            # Rows are prefix + padding + rest: the prefix must be at the same slots as in its cache, the end of every
            # prompt at the right edge. `generate` derives positions from the mask, so this padding shifts none.
            rests = [list(prompts[index][len(prefix) :]) for index in indices]
            width = max(map(len, rests))
            rows = [prefix + [pad] * (width - len(rest)) + rest for rest in rests]
            masks = [[1] * len(prefix) + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests]
            ids, mask = (send(torch.tensor(numbers), network.device) for numbers in (rows, masks))
            stopper = _StopText(tokenizer, stop, ids) if stop else None
            kwargs: dict[str, Any] = {"stopping_criteria": [stopper] if stopper else None}
            if cache is not None:
                kwargs[cache_argument(network)] = repeated = copy.deepcopy(cache)
                repeated.batch_repeat_interleave(len(rows))
            with torch.inference_mode():
                out: Tensor = network.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **kwargs)
            written = out[:, len(rows[0]) :].tolist()
            if stopper:
                stopper.look(written)
            answers = []
            for row, (index, tokens) in enumerate(zip(indices, written, strict=True)):
                ends = [place for place, token in enumerate(tokens) if token in settings.eos_token_id]
                stopped = stopper.stopped_after[row] if stopper else None
                count = stopped if stopped is not None else ends[0] + 1 if ends else len(tokens)
                text = str(tokenizer.decode(tokens[:count], skip_special_tokens=True))
                text = text.split(stop)[0] if stopped is not None and stop else text
                answers.append(Generated(index, text, stopped is not None or bool(ends), count))
            yield answers


class _StopText(StoppingCriteria):
    """Ends each row of a batch where it first writes the stop text, and keeps after how many tokens that was."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str, prompts: Tensor) -> None:
        # Reading tokens waits for an accelerator, so several are read at a time; what a row writes beyond is cut off.
        self.tokenizer, self.stop, self.prompt_width = tokenizer, stop, prompts.shape[1]
        self.seen, self.every = 0, 1 if prompts.device.type == "cpu" else _TOKENS_PER_LOOK
        self.stopped_after: list[int | None] = [None] * len(prompts)
        self.is_done = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.shape[1] - self.prompt_width >= self.seen + self.every:
            self.look(input_ids[:, self.prompt_width :].tolist())
            self.is_done = send(torch.tensor([after is not None for after in self.stopped_after]), input_ids.device)
        return self.is_done

    def look(self, answers: list[list[int]]) -> None:
        """Look for the text at every token since the last look."""
        # No token is shorter than a byte, so as many tokens as the text has bytes reach back to its beginning.
        reach = len(self.stop.encode())
        for end in range(self.seen + 1, len(answers[0]) + 1):
            windows = [tokens[max(0, end - reach) : end] for tokens in answers]
            for row, text in enumerate(self.tokenizer.batch_decode(windows, skip_special_tokens=True)):
                if self.stopped_after[row] is None and self.stop in text:
                    self.stopped_after[row] = end
        self.seen = len(answers[0])


def find_shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, short enough that each prompt keeps one token of its own."""
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    shared = [tokens[0] for tokens in alike][: min(map(len, prompts)) - 1]
    return shared if len(shared) >= _MIN_PREFIX_TOKENS else []


def _compute_prefix_cache(network: Any, prefix: list[int]) -> DynamicCache | None:
    """The key-value cache of the prefix; None without a prefix, or for a cache without one entry per token."""
    cache = DynamicCache(config=network.config.get_text_config()) if prefix else None
    if cache is None or not is_plain_cache(cache):
        return None
    # Logits are of no use here, and over a long prefix they are larger than the cache.
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}
    with torch.inference_mode():
        ids = torch.tensor([prefix], device=network.device)
        network(input_ids=ids, use_cache=True, **{cache_argument(network): cache}, **few)
    return cache
