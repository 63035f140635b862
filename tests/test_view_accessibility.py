"""The divergence page in both themes, on a narrow screen, and under axe-core, in a headless Chromium.

axe-core is no part of this repository: `npm install --no-save --no-package-lock --prefix . axe-core@4` brings it, or
QUANTKD_AXE names its axe.min.js.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.page_driver import PANEL, all_of, check_details, check_quiet, one, open_browser, show, tokens_of

REPOSITORY = Path(__file__).resolve().parent.parent


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


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_theme_follows_the_system_until_it_is_chosen(page: Any, tmp_path: Path, theme: str) -> None:
    show(page, tmp_path, theme=theme)
    other = "light" if theme == "dark" else "dark"

    def is_dark() -> bool:
        colour = one(page, "body").value_of_css_property("background-color")
        return sum(map(int, colour[colour.index("(") + 1 :].rstrip(")").split(",")[:3])) < 380

    button = one(page, "#theme")
    assert is_dark() == (theme == "dark") == (button.get_attribute("aria-pressed") == "true")
    button.click()
    assert is_dark() == (other == "dark") == (button.get_attribute("aria-pressed") == "true")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_four_hundred_pixels_are_wide_enough(page: Any, tmp_path: Path, theme: str) -> None:
    show(page, tmp_path, width=400, theme=theme)

    def overflow() -> int:
        return int(page.execute_script("return document.documentElement.scrollWidth - window.innerWidth"))

    assert overflow() <= 0
    before, after = tokens_of(page, 5, "before"), tokens_of(page, 5, "after")
    assert before[0].rect["y"] < after[0].rect["y"] and before[0].rect["x"] < 60 and after[0].rect["x"] < 60  # stacked
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", before[2])
    before[2].click()
    assert one(page, PANEL).is_displayed()
    check_details(one(page, PANEL), 5, 2)
    assert overflow() <= 0
    one(page, "#close").click()
    assert not one(page, PANEL).is_displayed() and page.switch_to.active_element == before[2]
    for button in all_of(page, ".as-table"):
        page.execute_script("arguments[0].click()", button)
    page.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert overflow() <= 0


def find_axe() -> Path:
    """axe-core's one file."""
    named = os.environ.get("QUANTKD_AXE")
    path = Path(named) if named else REPOSITORY / "node_modules" / "axe-core" / "axe.min.js"
    if not path.is_file():
        install = "npm install --no-save --no-package-lock --prefix . axe-core@4"
        pytest.skip(f"no axe-core at {path}; run: {install}, or name its axe.min.js in QUANTKD_AXE")
    return path


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Any, tmp_path: Path, theme: str, width: int) -> None:
    axe = find_axe()
    show(page, tmp_path, width=width, theme=theme)
    page.execute_script(axe.read_text(encoding="utf-8"))
    for look in ("closed", "open"):
        if look == "open":
            page.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
            page.execute_script("arguments[0].focus()", tokens_of(page, 5, "after")[2])
            page.execute_script("arguments[0].click()", all_of(page, ".as-table")[0])
        found = page.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")
        assert found["passes"]
        serious = [v for v in found["violations"] if v["impact"] in {"serious", "critical"}]
        assert [(v["id"], [node["html"] for node in v["nodes"][:3]]) for v in serious] == [], (theme, width, look)
