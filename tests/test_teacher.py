"""Capture: what is recorded while generating is what a dense second pass over the same tokens gives."""

import pytest
import torch
from families import build as build_family
from teacher_rows import assert_stored, dense_logprobs

from quantkd import Nucleus, Sampled, TopK
from quantkd.errors import DataError, TeacherError
from tests.conftest import capture_set, refused

PROMPTS = ["What is two plus three?", "Name a colour.", "How many legs has a cat, and how many have two cats?"]


@pytest.fixture
def set_of(tiny_model, tiny_tokenizer, tmp_path):
    def build(name="set", prompts=PROMPTS, **kwargs):
        kwargs = {"max_new_tokens": 12, "batch_size": 2, "tokenizer": tiny_tokenizer, **kwargs}
        return capture_set(tiny_model, prompts, tmp_path / name, **kwargs)

    return build


@pytest.mark.parametrize("responses", ["generate", "given"])
@pytest.mark.parametrize("family", ["Jamba", "Mamba", "FalconMamba", "RecurrentGemma", "LFM 2"])
def test_a_recurrent_state_takes_in_no_padding_and_is_not_lost(tiny_tokenizer, tmp_path, family, responses):
    model = build_family(family, len(tiny_tokenizer))
    rows = [{"prompt": prompt, "completion": "She has 3 + 4 apples."} for prompt in PROMPTS]
    how = {"responses": responses, **({"max_new_tokens": 8} if responses == "generate" else {})}
    made = capture_set(model, rows, tmp_path / "set", tokenizer=tiny_tokenizer, storage=TopK(5), batch_size=3, **how)
    for row in made:
        ids = row["teacher"].token_ids.view(-1, 5)
        assert_stored(row["teacher"].logprobs.view(-1, 5), dense_logprobs(model, row).gather(1, ids))


@pytest.mark.parametrize("storage", [TopK(5), Nucleus(0.7, max_k=40)])
@pytest.mark.parametrize("sampling", [{}, dict(do_sample=True, generation_temperature=1.5, top_p=0.9, top_k=50)])
def test_entries_and_normalizers_are_the_teachers_own(set_of, tiny_model, storage, sampling):
    transfer_set = set_of(storage=storage, temperatures=(1.0, 2.0, 4.0), **sampling)
    assert len(transfer_set) == 3
    for row in transfer_set:
        dense, teacher = dense_logprobs(tiny_model, row), row["teacher"]
        assert len(teacher) == len(dense) >= 1
        counts = teacher.counts.tolist()
        parts = zip(dense, teacher.token_ids.split(counts), teacher.logprobs.split(counts), strict=True)
        for exact, ids, stored in parts:
            assert_stored(stored, exact[ids])
            # The top ones, but for ties that batched and unbatched float32 logits break differently.
            best = exact.topk(len(ids)).values
            torch.testing.assert_close(exact[ids].sort(descending=True).values, best, atol=1e-4, rtol=0)
            torch.testing.assert_close(exact[ids[0]], best[0], atol=1e-4, rtol=0)
        for column, temperature in enumerate((1.0, 2.0, 4.0)):
            expected = (dense / temperature).logsumexp(-1)
            found = teacher.log_normalizers[:, column].double()
            # Off by float16's rounding, and lifted where the rounded entries alone would hold more than it allows.
            step = expected.abs() / 1024 + 1e-4
            scaled = (teacher.logprobs.double() / temperature).exp()
            scaled = torch.zeros_like(found).index_add_(0, teacher.positions, scaled)
            assert (found >= expected - step).all() and (found <= torch.maximum(expected, scaled.log()) + step).all()


@pytest.mark.parametrize(("bias", "limit"), [(1, 6), (60, 40)])
def test_the_end_token_closes_an_answer_and_cut_answers_are_counted(tiny_model, tiny_tokenizer, set_of, bias, limit):
    end = tiny_tokenizer.eos_token_id
    tiny_model.lm_head.weight.data[end] *= bias
    transfer_set = set_of(max_new_tokens=limit, prompts=PROMPTS * 4)
    finished = []
    for row in transfer_set:
        response = row["input_ids"][row["labels"] != -100].tolist()
        assert end not in response[:-1] and int(row["labels"][-1]) == response[-1]
        assert bool(row["finished"]) == (response[-1] == end) and (len(response) == limit or row["finished"])
        finished.append(bool(row["finished"]))
    assert transfer_set.info.counters["responses_cut"] == finished.count(False) and any(finished) == (bias > 1)


def test_samples_differ_in_no_batch_and_the_checkpoints_own_settings_change_nothing(set_of, tiny_model, tiny_tokenizer):
    sampling = {"do_sample": True, "num_samples": 3}
    sets = [set_of(f"{size}-{seed}", batch_size=size, seed=seed, **sampling) for size, seed in ((2, 3), (9, 3), (9, 4))]
    alone, together, other = ([tuple(row["input_ids"].tolist()) for row in each] for each in sets)
    assert alone == together != other and len(alone) == 9 and len(set(alone)) > 6
    plain = set_of("plain")
    tiny_model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=3.0)
    assert set_of("again").digest == plain.digest
    assert tiny_model.generation_config.repetition_penalty == 5.0  # the model gets its own back


@pytest.mark.parametrize("responses", ["generate", "given"])
def test_sampled_entries_are_shares_of_the_draws_in_any_batch(set_of, responses):
    rows = [{"prompt": "One and one?", "completion": "two"}, {"prompt": "And now?", "completion": "its answer"}]
    options = {"prompts": rows, "responses": responses, "storage": Sampled(20)}
    options |= {"max_new_tokens": 256} if responses == "given" else {}  # the default, which is not used
    together, alone = set_of("together", **options), set_of("alone", batch_size=1, **options)
    assert together.info.temperatures == (1.0,)
    for row, other in zip(together, alone, strict=True):
        teacher = row["teacher"]
        assert teacher.token_ids.tolist() == other["teacher"].token_ids.tolist()
        draws = (teacher.logprobs.exp() * 20).round()  # the store's rounding is far below half a draw
        assert int(draws.min()) >= 1
        assert_stored(teacher.logprobs, (draws / 20).log())
        mass = torch.zeros(len(teacher)).index_add_(0, teacher.positions, draws)
        assert mass.tolist() == [20] * len(teacher)


def test_what_cannot_be_captured_is_refused(tiny_tokenizer, set_of, monkeypatch, tiny_model):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    refused(DataError, r"no chat template.*plain_prompts", set_of, "refused")
    row = set_of("plain", chat_template=False)[0]
    assert tiny_tokenizer.decode(row["input_ids"][row["labels"] == -100], skip_special_tokens=True) == PROMPTS[0]
    tiny_model.lm_head.weight.data[3] = float("nan")
    said = r"prompt \d+ are not finite at response position 0.*--dtype"
    refused(TeacherError, said, set_of, "nan", chat_template=False)
