"""Capture around the teacher: filters, samples, batches that do not fit, the probe, and growing a finished set."""

import copy
from collections import Counter
from dataclasses import replace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from teacher_rows import dense_logprobs
from transformers import AutoModelForCausalLM

from quantkd import Nucleus, TopK, TransferSet
from quantkd.errors import ConfigError, DataError, TeacherError, TransferSetError
from quantkd.models.student import load_student
from quantkd.models.weights import embedding_rows
from quantkd.teacher import GenerationSettings, Teacher
from quantkd.teacher.filters import CorrectOnly, DropDuplicates, FinishedOnly, ResponseLength
from quantkd.transfer_set import TransferRow, TransferSetWriter
from quantkd.transfer_set.batch import DistillationCollator
from quantkd.transfer_set.index import read_begun_plan, read_index
from tests.conftest import build_tiny_model, capture_set, refused, save_adapter

PROMPTS = [f"What is {a} + {b}?" for a in range(3) for b in range(4)]
NEW = {"role": "assistant", "content": "<new>"}
ASKED = {"role": "user", "content": "1?"}


class FakeTeacher(Teacher):
    """Answers with a token for each of `lengths`, found by the row's number; no model is behind it."""

    def __init__(self, tokenizer, fits=10**9, lengths=(3, 1, 5, 2)):
        kwargs = {"vocab_size": len(tokenizer), "max_context": 400, "dtype": "float32"}
        super().__init__("fake", tokenizer, Nucleus(0.95), (1.0,), GenerationSettings(), **kwargs)
        self.fits, self.lengths, self.batches, self.failures = fits, lengths, [], 0

    def describe(self):
        return {"engine": "fake"}

    def answer(self, prompts):
        self.batches.append(len(prompts))
        if len(prompts) > self.fits:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [self.row(prompt) for prompt in prompts]

    score = answer

    def row(self, prompt):
        length = self.lengths[prompt.index % len(self.lengths)]
        ids = [*prompt.prompt_ids, *range(10, 10 + length)]
        return TransferRow(
            np.array(ids), spans=np.array([[len(prompt.prompt_ids), len(ids)]]), counts=np.ones(length, np.int64),
            token_ids=np.arange(10, 10 + length), logprobs=np.full(length, -0.25, np.float32),
            log_normalizers=np.zeros((length, 1), np.float32), finished=length != 5,
        )  # fmt: skip


def run(teacher, path, prompts=PROMPTS, **kwargs):
    return capture_set(teacher, prompts, path, **{"batch_size": 4, "rows_per_shard": 4, **kwargs})


def padded(model, rows):
    """The model with rows of its head, and embeddings, that no token of the tokenizer has, and that say much."""
    old = model.vocab_size
    model.resize_token_embeddings(old + rows, mean_resizing=False)
    model.lm_head.weight.data[old:] = 2 * model.lm_head.weight.data[:rows]
    return model


def test_what_filters_leave_out_is_counted_by_its_first_reason(tiny_tokenizer, tmp_path, caplog):
    def no_one_plus(example, text):
        return "1 +" not in example.prompt

    filters = [FinishedOnly(), ResponseLength(2, 3), no_one_plus]
    transfer_set = run(FakeTeacher(tiny_tokenizer), tmp_path / "s", filters=filters)
    # Of 12 rows 3 have 5 tokens and are cut, 3 have 1 token, and of the rest the middle four prompts hold two.
    assert Counter(len(row["teacher"]) for row in transfer_set) == {3: 2, 2: 2}
    counters = transfer_set.info.counters
    assert (counters["filtered_unfinished"], counters["filtered_short"], counters["filtered_no_one_plus"]) == (3, 3, 2)
    assert transfer_set.info.num_rows == 4 and transfer_set.info.num_prompts == 12
    refused(TransferSetError, "differ", run, FakeTeacher(tiny_tokenizer), tmp_path / "s")
    rows = [{"prompt": p, "completion": "#### 1" if i % 2 else "#### 2"} for i, p in enumerate(PROMPTS)]
    is_odd = CorrectOnly(verifier=lambda text, reference: reference.endswith("1"))
    kept = run(FakeTeacher(tiny_tokenizer), tmp_path / "odd", rows, filters=[is_odd])
    assert len(kept) == 6 and kept.info.counters["filtered_incorrect"] == 6 and not caplog.text
    assert len(run(FakeTeacher(tiny_tokenizer), tmp_path / "t", filters=[ResponseLength(9)])) == 0
    assert "No row passed the filters" in caplog.text
    for error, filters, options, message in (
        (DataError, [CorrectOnly()], {}, "no reference answer, and correct_only was asked for"),
        (ConfigError, [CorrectOnly()], {"responses": "given"}, "responses='given' takes the data set's"),
        (ConfigError, [], {"responses": "given", "max_new_tokens": 5}, "max_new_tokens has no effect here"),
        (ConfigError, [], {"auto_find_batch_size": True, "batch_size": 4}, "batch_size has no effect here"),
        (ConfigError, ["finished"], {}, "expected a filter of quantkd"),
    ):
        refused(error, message, run, FakeTeacher(tiny_tokenizer), tmp_path / "u", filters=filters, **options)
    refused(ConfigError, "1 <= min_response_tokens <= max_response_tokens", ResponseLength, 5, 2)


def test_duplicate_prompts_and_answers_are_dropped(tiny_model, tiny_tokenizer, tmp_path):
    kept = run(FakeTeacher(tiny_tokenizer), tmp_path / "s", [*PROMPTS, *PROMPTS[:5]], filters=[DropDuplicates()])
    assert len(kept) == 12 and kept.info.counters["filtered_duplicate_prompts"] == 5
    options = {"num_samples": 4, "do_sample": True, "generation_temperature": 1e-4, "filters": [DropDuplicates()]}
    options |= {"max_new_tokens": 4, "tokenizer": tiny_tokenizer}
    sampled = capture_set(tiny_model, PROMPTS[:2], tmp_path / "t", **options)
    assert len(sampled) == 2 and sampled.info.counters["filtered_duplicate"] == 6


def test_a_batch_too_large_is_refused_and_a_probe_is_asked_once(tiny_tokenizer, tmp_path):
    two, said = FakeTeacher(tiny_tokenizer, fits=2), r"Memory ran out twice in a batch of 4 prompts.*--batch_size 2"
    refused(TeacherError, said, run, two, tmp_path / "other")
    teacher, again, none = (FakeTeacher(tiny_tokenizer, fits=fits) for fits in (5, 5, 0))
    said = r"in a batch of 1 prompts, first prompt 0 of 28 tokens.*Shorten it"
    refused(TeacherError, said, run, none, tmp_path / "none", batch_size=1)
    found = {"auto_find_batch_size": True, "batch_size": 8}  # the default, which is not used
    for each in (teacher, again):
        run(each, tmp_path / "s", rows_per_shard=None, **found)
    chosen = read_index(tmp_path / "s").plan.batch_size
    assert chosen == 4 and max(teacher.batches[-12 // chosen :]) <= chosen and again.batches == []
    refused(TeacherError, "does not fit into memory", run, none, tmp_path / "t", **found)


@pytest.mark.parametrize("message", [
    "CUDA error: out of memory", "MPS backend out of memory (MPS allocated: 7 GB)",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory",
])  # fmt: skip
def test_an_unlucky_batch_is_tried_again_and_other_errors_pass_through(tiny_tokenizer, tmp_path, message):
    expected, unlucky = run(FakeTeacher(tiny_tokenizer), tmp_path / "t").digest, FakeTeacher(tiny_tokenizer)
    unlucky.answer = Mock(side_effect=[RuntimeError(message), *[DEFAULT] * 3], wraps=unlucky.answer)
    assert run(unlucky, tmp_path / "s").digest == expected
    unlucky.answer = Mock(side_effect=RuntimeError("shapes do not match"))
    refused(RuntimeError, "shapes do not match", run, unlucky, tmp_path / "u")


def test_a_teacher_of_ones_own_says_what_capture_asks(tiny_tokenizer, tmp_path):
    class Unfinished(Teacher):
        def answer(self, prompts):
            return []

    with pytest.raises(TypeError, match=r"describe.*score"):
        Unfinished("own", tiny_tokenizer, TopK(1), (1.0,), GenerationSettings(), vocab_size=320)
    for said, asked in (
        ("built with storage", {"storage": TopK(3)}),
        ("built with temperatures", {"temperatures": (1.0, 2.0)}),
        ("built with the generation settings", {"max_new_tokens": 5}),
        ("given by name; found a Teacher", {"dtype": "float32"}),
    ):
        refused(ConfigError, said, run, FakeTeacher(tiny_tokenizer), tmp_path / "s", **asked)


def test_an_adapter_of_the_teacher_is_part_of_the_plan(tiny_model_path, tiny_tokenizer, tmp_path):
    save_adapter(build_tiny_model(tiny_tokenizer), tmp_path / "adapter", target_modules=["q_proj"])
    options = {"model": tiny_model_path, "prompts": PROMPTS[:3], "max_new_tokens": 5}
    plain = capture_set(folder=tmp_path / "plain", **options)
    adapted = capture_set(folder=tmp_path / "adapted", teacher_adapter=str(tmp_path / "adapter"), **options)
    assert adapted.plan.extra["adapter"]["name"] == "adapter"
    assert adapted.digest != plain.digest and plain.info.teacher_name == tiny_model_path.name
    for file in (*(tmp_path / "plain").iterdir(), *(tmp_path / "adapted").iterdir()):
        assert not any(str(path).encode() in file.read_bytes() for path in (tmp_path, tiny_model_path.parent)), file
    refused(TransferSetError, "another plan", capture_set, folder=tmp_path / "adapted", **options)


def test_that_the_teacher_is_quantized_is_said_and_part_of_the_plan(tiny_model_path, tiny_tokenizer, tmp_path, caplog):
    teacher = load_student(str(tiny_model_path), dtype="float32")
    captured = capture_set(teacher, PROMPTS[:2], tmp_path / "s", tokenizer=tiny_tokenizer, max_new_tokens=5)
    assert captured.plan.extra["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert "The teacher is quantized" in caplog.text


def test_an_adapter_that_no_teacher_takes_is_refused_before_one_is_loaded(tiny_model_path, tmp_path, monkeypatch):
    save_adapter(AutoModelForCausalLM.from_pretrained(tiny_model_path), tmp_path / "adapter")
    monkeypatch.setattr("quantkd.teacher.loading.AutoModelForCausalLM", None)
    for name, content, said in (
        ("quantkd.json", '{"weights": {"sha256": "0123", "sums": []}}', "has no quantized weights; expected for the"),
        ("adapter_model.safetensors", "", "does not open"),
        ("adapter_config.json", '{"peft_type": "IA3"}', "is of the kind 'IA3'; expected LORA"),
    ):
        (tmp_path / "adapter" / name).write_text(content)
        with pytest.raises(DataError, match=said):
            capture_set(tiny_model_path, PROMPTS[:1], tmp_path / "s", teacher_adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "generation_temperature": 3.0}])
def test_padding_of_a_head_takes_no_part(tiny_tokenizer, tmp_path, sampling):
    ids = len(tiny_tokenizer)
    teacher = padded(build_tiny_model(tiny_tokenizer), 8)
    options = {"max_new_tokens": 8, "tokenizer": tiny_tokenizer, **sampling}
    generated = capture_set(teacher, PROMPTS[:4], tmp_path / "s", storage=TopK(ids), temperatures=(1.0, 2.0), **options)
    assert generated.info.vocab_size == ids
    given = [{"prompt": prompt, "completion": "She has 7."} for prompt in PROMPTS[:4]]
    own = {"storage": Nucleus(0.9, 16), "responses": "given", "tokenizer": tiny_tokenizer}
    scored = capture_set(teacher, given, tmp_path / "g", **own)
    for row in (*generated, *scored):
        assert int(row["input_ids"].max()) < ids and int(row["teacher"].token_ids.max()) < ids
        exact, entries = dense_logprobs(teacher, row)[:, :ids].log_softmax(-1), row["teacher"]
        assert torch.equal(entries.top_ids, exact.argmax(-1))
        first = entries.logprobs[entries.offsets[:-1]].double().exp()
        torch.testing.assert_close(first, exact.amax(-1).exp(), atol=4e-4, rtol=0)  # twice p |log p| / 2048
        if len(entries.temperatures) == 2:
            log_z = entries.log_normalizers[:, 1].double()
            torch.testing.assert_close(log_z, (exact / 2).logsumexp(-1), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("teachers", "students"), [(8, 3), (0, 8)])
def test_a_bigger_teacher_teaches_a_smaller_student(make_trainer, tiny_tokenizer, tmp_path, teachers, students):
    """As Qwen2.5-7B, with 152,064 rows, does Qwen2.5-0.5B, with 151,936, of 151,665 ids."""
    config = build_tiny_model(tiny_tokenizer).config
    config.hidden_size, config.num_hidden_layers, config.head_dim = 128, 3, 32
    torch.manual_seed(1)
    teacher = padded(AutoModelForCausalLM.from_config(config).eval(), teachers)
    padded(build_tiny_model(tiny_tokenizer), students).save_pretrained(tmp_path / "student")
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    made = capture_set(teacher, PROMPTS[:4], tmp_path / "s", max_new_tokens=8, tokenizer=tiny_tokenizer)
    options = {"max_steps": 3, "init": "covariance", "train_dataset": made, "eval_dataset": made}
    trainer = make_trainer(tmp_path / "student", **options)  # a path is taken as its text
    trainer.train()
    losses = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert len(losses) == 3 and losses[2] < losses[0] and np.isfinite(trainer.evaluate()["eval_kl"])


@pytest.mark.parametrize(("row", "options"), [
    ({"prompt": "one <new>?"}, {}), ({"prompt": "one?", "completion": "<new>"}, {"responses": "given"}),
    ({"prompt": "one?", "completion": "<new>"}, {"responses": "given", "chat_template": False}),
    ({"prompt": [NEW, ASKED]}, {}), ({"prompt": [ASKED, NEW]}, {"responses": "given"}),
])  # fmt: skip
def test_a_token_that_the_embedding_lacks_is_refused_by_row(tiny_model, tiny_tokenizer, tmp_path, row, options):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens("<new>")
    fine = {"prompt": "one?", "completion": "two"}
    with pytest.raises(DataError, match=r"Row 1 has the token id 320, '<new>', and the model has ids up to 319"):
        capture_set(tiny_model, [fine, row], tmp_path / "s", tokenizer=tokenizer, num_samples=1, **options)
    assert not (tmp_path / "s").exists()


def test_a_padding_token_without_a_row_changes_nothing(tiny_model, tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    for name, given in (("s", tiny_tokenizer), ("t", tokenizer)):
        capture_set(tiny_model, ["One?", "Two and two?"], tmp_path / name, tokenizer=given, max_new_tokens=4)
    rows = [TransferSet.open(tmp_path / name) for name in "st"]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(*rows, strict=True))
    collator = DistillationCollator.for_tokenizer(tokenizer, embedding_rows(tiny_model))
    assert collator(list(rows[0]))["input_ids"].max() < 320


def test_a_capture_goes_on_after_midnight(clock, tiny_model, tiny_tokenizer, tmp_path, monkeypatch, caplog):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    options = {"tokenizer": tokenizer, "max_new_tokens": 4, "rows_per_shard": 1, "batch_size": 1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TransferSetWriter, "finalize", Mock(side_effect=KeyboardInterrupt))
        capture_set(tiny_model, PROMPTS[:2], tmp_path / "s", **options)
    clock.day = "2026-01-01"
    for complete in (False, True):  # resumed, then opened
        found = capture_set(tiny_model, PROMPTS[:2], tmp_path / "s", **options)
        assert ("complete already" in caplog.text) == complete
    assert found.info.generation["date"] == "2025-12-31"
    assert tokenizer.decode(found[1]["input_ids"]).startswith("31 Dec 2025 <|im_start|>")
    new = capture_set(tiny_model, PROMPTS[:2], tmp_path / "new", **options)
    assert tokenizer.decode(new[1]["input_ids"]).startswith("01 Jan 2026 ")
    plan = replace(read_begun_plan(tmp_path / "s"), generation={"date": "soon"})
    monkeypatch.setattr("quantkd.teacher.capture.read_begun_plan", lambda folder: plan)
    with pytest.raises(DataError, match="the date 'soon'; expected one such as 2025-12-31"):
        capture_set(tiny_model, PROMPTS[:2], tmp_path / "s", **options)
