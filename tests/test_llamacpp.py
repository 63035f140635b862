"""Real llama.cpp: its logits and figures with our GGUF files and adapters are those of transformers and PEFT.

What is left is the engine's own rounding. It keeps keys and values in 16 bits, and on a CPU multiplies quantized
weights with inputs that are rounded to 8 bits a block. Skipped without the environment of `make llamacpp-env`.
"""

import numpy as np
import pytest
import torch
from families import build
from gguf_files import write_gguf
from peft import LoraConfig, get_peft_model

from benchmarks._llamacpp import PYTHON, serve
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.hub import load_adapter
from quantkd.models.gguf_adapters import FILE_NAME, export_gguf_adapter
from quantkd.models.stored_weights import compute_file_size, compute_size
from quantkd.models.student import load_student
from quantkd.names import load_tokenizer
from quantkd.teacher.model_server import ModelServer
from quantkd.teacher.served import evaluate_served

pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason="no llama.cpp: make llamacpp-env")
FAMILIES = {"Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma 3": "gemma3"}


def ask(path, ids, lora=None):
    """(L - 1, V) log-probabilities after each token but the last."""
    with serve(path, lora) as url:
        server = ModelServer(url)
        found = server.score(ids, list(range(1, len(ids))), server.vocab_size)
    return torch.from_numpy(found.logprobs[np.lexsort((found.token_ids, np.arange(len(ids) - 1).repeat(found.counts)))])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_an_adapter_are_pefts(family, tiny_tokenizer, tmp_path):
    # llama.cpp scales Gemma's queries by the width of a head; so do its real checkpoints.
    changes = {"query_pre_attn_scalar": 8} if family == "Gemma 3" else {}
    model = build(family, len(tiny_tokenizer), **changes)
    model.save_pretrained(tmp_path / "full")
    path = write_gguf(model, tmp_path / "m.gguf", "F32", architecture=FAMILIES[family], tokenizer=tiny_tokenizer)
    ids = tiny_tokenizer.encode("She has 3 + 4 apples, and a café.")

    def compute(network):
        with torch.inference_mode():
            return network(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)

    plain = compute(model)
    torch.manual_seed(0)
    config = LoraConfig(r=32, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    student = get_peft_model(model, config).eval()
    student.save_pretrained(tmp_path / "adapter")
    options = {"base": str(tmp_path / "full"), "outtype": "f32"}
    lora = export_gguf_adapter(str(tmp_path / "adapter"), tmp_path / "lora", **options) / FILE_NAME
    expected = compute(student)
    assert float((expected - plain).abs().max()) > 1
    torch.testing.assert_close(ask(path, ids).view(expected.shape), plain, atol=0.03, rtol=0)
    torch.testing.assert_close(ask(path, ids, lora).view(expected.shape), expected, atol=0.03, rtol=0)
    with pytest.raises(RuntimeError, match=r"did not start with m\.gguf"), serve(path, path):
        pass


def test_a_student_is_distilled_and_measured_where_it_runs(cli, tiny_model_path, training_set, held_out, tmp_path):
    from transformers import AutoModelForCausalLM

    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model_path), load_tokenizer(str(tiny_model_path))
    path = write_gguf(teacher, tmp_path / "tiny-Q4_0.gguf", token_embd="Q8_0", output="Q8_0", tokenizer=tokenizer)
    base = ["--model_name_or_path", tiny_model_path, "--gguf_file", path]
    words = ["--transfer_set", training_set.sources[0].path, "--output_dir", tmp_path / "student", "--max_steps", 6]
    cli.ok("train", *base, *words, "--learning_rate", 1e-3, "--lora_r", 8, "--report_to", "none")
    words = ["--form", "gguf_adapter", "--adapter", tmp_path / "student", "--output_dir", tmp_path / "lora"]
    cli.ok("export", *base, *words)
    student = load_student(str(tiny_model_path), gguf_file=str(path))
    lora = tmp_path / "lora" / FILE_NAME
    size, alone = compute_file_size([path, lora]), compute_file_size([path])
    assert (size.adapters, alone.adapters) == (lora.stat().st_size, 0) and alone == compute_size(student)
    means = {}
    for arm, adapter in (("before", None), ("after", lora)):
        network = student if adapter is None else load_adapter(student, str(tmp_path / "student"))
        with serve(path, adapter) as url:
            served = evaluate_served(ModelServer(url), held_out, tmp_path, arm=arm, progress=False).fidelity
        here = evaluate_fidelity(network, held_out, progress=False)
        assert served.settings["not_listed"] == 0
        means[arm] = here.means["kl"], served.means["kl"]
        assert means[arm][1] == pytest.approx(means[arm][0], rel=0.05, abs=0.002), means
        assert served.means["top1_agreement"] == pytest.approx(here.means["top1_agreement"], abs=0.05)
    assert means["after"][0] < 0.7 * means["before"][0]
