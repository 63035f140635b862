"""A pytest plugin for the tests of the Hub: the small Hub, a trained run and a small set."""

import shutil

import pytest
import torch
import yaml
from fake_hub import TOKEN, running_hub
from transfer_sets import write_set
from transformers import AutoModelForCausalLM

from quantkd.models.student import default_quantization_config
from tests.report_arms import build, make_arms

PUSHED = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "gap.png", "quantkd.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
small_set = pytest.fixture(lambda tmp_path: write_set(tmp_path / "small"))
run = pytest.fixture(lambda trained_run, tmp_path: shutil.copytree(trained_run, tmp_path / "mine"))


def read_page(files: dict[str, bytes]) -> tuple[dict, str]:
    _, front, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), text


def damage(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture(scope="session")
def trained_run(build_trainer, tmp_path_factory):
    """A run's folder with a report, an adapter in `student`, and what a trainer leaves beside it."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    trainer = build_trainer(run / "student", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    build(run, make_arms())
    student = run / "student"
    torch.save({"hub_token": TOKEN}, student / "training_args.bin")
    for name in ("optimizer.pt", "config.yaml", "notes.txt"):
        (student / name).write_text(f"hub_token: {TOKEN}\n")
    return run


@pytest.fixture(scope="session")
def load_base(tiny_model_path):
    options = {"dtype": torch.float32, "quantization_config": default_quantization_config(torch.float32)}
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_model_path, **options)
