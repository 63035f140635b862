"""What the tests of the page in a browser share: a headless Chromium, the page in it, and ways to read it.

Needs `chromium` and `chromedriver` on the PATH.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkd.view import write_page
from tests.divergence_pages import make_page_divergence

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium; it comes with the extra `dev`")
By = pytest.importorskip("selenium.webdriver.common.by").By
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--lang=en-US",
]  # fmt: skip
DIVERGENCE = make_page_divergence()
TIP, PANEL = "#tip", "#panel"


@contextmanager
def open_browser(profile: Path) -> Iterator[Any]:
    """A Chromium with this empty folder as its profile; skips where there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    server = shutil.which("chromedriver")
    if browser is None or server is None:
        missing = "chromium" if browser is None else "chromedriver"
        pytest.skip(f"no {missing} on the PATH; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=server))
    driver.set_page_load_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


def check_quiet(driver: Any) -> None:
    """The page said nothing on the console and asked for nothing but itself."""
    assert [entry for entry in driver.get_log("browser") if not entry["message"].startswith("chrome:")] == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    asked = [each["request"]["url"] for each in sent if not each["documentURL"].startswith("chrome")]  # its first tab
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert any(url.endswith("page.html") for url in asked)


def show(driver: Any, folder: Path, width: int = 1280, theme: str = "light") -> None:
    """Write the page and open it."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    path = write_page(DIVERGENCE, folder / "page.html")
    driver.get(path.as_uri())
    WebDriverWait(driver, 30).until(lambda d: d.find_elements(By.CSS_SELECTOR, ".row .token"))


def all_of(page: Any, selector: str) -> list[Any]:
    return list(page.find_elements(By.CSS_SELECTOR, selector))


def one(page: Any, selector: str) -> Any:
    return page.find_element(By.CSS_SELECTOR, selector)


def shown_rows(page: Any) -> list[int]:
    """The numbers of the rows that are shown, from top to bottom."""
    titles = [element.text for element in all_of(page, ".row h2") if element.is_displayed()]
    return [int(title.removeprefix("Row ")) for title in titles]


def tokens_of(page: Any, row: int, student: str) -> list[Any]:
    article = page.find_element(By.XPATH, f"//article[.//h2[@id='row-{row}']]")
    return list(article.find_elements(By.CSS_SELECTOR, f".view.{student} .token"))


def percent(text: str) -> float:
    return float(text.strip("●\n %<>")) / 100


def check_details(box: Any, row_index: int, place: int) -> None:
    """The table says what the row holds: tokens in the teacher's order, and the three probabilities of each."""
    row = next(row for row in DIVERGENCE.rows if row.index == row_index)
    own = slice(row.alternatives.offsets[place], row.alternatives.offsets[place + 1])
    lines = box.find_elements(By.CSS_SELECTOR, ".alternatives tbody tr")
    columns = (row.alternatives.teacher[own], row.alternatives.before[own], row.alternatives.after[own])
    for at, line in enumerate(lines[:5]):
        shares = [percent(cell.text) for cell in line.find_elements(By.TAG_NAME, "td")]
        np.testing.assert_allclose(shares, [np.exp(column[at]) for column in columns], atol=6e-4)
    text = box.text
    assert f"row {row_index}, token {place + 1} of {len(row.token_ids)}" in text
    assert "Teacher" in text and "Before" in text and "After" in text and "all others" in text
    assert sum("in the text" in line.text for line in lines) == 1
    chips = [element.text for element in box.find_elements(By.CSS_SELECTOR, ".token-kl .chip")]
    assert [float(chip.replace("<0.001", "0")) for chip in chips] == pytest.approx(
        [row.kl_before[place], row.kl_after[place]], abs=6e-3
    )
