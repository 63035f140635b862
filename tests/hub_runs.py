"""A trained run and the small Hub, for the tests of adapters on the Hub. A pytest plugin: its fixtures come with it."""

from __future__ import annotations

import shutil

import pytest
import torch
from fake_hub import TOKEN, FakeHub, running_hub
from hub_client import connect, disconnect
from test_report import LEVELS, build, make_arm
from transformers import AutoModelForCausalLM

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer
from quantkd.models.student import default_quantization_config
from tests.conftest import capture_set

PUSHED = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "gap.png", "quantkd.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as hub:
        connect(hub, monkeypatch, tmp_path / "cache")
        yield hub
        disconnect()


@pytest.fixture(scope="module")
def transfer_set(tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "set"
    prompts = ["Two and two?", "Why?", "Name a colour.", "One."]
    return capture_set(tiny_model_path, prompts, folder, max_new_tokens=6)


def build_trainer(tiny_model_path, transfer_set, folder, **options):
    settings = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "model_init_kwargs": {"dtype": "float32"},
        "init": "zero",
        "disable_tqdm": True,
        **options,
    }
    args = QuantizedDistillationConfig(str(folder), **settings)
    return QuantizedDistillationTrainer(str(tiny_model_path), args, train_dataset=transfer_set)


@pytest.fixture(scope="module")
def trained_run(tiny_model_path, transfer_set, tmp_path_factory):
    """A run's folder with a report, an adapter in `student`, and what a trainer leaves beside it."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    trainer = build_trainer(tiny_model_path, transfer_set, run / "student", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    build(run, {name: make_arm(name, *level) for name, level in LEVELS.items()})
    student = run / "student"
    torch.save({"hub_token": TOKEN}, student / "training_args.bin")
    (student / "optimizer.pt").write_text(TOKEN)
    (student / "config.yaml").write_text(f"hub_token: {TOKEN}\n")
    (student / "notes.txt").write_text(TOKEN)
    return run


@pytest.fixture
def run(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "mine")


def files_at(hub: FakeHub, name: str) -> dict[str, bytes]:
    files = hub.repositories["model", name].commits[-1].files
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def load_base(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(
        tiny_model_path, dtype=torch.float32, quantization_config=default_quantization_config(torch.float32)
    )
