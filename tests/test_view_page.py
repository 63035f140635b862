"""The divergence page's text: what it may load, how tokens are escaped, how large it gets, and its colors."""

import base64
import hashlib
import re

import numpy as np
import pytest

from quantkd.errors import ConfigError
from quantkd.view import render_page, write_page
from quantkd.view.divergence import KL_EDGES, count_classes
from tests.divergence_pages import HOSTILE, Reader, make_divergence, make_page_divergence, make_row


def test_the_page_needs_nothing_from_outside():
    page = render_page(make_divergence(make_page_divergence().rows[:1], ["a"] * 40))
    reader = Reader(page)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", page.split('type="application/json"')[0])
    assert "http" not in reader.texts["script"][1] and "http" not in reader.texts["style"][0]
    links = [value for _, attributes in reader.tags for name, value in attributes.items() if name in {"src", "href"}]
    assert links == ["data:,", "#rows"]
    policies = [attributes["content"] for tag, attributes in reader.tags if attributes.get("http-equiv")]
    assert len(policies) == 1 and policies[0] is not None
    policy = dict(part.split(" ", 1) for part in policies[0].split("; "))
    assert policy["default-src"] == "'none'" and policy["base-uri"] == "'none'" and policy["form-action"] == "'none'"
    for name, text in (("script-src", reader.texts["script"][1]), ("style-src", reader.texts["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"
    loading = [tag for tag, _ in reader.tags if tag in {"script", "style", "link", "iframe", "img", "object"}]
    assert loading == ["link", "style", "script", "script"]


def test_hostile_tokens_and_names_stay_text():
    tokens = [*HOSTILE, *(f"word{number}" for number in range(20))]

    def render(row_tokens, name):
        row = make_row(np.random.default_rng(0), 0, range(len(HOSTILE)), len(tokens), prompt=row_tokens[0])
        names = dict.fromkeys(("teacher", "student", "adapter", "digest"), name)
        return render_page(make_divergence([row], row_tokens, **names))

    page = render(tokens, "".join(HOSTILE) + "\u200b")
    hostile, harmless = Reader(page), Reader(render([f"word{number}" for number in range(len(tokens))], "x"))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert hostile.texts["script"][1] == harmless.texts["script"][1]
    strings = hostile.data["strings"]
    assert set(HOSTILE) <= set(strings) and hostile.data["rows"][0]["contexts"] == [[0, HOSTILE[0]]]
    raw = hostile.texts["script"][0]
    assert raw.isascii() and not set("<>&") & set(raw) and not re.search("[\u202e\x1b\u200b\u3164]", page)


def test_fifty_rows_of_two_hundred_tokens_stay_below_five_megabytes(tmp_path):
    """The worst case: every alternative another token out of 50,000, three beside the teacher's eight, full digits."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, size=8)) for _ in range(50_000)]
    options = {"alternatives": 10, "prompt": "x" * 2000}
    rows = [make_row(rng, n, rng.integers(0, 50_000, size=200).tolist(), 50_000, **options) for n in range(50)]
    path = write_page(make_divergence(rows, words), tmp_path / "page.html")
    assert 2e6 < path.stat().st_size < 5e6


def test_the_same_divergence_gives_the_same_bytes_and_replaces_the_file(tmp_path):
    found = make_page_divergence()
    path = write_page(found, tmp_path / "new" / "page.html")
    first = path.read_bytes()
    path.write_text("old")
    assert write_page(found, str(path)).read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    with pytest.raises(ConfigError, match="is a folder; expected a file name"):
        write_page(found, tmp_path)


@pytest.mark.parametrize(("before", "after", "said"), [
    (0.2, 0.05, "75% lower than before"), (0.1, 0.3, "higher than before"), (0.2, -1e-9, "100% lower than before"),
    (1e-9, 1e-9, "the same as the teacher, before and after"), (-1e-9, 5.0, "higher than before"),
])  # fmt: skip
def test_the_summary_says_how_the_kl_changed(before, after, said):
    row = make_row(np.random.default_rng(0), 0, [0, 1], 40)
    row.kl_before[:], row.kl_after[:] = before, after
    summary = render_page(make_divergence([row], ["a"] * 40)).split("<main>")[1].split('<div class="toolbar"')[0]
    text = " ".join(re.sub(r"<[^>]*>", " ", summary).split())
    assert said in text and "-0.000" not in text and "nan" not in text
    assert f"before {max(before, 0):.3f}" in text


def test_classes_by_a_loop():
    kl = np.array([-1e-9, 0, 0.0099, 0.01, 0.3, 0.5, 1.99, 2.0, 40.0])
    classes = [sum(value >= edge for edge in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)) for value in kl]
    assert count_classes(kl).tolist() == [classes.count(number) for number in range(9)]


def luminance(color):
    """WCAG 2's relative luminance of #rrggbb."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [1, 2], ids=["light", "dark"])
def test_the_scale_reads_in_grey_and_its_ink_on_it(theme):
    """Luminance goes one way by steps that can be seen; the text has WCAG's contrast of 4.5."""
    style = Reader(render_page(make_page_divergence())).texts["style"][0]
    color = r"light-dark\((#\w{6}), (#\w{6})\)"
    plain = [re.search(rf"--{name}: {color}", style) for name in ("surface", "ink")]  # class 0 has no color of its own
    found = [[match[theme]] for match in plain if match]
    for match in re.finditer(rf"\.k\d {{ background: {color}; color: {color}; }}", style):
        found[0].append(match[theme])
        found[1].append(match[theme + 2])
    grounds, inks = ([luminance(each) for each in column] for column in found)
    assert len(grounds) == len(inks) == len(KL_EDGES) + 1
    steps = np.diff(np.log(np.array(grounds) + 0.05))
    assert (np.abs(steps) > 0.08).all() and len(set(np.sign(steps))) == 1
    for ground, ink in zip(grounds, inks, strict=True):
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) >= 4.5
