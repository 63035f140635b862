"""Fixtures of the tests of teachers on other engines: a fake server of each kind, and a teacher that asks it."""

from contextlib import ExitStack

import pytest
from fake_openai_server import FakeServer
from teacher_rows import RULE, SETTINGS, TEXTS

from quantkd.teacher import EncodedPrompt
from quantkd.teacher.server import ServerTeacher


@pytest.fixture
def prompts(tiny_tokenizer):
    return [EncodedPrompt(index, tiny_tokenizer.encode(text)) for index, text in enumerate(TEXTS)]


@pytest.fixture
def serve(tiny_model, tiny_tokenizer):
    with ExitStack() as running:
        ends = [tiny_tokenizer.eos_token_id]
        yield lambda **kwargs: running.enter_context(FakeServer(tiny_model, ends, **kwargs))


@pytest.fixture
def connect(tiny_tokenizer):
    def build(server, rule=RULE, settings=SETTINGS, **kwargs):
        kwargs = {"backoff_seconds": 0.001, "vocab_size": len(tiny_tokenizer), **kwargs}
        url = server if isinstance(server, str) else server.url
        return ServerTeacher(url, "tiny", tiny_tokenizer, rule, (1.0,), settings, **kwargs)

    return build
