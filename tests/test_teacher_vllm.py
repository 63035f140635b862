"""vLLM for real, in process and as a server, against the transformers teacher on the same tokens.

Run where vllm is installed: `make vllm-env`, then `.venv-vllm/bin/python -m pytest -m vllm tests/test_teacher_vllm.py`.
"""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from quantkd import TopK
from quantkd.teacher import EncodedPrompt, GenerationSettings

pytestmark = pytest.mark.vllm

QUESTIONS = ["What is 12 * 7?", "Name three colours of the rainbow.", "A train travels 60 miles in one hour. And in 5?"]
WIDTH, NEW_TOKENS, CONTEXT = 64, 24, 1024
SETTINGS = GenerationSettings(max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module", autouse=True)
def installed():
    pytest.importorskip("vllm", reason="vllm is not installed; see make vllm-env")


@pytest.fixture(scope="module")
def tokenizer(smol_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smol_path)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    ids = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        for chat in chats
    ]
    return [EncodedPrompt(index, row) for index, row in enumerate(ids)]


@pytest.fixture(scope="module")
def reference(smol_path):
    """(R, V) float32 log-probabilities of a row's targets, by transformers, unpadded and without a cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smol_path, dtype=torch.float32).eval()

    def dense(row) -> torch.Tensor:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row.input_ids.tolist()])).logits[0].float()
        return torch.cat([logits[start - 1 : stop - 1] for start, stop in row.spans.tolist()]).log_softmax(-1)

    return dense


@pytest.fixture(scope="module")
def in_process(smol_path, tokenizer):
    from quantkd.teacher.vllm import VLLMTeacher

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
        yield VLLMTeacher(
            str(smol_path),
            tokenizer,
            TopK(WIDTH),
            (1.0,),
            SETTINGS,
            dtype="float32",
            enforce_eager=True,
            max_model_len=CONTEXT,
        )


def serve_command() -> list[str]:
    """`vllm serve`, which in vllm-cpu 0.32 does not start: it looks up the version of a package named vllm."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        mended = (
            "import importlib.metadata as metadata; find = metadata.version; "
            "metadata.version = lambda name: find('vllm-cpu') + '+cpu' if name == 'vllm' else find(name); "
            "from vllm.entrypoints.cli.main import main; main()"
        )
        return [sys.executable, "-c", mended, "serve"]
    return [str(Path(sys.executable).parent / "vllm"), "serve"]


@pytest.fixture(scope="module")
def server_url(smol_path, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm-serve") / "log"
    command = [*serve_command(), str(smol_path), "--served-model-name", "smol"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", str(CONTEXT), "--max-logprobs", str(WIDTH)]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2"},
        )
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-4000:]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def compare(rows, reference, tokenizer, name: str) -> None:
    """Entries above 0.01 within 2e-2 nats of transformers' own, and none of those missing."""
    worst, checked = 0.0, 0
    for row in rows:
        row.validate(len(tokenizer))
        assert row.counts.tolist() == [WIDTH] * len(row.counts)
        dense = reference(row)
        ids = torch.from_numpy(row.token_ids).reshape(-1, WIDTH)
        found = torch.from_numpy(row.logprobs).reshape(-1, WIDTH)
        likely = found.exp() > 0.01
        error = (dense.gather(1, ids) - found).abs()[likely]
        assert torch.equal(likely.sum(-1), (dense.exp() > 0.01).sum(-1))
        worst, checked = max(worst, float(error.max())), checked + int(likely.sum())
    print(
        f"{name}: {sum(len(row.counts) for row in rows)} tokens, {checked} entries above 0.01, worst {worst:.2e} nats"
    )
    assert worst < 2e-2


def with_answers(rows, prompts):
    return [
        EncodedPrompt(prompt.index, prompt.prompt_ids, row.input_ids[len(prompt.prompt_ids) :].tolist())
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def test_in_process(in_process, prompts, reference, tokenizer):
    assert in_process.dtype == "float32"
    assert in_process.vocab_size == len(tokenizer)
    assert in_process.max_context == CONTEXT
    rows = in_process.answer(prompts)
    compare(rows, reference, tokenizer, "in process, answers")
    for prompt, row in zip(prompts, rows, strict=True):
        # Greedy: each token is the most probable one, which is the first entry.
        assert row.input_ids[len(prompt.prompt_ids) :].tolist() == row.token_ids.reshape(-1, WIDTH)[:, 0].tolist()
        assert row.finished == (row.input_ids[-1] == tokenizer.eos_token_id)
    compare(in_process.score(with_answers(rows, prompts)), reference, tokenizer, "in process, given")


def test_in_process_turns(in_process, reference, tokenizer, prompts):
    start = len(prompts[0].prompt_ids)
    given = EncodedPrompt(
        0, prompts[0].prompt_ids, list(range(500, 520)), ((start, start + 3), (start + 9, start + 20))
    )
    (row,) = in_process.score([given])
    assert row.spans.tolist() == [list(span) for span in given.spans]
    compare([row], reference, tokenizer, "in process, two turns")


def test_in_process_sampling_is_the_rows_own(in_process, prompts, reference, tokenizer):
    in_process.settings = GenerationSettings(NEW_TOKENS, True, 1.3, 0.95, 50, seed=7)
    try:
        together = in_process.answer(prompts)
        alone = in_process.answer(prompts[1:2])[0]
    finally:
        in_process.settings = SETTINGS
    assert alone.input_ids.tolist() == together[1].input_ids.tolist()
    compare(together, reference, tokenizer, "in process, sampled")  # unscaled and unfiltered all the same


def test_server(server_url, smol_path, prompts, reference, tokenizer):
    from quantkd.teacher.server import ServerTeacher

    teacher = ServerTeacher(server_url, "smol", tokenizer, TopK(WIDTH), (1.0,), SETTINGS, dtype="float32")
    assert teacher.vocab_size == len(tokenizer)
    assert teacher.max_context == CONTEXT
    rows = teacher.answer(prompts)
    compare(rows, reference, tokenizer, "server, answers")
    compare(teacher.score(with_answers(rows, prompts)), reference, tokenizer, "server, given")


def test_server_with_too_few_logprobs(server_url, tokenizer):
    from quantkd.errors import TeacherError
    from quantkd.teacher.server import ServerTeacher

    with pytest.raises(TeacherError, match="max-logprobs"):
        ServerTeacher(server_url, "smol", tokenizer, TopK(WIDTH + 1), (1.0,), SETTINGS)
