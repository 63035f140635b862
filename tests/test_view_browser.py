"""The divergence page in a headless Chromium, opened from the disk: it loads alone, sorts, filters, explains itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.divergence_pages import HOSTILE
from tests.page_driver import (
    DIVERGENCE,
    PANEL,
    TIP,
    By,
    WebDriverWait,
    all_of,
    check_details,
    check_quiet,
    one,
    open_browser,
    percent,
    show,
    shown_rows,
    tokens_of,
)

ActionChains = pytest.importorskip("selenium.webdriver.common.action_chains").ActionChains
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
Select = pytest.importorskip("selenium.webdriver.support.ui").Select


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One browser for this file."""
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(driver: Any, tmp_path: Path) -> Iterator[Any]:
    """The browser with a fresh page, 1280 px wide, in the light theme."""
    show(driver, tmp_path)
    yield driver
    check_quiet(driver)


def test_it_shows_every_row_and_token_once_a_student(page: Any) -> None:
    assert sorted(shown_rows(page)) == [row.index for row in DIVERGENCE.rows]
    for row in DIVERGENCE.rows:
        for student, kl in (("before", row.kl_before), ("after", row.kl_after)):
            elements = tokens_of(page, row.index, student)
            classes = [int(element.get_attribute("class").split()[1].removeprefix("k")) for element in elements]
            edges = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
            rounded = [float(f"{value:.3g}") for value in kl]
            assert classes == [sum(value >= edge for edge in edges) for value in rounded]
    before, after = (one(page, f"#rows .view.{student}").rect for student in ("before", "after"))
    assert before["y"] == after["y"] and before["x"] + before["width"] <= after["x"]  # side by side


def test_it_sorts(page: Any) -> None:
    means = {row.index: (row.kl_before.mean(), row.kl_after.mean(), row.kl_after.max()) for row in DIVERGENCE.rows}
    keys = {
        "after": lambda i: -means[i][1],
        "before": lambda i: -means[i][0],
        "worst": lambda i: -means[i][2],
        "gain": lambda i: means[i][1] - means[i][0],
        "loss": lambda i: means[i][0] - means[i][1],
        "index": lambda i: i,
    }
    choice = Select(one(page, "#sort"))
    assert shown_rows(page) == sorted(means, key=keys["after"])
    assert {option.get_attribute("value") for option in choice.options} == set(keys)
    for name, key in keys.items():
        choice.select_by_value(name)
        assert shown_rows(page) == sorted(means, key=key), name


def test_it_filters_prompts_and_responses(page: Any) -> None:
    field = one(page, "#filter")
    for text, expected in (("FENCE?", [0]), ("🎉", [2]), ("what is 5", [5]), ("onerror", [1]), ("nowhere", [])):
        field.clear()
        field.send_keys(Keys.SPACE, Keys.BACKSPACE)
        page.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", field, text
        )
        assert shown_rows(page) == expected
        assert one(page, "#count").text == f"{len(expected)} of 6 rows"
        assert one(page, "#nothing").is_displayed() == (expected == [])
    field.clear()
    field.send_keys("fence", Keys.BACKSPACE * 5)
    assert len(shown_rows(page)) == 6 and one(page, "#count").text == "6 rows"


def test_the_mouse_opens_the_tooltip_and_leaves_it(page: Any) -> None:
    assert not one(page, TIP).is_displayed()
    before, after = (tokens_of(page, 5, student)[2] for student in ("before", "after"))
    ActionChains(page).scroll_to_element(before).move_to_element(before).perform()
    assert one(page, TIP).is_displayed()
    check_details(one(page, TIP), 5, 2)
    assert "twin" in after.get_attribute("class")
    assert one(page, TIP).rect["x"] + one(page, TIP).rect["width"] <= one(page, PANEL).rect["x"]
    tip, token = one(page, TIP).rect, before.rect
    assert tip["y"] + tip["height"] <= token["y"] or tip["y"] >= token["y"] + token["height"]  # not over its token
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    WebDriverWait(page, 5).until(lambda d: not one(d, TIP).is_displayed())
    ActionChains(page).move_to_element(after).perform()
    assert one(page, TIP).is_displayed()
    ActionChains(page).move_to_element(one(page, "h1")).perform()
    WebDriverWait(page, 5).until(lambda d: not one(d, TIP).is_displayed())


def test_the_keyboard_reaches_every_number(page: Any) -> None:
    Select(one(page, "#sort")).select_by_value("index")
    one(page, "#fold").send_keys(Keys.TAB)
    for _ in range(12):
        focused = page.switch_to.active_element
        if focused.get_attribute("role") == "option":
            break
        ActionChains(page).send_keys(Keys.TAB).perform()
    assert focused == tokens_of(page, 0, "before")[0]
    row = DIVERGENCE.rows[0]
    high = [place for place, kl in enumerate(row.kl_after) if place > 1 and kl >= 0.2]
    for key, student, place in (
        ("", "before", 0), (Keys.ARROW_RIGHT, "before", 1), (Keys.ENTER, "after", 1), (Keys.END, "after", 6),
        (Keys.ARROW_LEFT, "after", 5), (Keys.HOME, "after", 0), (Keys.ARROW_RIGHT, "after", 1),
        ("n", "after", high[0] if high else 1),
    ):  # fmt: skip
        ActionChains(page).send_keys(key).perform()
        focused = page.switch_to.active_element
        assert focused == tokens_of(page, 0, student)[place], key
        kl = (row.kl_before if student == "before" else row.kl_after)[place]
        label = focused.get_attribute("aria-label")
        assert float(label.rsplit("KL ", 1)[1].replace("<0.001", "0")) == pytest.approx(kl, abs=6e-4)
        assert one(page, TIP).is_displayed()
        check_details(one(page, TIP), 0, place)
        check_details(one(page, PANEL), 0, place)
        assert focused.get_attribute("aria-describedby") == "sentence"
        spoken = one(page, "#sentence").get_attribute("textContent")
        assert "before" in spoken and "after" in spoken and "The teacher's first choice is" in spoken
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    WebDriverWait(page, 5).until(lambda d: not one(d, TIP).is_displayed())


def test_arrows_move_by_lines(page: Any) -> None:
    tokens = tokens_of(page, 4, "before")
    page.execute_script("arguments[0].focus()", tokens[0])
    top = tokens[0].rect["y"]
    ActionChains(page).send_keys(Keys.ARROW_DOWN).perform()
    below = page.switch_to.active_element.rect
    assert below["y"] > top
    ActionChains(page).send_keys(Keys.ARROW_UP).perform()
    assert page.switch_to.active_element.rect["y"] == top


def test_a_row_is_also_a_table(page: Any) -> None:
    article = page.find_element(By.XPATH, "//article[.//h2[@id='row-5']]")
    button = article.find_element(By.CSS_SELECTOR, ".as-table")
    button.send_keys(Keys.ENTER)
    lines = article.find_elements(By.CSS_SELECTOR, ".table tbody tr")
    row = DIVERGENCE.rows[5]
    assert len(lines) == len(row.token_ids) and not tokens_of(page, 5, "after")[0].is_displayed()
    for place, line in enumerate(lines):
        cells = [cell.text for cell in line.find_elements(By.CSS_SELECTOR, "td, th")]
        kls = [float(cell.replace("<0.001", "0")) for cell in cells[2:4]]
        assert kls == pytest.approx([row.kl_before[place], row.kl_after[place]], abs=6e-3)
        first = row.alternatives.offsets[place]
        assert percent(cells[5]) == pytest.approx(np.exp(row.alternatives.teacher[first]), abs=6e-4)
    button.send_keys(Keys.ENTER)
    assert tokens_of(page, 5, "after")[0].is_displayed()


def test_the_worst_token_is_one_click_away(page: Any) -> None:
    everything = [(kl, row.index, place) for row in DIVERGENCE.rows for place, kl in enumerate(row.kl_after)]
    _, index, place = max(everything)
    one(page, "#fold").click()
    page.execute_script("document.getElementById('filter').value = 'nowhere'")
    page.execute_script("document.getElementById('filter').dispatchEvent(new Event('input'))")
    one(page, ".worst > summary").click()
    one(page, "#worst button").click()
    assert page.switch_to.active_element == tokens_of(page, index, "after")[place]
    assert page.switch_to.active_element.is_displayed()


def test_tokens_that_cannot_be_seen_have_signs(page: Any) -> None:
    signs = {place: element.text for place, element in enumerate(tokens_of(page, 4, "before"))}
    strings = [DIVERGENCE.tokens[int(token)] for token in DIVERGENCE.rows[4].token_ids]
    for place, string in enumerate(strings):
        expected = {" ": "␣", "\n": "↵", "\n\n": "↵↵", "\t": "⇥"}.get(str(string), str(string).strip())
        assert signs[place].strip() == expected
    pieces = tokens_of(page, 2, "after")
    assert [element.text.strip() for element in pieces] == ["The", "🎉", "‥", "‥", ".", "FF"]
    page.execute_script("arguments[0].focus()", pieces[2])
    assert "part of “🎉”" in one(page, TIP).text and "8E" in one(page, TIP).text


def test_hostile_tokens_are_only_read(page: Any) -> None:
    assert page.title == "big/teacher beside big/teacher: divergence by token"
    texts = [element.get_attribute("textContent") for element in tokens_of(page, 1, "before")]
    assert texts[:4] == HOSTILE[:4] and texts[4:6] == ["U+2028U+2029", "U+202Etxet desrever"]
    assert texts[7:8] == ["U+0000U+001B[31m"] and texts[-3:] == ["U+00A0", "U+3000", "U+3164"]
    assert all_of(page, "img, #rows script, #rows style, #rows a") == []
    for element in tokens_of(page, 1, "before"):
        page.execute_script("arguments[0].focus()", element)
        assert one(page, TIP).is_displayed()
    assert page.title == "big/teacher beside big/teacher: divergence by token"
