"""The divergence page in a headless Chromium, opened from the disk: it loads alone, sorts, filters, explains itself.

Needs `chromium` and `chromedriver` on the PATH. axe-core is not part of this repository: run `npm install --no-save
--no-package-lock --prefix . axe-core@4`, or name its axe.min.js in QUANTKD_AXE.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from quantkd.view import write_page
from quantkd.view.divergence import KL_EDGES
from tests.conftest import REPOSITORY
from tests.divergence_pages import HOSTILE, make_page_divergence

pytest.importorskip("selenium", reason="no selenium; it comes with the extra `dev`")

from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--lang=en-US",
]  # fmt: skip
DIVERGENCE = make_page_divergence()
KLS = [(row.kl_before, row.kl_after) for row in DIVERGENCE.rows]
TIP, PANEL = "#tip", "#panel"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    server = shutil.which("chromedriver")
    if browser is None or server is None:
        pytest.skip("no chromium or no chromedriver on the PATH; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=server))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, tmp_path):
    """The browser with a fresh page, 1280 px wide and light; it must stay silent and ask for nothing but itself."""
    show(driver, tmp_path)
    yield driver
    assert [entry for entry in driver.get_log("browser") if not entry["message"].startswith("chrome:")] == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    asked = [each["request"]["url"] for each in sent if not each["documentURL"].startswith("chrome")]  # its first tab
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert any(url.endswith("page.html") for url in asked)


def show(driver, folder, width=1280, theme="light"):
    features = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(write_page(DIVERGENCE, folder / "page.html").as_uri())
    WebDriverWait(driver, 30).until(lambda d: all_of(d, ".row .token"))


def all_of(page, selector):
    return page.find_elements("css selector", selector)


def one(page, selector):
    return page.find_element("css selector", selector)


def shown_rows(page):
    return [int(each.text.removeprefix("Row ")) for each in all_of(page, ".row h2") if each.is_displayed()]


def tokens_of(page, row, student):
    return all_of(page, f"article[aria-labelledby='row-{row}'] .view.{student} .token")


def run(page, script, *arguments):
    """What a script gives for many elements at once; a call for each of them takes seconds."""
    return page.execute_script(f"return {script}", *arguments)


def cells_of(box, table):
    """The text of every cell of a table's body, line by line."""
    script = "Array.from(arguments[0], line => Array.from(line.children, cell => cell.innerText))"
    return run(box.parent, script, all_of(box, f"{table} tbody tr"))


def focus(page, element):
    page.execute_script("arguments[0].focus()", element)


def press(page, key):
    """A key, and what has the focus then."""
    ActionChains(page).send_keys(key).perform()
    return page.switch_to.active_element


def filter_by(page, text):
    """What typing does; the driver cannot type an emoji."""
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    page.execute_script(script, one(page, "#filter"), text)


def wait_for_no_tip(page):
    WebDriverWait(page, 5).until(lambda d: not one(d, TIP).is_displayed())


def number(text):
    text = text.strip("●\n ")
    value = float(text.strip("%<>"))
    return value / 100 if text.endswith("%") else 0.0 if text.startswith("<") else value


def check_details(box, row_index, place):
    """The table says what the row holds: tokens in the teacher's order, and the three probabilities of each."""
    row = DIVERGENCE.rows[row_index]
    known, lines, text = row.alternatives, cells_of(box, ".alternatives"), box.text
    for at, (_, *shares) in enumerate(lines[:5], known.offsets[place]):
        expected = np.exp([known.teacher[at], known.before[at], known.after[at]])
        np.testing.assert_allclose(list(map(number, shares)), expected, atol=6e-4)
    said = (f"row {row_index}, token {place + 1} of {len(row.token_ids)}", "Teacher", "Before", "After", "all others")
    assert [each for each in said if each not in text] == []
    assert sum("in the text" in name for name, *_ in lines) == 1
    kls = [number(element.text) for element in all_of(box, ".token-kl .chip")]
    assert kls == pytest.approx([row.kl_before[place], row.kl_after[place]], abs=6e-3)


def test_it_shows_every_row_and_token_once_per_student(page):
    assert sorted(shown_rows(page)) == list(range(6))
    for row, kls in enumerate(KLS):
        strips = all_of(page, f"article[aria-labelledby='row-{row}'] .band")
        for student, kl, strip in zip(("before", "after"), kls, strips, strict=True):
            classes = run(page, "arguments[0].map(each => each.classList[1])", tokens_of(page, row, student))
            assert classes == [f"k{sum(float(f'{value:.3g}') >= edge for edge in KL_EDGES)}" for value in kl]
            assert run(page, "Array.from(arguments[0].children, part => part.className)", strip) == classes
    before, after = (one(page, f"#rows .view.{student}").rect for student in ("before", "after"))
    assert before["y"] == after["y"] and before["x"] + before["width"] <= after["x"]  # side by side


def test_it_sorts(page):
    before, after = (np.array([each.mean() for each in kls]) for kls in zip(*KLS, strict=True))
    worst = np.array([kl.max() for _, kl in KLS])
    keys = {"after": -after, "before": -before, "worst": -worst, "gain": after - before, "loss": before - after,
            "index": np.arange(6)}  # fmt: skip
    choice = Select(one(page, "#sort"))
    assert shown_rows(page) == keys["after"].argsort().tolist()
    assert {option.get_attribute("value") for option in choice.options} == set(keys)
    for name, key in keys.items():
        choice.select_by_value(name)
        assert shown_rows(page) == key.argsort().tolist(), name


def test_it_filters_prompts_and_responses(page):
    for text, expected in (("FENCE?", [0]), ("🎉", [2]), ("what is 5", [5]), ("onerror", [1]), ("nowhere", [])):
        filter_by(page, text)
        assert shown_rows(page) == expected and one(page, "#count").text == f"{len(expected)} of 6 rows"
        assert one(page, "#nothing").is_displayed() == (expected == [])
    one(page, "#filter").clear()
    one(page, "#filter").send_keys("fence", Keys.BACKSPACE * 5)
    assert len(shown_rows(page)) == 6 and one(page, "#count").text == "6 rows"


def test_the_mouse_opens_the_tooltip_and_leaves_it(page):
    assert not one(page, TIP).is_displayed()
    before, after = (tokens_of(page, 5, student)[2] for student in ("before", "after"))
    ActionChains(page).scroll_to_element(before).move_to_element(before).perform()
    assert one(page, TIP).is_displayed()
    check_details(one(page, TIP), 5, 2)
    assert "twin" in after.get_attribute("class")
    tip, token = one(page, TIP).rect, before.rect
    assert tip["x"] + tip["width"] <= one(page, PANEL).rect["x"]
    assert tip["y"] + tip["height"] <= token["y"] or tip["y"] >= token["y"] + token["height"]  # not over its token
    one(page, "body").send_keys(Keys.ESCAPE)
    wait_for_no_tip(page)
    ActionChains(page).move_to_element(after).perform()
    assert one(page, TIP).is_displayed()
    ActionChains(page).move_to_element(one(page, "h1")).perform()
    wait_for_no_tip(page)


def test_the_keyboard_reaches_every_number(page):
    Select(one(page, "#sort")).select_by_value("index")
    one(page, "#fold").send_keys(Keys.TAB)
    for _ in range(12):
        if page.switch_to.active_element.get_attribute("role") == "option":
            break
        press(page, Keys.TAB)
    row = DIVERGENCE.rows[0]
    high = [place for place, kl in enumerate(row.kl_after) if place > 1 and kl >= 0.2]
    for key, student, place in (
        ("", "before", 0), (Keys.ARROW_RIGHT, "before", 1), (Keys.ENTER, "after", 1), (Keys.END, "after", 6),
        (Keys.ARROW_LEFT, "after", 5), (Keys.HOME, "after", 0), (Keys.ARROW_RIGHT, "after", 1),
        ("n", "after", high[0] if high else 1),
    ):  # fmt: skip
        focused = press(page, key)
        assert focused == tokens_of(page, 0, student)[place], key
        kl = (row.kl_before if student == "before" else row.kl_after)[place]
        assert number(focused.get_attribute("aria-label").rsplit("KL ", 1)[1]) == pytest.approx(kl, abs=6e-4)
        assert one(page, TIP).is_displayed()
        check_details(one(page, TIP), 0, place)
        check_details(one(page, PANEL), 0, place)
        assert focused.get_attribute("aria-describedby") == "sentence"
        spoken = one(page, "#sentence").get_attribute("textContent")
        assert "before" in spoken and "after" in spoken and "The teacher's first choice is" in spoken
    press(page, Keys.ESCAPE)
    wait_for_no_tip(page)
    first = tokens_of(page, 4, "before")[0]
    focus(page, first)
    assert press(page, Keys.ARROW_DOWN).rect["y"] > first.rect["y"]  # by lines
    assert press(page, Keys.ARROW_UP).rect["y"] == first.rect["y"]


def test_a_row_is_also_a_table(page):
    article = one(page, "article[aria-labelledby='row-5']")
    button = one(article, ".as-table")
    button.send_keys(Keys.ENTER)
    lines, row = cells_of(article, ".table"), DIVERGENCE.rows[5]
    assert len(lines) == len(row.token_ids) and not tokens_of(page, 5, "after")[0].is_displayed()
    for place, cells in enumerate(lines):
        kls = list(map(number, cells[2:4]))
        assert kls == pytest.approx([row.kl_before[place], row.kl_after[place]], abs=6e-3)
        first = row.alternatives.offsets[place]
        assert number(cells[5]) == pytest.approx(np.exp(row.alternatives.teacher[first]), abs=6e-4)
    button.send_keys(Keys.ENTER)
    assert tokens_of(page, 5, "after")[0].is_displayed()


def test_the_worst_token_is_one_click_away(page):
    _, index, place = max((kl, row.index, place) for row in DIVERGENCE.rows for place, kl in enumerate(row.kl_after))
    one(page, "#fold").click()
    filter_by(page, "nowhere")
    one(page, ".worst > summary").click()
    assert not any(sign in button.text for button in all_of(page, "#worst button") for sign in "\u202e\x00\ud800")
    one(page, "#worst button").click()
    assert page.switch_to.active_element == tokens_of(page, index, "after")[place]
    assert page.switch_to.active_element.is_displayed()


def test_hostile_tokens_are_only_read(page):
    texts = run(page, "arguments[0].map(each => each.textContent)", tokens_of(page, 1, "before"))
    assert texts[:4] == HOSTILE[:4] and texts[4:6] == ["U+2028U+2029", "U+202Etxet desrever"]
    assert texts[7:8] == ["U+0000U+001B[31m"] and texts[-3:] == ["U+00A0", "U+3000", "U+3164"]
    assert all_of(page, "img, #rows script, #rows style, #rows a") == []
    for element in tokens_of(page, 1, "before"):
        focus(page, element)
        assert one(page, TIP).is_displayed()
    assert page.title == "big/teacher beside big/teacher: divergence by token"


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes_and_widths(page, tmp_path, theme, width):
    """The theme follows the system until it is chosen, the page is wide enough, and axe finds nothing serious."""
    axe = Path(os.environ.get("QUANTKD_AXE", REPOSITORY / "node_modules" / "axe-core" / "axe.min.js"))
    overflow = "document.documentElement.scrollWidth - window.innerWidth"
    show(page, tmp_path, width=width, theme=theme)
    for expected in (theme == "dark", theme == "light"):
        color = one(page, "body").value_of_css_property("background-color")
        is_dark = sum(map(int, color[color.index("(") + 1 :].rstrip(")").split(",")[:3])) < 380
        assert is_dark == expected == (one(page, "#theme").get_attribute("aria-pressed") == "true")
        one(page, "#theme").click()
    for look in ("closed", "open"):
        if look == "open":
            page.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
            focus(page, tokens_of(page, 5, "after")[2])
            page.execute_script("arguments[0].click()", one(page, ".as-table"))
        assert run(page, overflow) <= 0
        if not axe.is_file():
            continue
        page.execute_script(axe.read_text(encoding="utf-8"))
        found = page.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")
        assert found["passes"]
        serious = [v for v in found["violations"] if v["impact"] in {"serious", "critical"}]
        assert [(v["id"], [node["html"] for node in v["nodes"][:3]]) for v in serious] == [], (theme, width, look)
    for button in all_of(page, ".as-table")[1:]:
        page.execute_script("arguments[0].click()", button)
    assert run(page, overflow) <= 0
    if not axe.is_file():
        pytest.skip(f"all but axe-core, which is not at {axe}; the head of this file says how to get it")
