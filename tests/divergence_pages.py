"""Made-up divergences for the tests of the page, tokens that a hostile text could hold, and a reader of its HTML."""

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np

from quantkd.view import Alternatives, Divergence, RowDivergence

HOSTILE = [
    "</script><script>document.title='taken'</script>", "<img src=x onerror=\"document.title='taken'\">",
    "<!--<script>", "&lt;b&gt; & &amp;", "\u2028\u2029", "\u202etxet desrever", "שלום", "\x00\x1b[31m",
    "'\"`${document.title='taken'}`\\", "https://example.com/x.js", "javascript:alert(1)", "\ud800", "]]>",
    "{{ 7 * 7 }}{% raw %}", "\u00a0", "\u3000", "\u3164",
]  # fmt: skip
EMOJI = "🎉".encode()
WORDS = ["The", " answer", " is", " ", "4", "2", ".", "\n", " So", " fence", " costs", " $", "\t", "\n\n", "e\u0301"]


def make_row(
    rng: Any, index: int, ids: Sequence[int], size: int, *, kl: float = 0.3, alternatives: int = 8, prompt: str = ""
) -> RowDivergence:
    """A row of these tokens; `kl` is its mean before, and a tenth of it after."""
    count, width = len(ids), alternatives + 1
    tokens = np.array([rng.choice(size, width, replace=False) for _ in ids], dtype=np.int64).reshape(count, width)
    for place, token in enumerate(ids):  # the last one is the token of the text, unless it is there already
        if token not in tokens[place]:
            tokens[place, -1] = token
    logs = {name: np.log(rng.dirichlet(np.full(width, 0.3), size=count) * 0.97 + 1e-5) for name in "tba"}
    order = np.argsort(-logs["t"], axis=1)
    teacher, before, after = (np.take_along_axis(logs[name], order, 1) for name in "tba")
    teacher[:, -1] = np.nan  # not stored
    kl_before = rng.exponential(kl, size=count)
    places = np.arange(count)
    columns = [each.ravel() for each in (tokens, teacher, before, after)]
    return RowDivergence(
        index=index, finished=index % 2 == 0, token_ids=np.array(ids, dtype=np.int64),
        contexts=((0, prompt or f"What is {index} + 2?"),), kl_before=kl_before,
        kl_after=kl_before * rng.uniform(0, 0.2, size=count), top_teacher=tokens[:, 0],
        top_before=tokens[places, before.argmax(1)], top_after=tokens[places, after.argmax(1)],
        alternatives=Alternatives(np.arange(count + 1) * width, *columns),
    )  # fmt: skip


def make_divergence(rows: Sequence[RowDivergence], tokens: Sequence[str | bytes], **names: str) -> Divergence:
    fields = {"teacher": "big/teacher", "student": "big/teacher", "adapter": "adapter", "digest": "0123456789abcdef"}
    return Divergence(rows=tuple(rows), tokens=dict(enumerate(tokens)), num_rows=len(rows), **{**fields, **names})


def make_page_divergence() -> Divergence:
    """Six rows: ordinary ones, hostile tokens, an emoji in pieces, a single token, a long one."""
    tokens: list[str | bytes] = [*WORDS, *HOSTILE, EMOJI[:2], EMOJI[2:3], EMOJI[3:], b"\xff"]
    rng = np.random.default_rng(0)
    words, hostile, pieces = len(WORDS), len(HOSTILE), len(tokens) - 4
    long = rng.integers(0, words, size=200).tolist()
    rows = [
        make_row(rng, 0, [0, 1, 2, 3, 4, 5, 6], len(tokens), kl=0.05, prompt="How long is the fence?"),
        make_row(rng, 1, [*range(words, words + hostile)], len(tokens), kl=0.4, prompt=HOSTILE[0] + HOSTILE[1]),
        make_row(rng, 2, [0, pieces, pieces + 1, pieces + 2, 6, pieces + 3], len(tokens), kl=0.2),
        make_row(rng, 3, [4], len(tokens), kl=1.5),
        make_row(rng, 4, long, len(tokens), kl=0.1),
        make_row(rng, 5, [8, 9, 10, 11, 4, 6], len(tokens), kl=0.8),
    ]
    return make_divergence(rows, tokens)


class Reader(HTMLParser):
    """The tags of a page with their attributes, and the text of its scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:  # inside one of the two
            self.texts[self.cdata_elem][-1] += data

    @property
    def data(self) -> Any:
        return json.loads(self.texts["script"][0])
