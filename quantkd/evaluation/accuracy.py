"""Accuracy of a model's own answers: GSM8K in the paper's protocol, and exact match on any prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate.utils import gather_object
from tqdm import tqdm

from quantkd.data.encoding import check_context, encode_prompt
from quantkd.data.gsm8k import STOP, build_prompt, extract_flexible, extract_strict
from quantkd.data.prompts import Example
from quantkd.errors import DataError
from quantkd.evaluation.generation import Generated, generate_greedy
from quantkd.evaluation.records import RecordFile, compute_model_fingerprint, compute_prompts_digest
from quantkd.evaluation.sharing import deal_batches, gather_rounds
from quantkd.hardware import process_state
from quantkd.models.generation import context_length
from quantkd.models.network import base_network

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerRecord:
    """One GSM8K question, what the model wrote, and both verdicts.

    Args:
        id: the row's place in the list that was evaluated.
        question: the question alone.
        prompt: the whole prompt as the model saw it, special tokens included.
        output: the model's answer.
        gold: the right number.
        prediction_strict: the number after `####`, None without one.
        prediction_flexible: the last number of the output, None without one.
        correct_strict: whether the strict prediction is right.
        correct_flexible: whether the flexible prediction is right.
        finished: False if the length limit cut the answer.
        output_tokens: the length of the answer.
    """

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
    """One prompt of any data set, and what the model wrote.

    Args:
        id: the example's place in the list that was evaluated.
        prompt: the whole prompt as the model saw it, special tokens included.
        output: the model's answer.
        completion: the data set's own answer, None where it has none.
        correct: whether output and completion are the same text, case and white space aside; None without completion.
        finished: False if the length limit cut the answer.
        output_tokens: the length of the answer.
    """

    id: int
    prompt: str
    output: str
    completion: str | None
    correct: bool | None
    finished: bool
    output_tokens: int


Record = TypeVar("Record", AnswerRecord, PromptRecord)


def evaluate_gsm8k(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    *,
    shots: Sequence[Mapping[str, str]] = (),
    batch_size: int = 8,
    max_new_tokens: int = 256,
    chat_template: bool = True,
    records_path: str | Path | None = None,
    share: bool = False,
    progress: bool = True,
) -> list[AnswerRecord]:
    """Let a model answer GSM8K questions greedily, and grade each answer in both ways.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        tokenizer: its tokenizer.
        rows: rows with `question` and `answer`, as `load_gsm8k` gives them.
        shots: rows of the training set, shown solved before each question: none for 0-shot, eight for 8-shot.
        batch_size: questions a batch; it changes the speed, and results by no more than floating-point rounding.
        max_new_tokens: the length limit of an answer.
        chat_template: False prompts with plain text, for a base model.
        records_path: a JSONL file that takes every prompt, output and verdict as they come; a partial file of the same
            model and items is taken up where it ended.
        share: deal the questions to all processes of the launcher (`accelerate launch`, `torchrun`), each of which
            holds the whole model and must make this same call; all return all records, and the main process writes.
        progress: show a progress bar if there is a terminal.

    Returns:
        One record a row, in the order of `rows`.

    Raises:
        DataError: no rows, an answer without `#### <number>`, no chat template where one was asked for, a prompt that
            does not fit into the model's context (the message names the row), or a records file of another evaluation.
    """
    golds = []
    for index, row in enumerate(rows):
        gold = extract_strict(row["answer"])
        if gold is None:
            raise DataError(f"Row {index} has the answer {row['answer']!r:.80}; expected `#### <number>` at its end.")
        golds.append(gold)

    def grade(answer: Generated, prompt: str) -> AnswerRecord:
        strict, flexible, gold = extract_strict(answer.text), extract_flexible(answer.text), golds[answer.index]
        return AnswerRecord(
            id=answer.index,
            question=rows[answer.index]["question"],
            prompt=prompt,
            output=answer.text,
            gold=gold,
            prediction_strict=strict,
            prediction_flexible=flexible,
            correct_strict=strict == gold,
            correct_flexible=flexible == gold,
            finished=answer.finished,
            output_tokens=answer.num_tokens,
        )

    prompts = [encode_prompt(tokenizer, build_prompt(r["question"], shots), chat_template=chat_template) for r in rows]
    limits = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "stop": STOP}
    description = f"GSM8K {len(shots)}-shot"
    return _answer(
        model, tokenizer, prompts, grade, AnswerRecord, golds, limits, records_path, share, progress, description
    )


def evaluate_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    chat_template: bool = True,
    records_path: str | Path | None = None,
    share: bool = False,
    progress: bool = True,
) -> list[PromptRecord]:
    """Let a model answer any prompts greedily; where a completion is given, compare by exact match."""

    def grade(answer: Generated, prompt: str) -> PromptRecord:
        completion = examples[answer.index].completion
        return PromptRecord(
            id=answer.index,
            prompt=prompt,
            output=answer.text,
            completion=completion,
            correct=None if completion is None else _normalize_text(answer.text) == _normalize_text(completion),
            finished=answer.finished,
            output_tokens=answer.num_tokens,
        )

    prompts = [encode_prompt(tokenizer, example.prompt, chat_template=chat_template) for example in examples]
    limits = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "stop": None}
    golds = [example.completion for example in examples]
    return _answer(
        model, tokenizer, prompts, grade, PromptRecord, golds, limits, records_path, share, progress, "Prompts"
    )


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    grade: Callable[[Generated, str], Record],
    kind: type[Record],
    golds: Sequence[str | None],
    limits: dict[str, Any],
    records_path: str | Path | None,
    share: bool,
    progress: bool,
    description: str,
) -> list[Record]:
    """Answer the prompts that the records file does not hold yet, and return all records in order."""
    if not prompts:
        raise DataError("There is nothing to evaluate: 0 rows were given; expected at least one.")
    # Before they are dealt: so that every process refuses the same row, by its number in the whole list.
    network = base_network(model)
    answers = [limits["max_new_tokens"]] * len(prompts)
    check_context([len(prompt) for prompt in prompts], answers, context_length(network))
    is_main = not share or process_state().is_main_process
    done: dict[int, Record] = {}
    file = None
    if records_path is not None and is_main:
        settings = {
            "model": compute_model_fingerprint(model),
            "prompts": compute_prompts_digest(prompts),
            "golds": list(golds),
            "max_new_tokens": limits["max_new_tokens"],
        }
        file = RecordFile(Path(records_path), settings)
        done = {record.id: record for record in (_from_json(kind, value, file.path) for value in file.existing)}
    if share:
        done = {record.id: record for record in gather_object(list(done.values()))}  # the main process has read them
    left = [index for index in range(len(prompts)) if index not in done]
    mine = deal_batches([len(prompts[index]) for index in left], limits["batch_size"], share)
    own = sorted(left[place] for batch in mine for place in batch)  # which `generate_greedy` cuts as they were dealt

    def answer() -> Iterator[list[Record]]:
        for batch in generate_greedy(model, tokenizer, [prompts[index] for index in own], **limits):
            numbered = [Generated(own[a.index], a.text, a.finished, a.num_tokens) for a in batch]
            yield [grade(a, str(tokenizer.decode(prompts[a.index]))) for a in numbered]

    quiet = None if progress and is_main else True  # None: shown where there is a terminal
    with tqdm(total=len(prompts), initial=len(done), desc=description, unit="answer", disable=quiet) as bar:
        for records in gather_rounds(answer(), -(-len(left) // limits["batch_size"]), share):
            done.update({record.id: record for record in records})
            if file is not None:
                file.append(asdict(record) for record in records)
            bar.update(len(records))
    if file is not None:
        file.sort(asdict(record) for record in done.values())
    return [done[index] for index in range(len(prompts))]


def _from_json(kind: type[Record], value: dict[str, Any], path: Path) -> Record:
    names = {field.name for field in fields(kind)}
    if set(value) != names:
        raise DataError(
            f"{path} holds a record with the keys {sorted(value)}; expected {sorted(names)}. "
            "Remove the file to evaluate anew."
        )
    return kind(**value)


def _normalize_text(text: str) -> str:
    return " ".join(text.casefold().split())
