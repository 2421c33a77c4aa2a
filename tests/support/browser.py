"""A headless Chromium, as a person has it before them: keys, pointer, and a record of all that it asks for."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

Browser = webdriver.Chrome


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium within the block; skips the test where there is none."""
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # Chromium's own sandbox doesn't work for root, whom containers run as.
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


def emulate(browser: Browser, *, width: int = 1000, height: int = 760, scheme: str = "light") -> None:
    """Gives the page a width and height in CSS pixels, and a color scheme, `light` or `dark`."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def complaints(browser: Browser) -> list[str]:
    """What the browser has said of errors and violated policies since it was asked last."""
    return [entry["message"] for entry in _log(browser, "browser") if entry["level"] in ("SEVERE", "WARNING")]


def asked_urls(browser: Browser) -> list[str]:
    """The URLs that were asked for since the last time."""
    events = [json.loads(entry["message"])["message"] for entry in _log(browser, "performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def _log(browser: Browser, kind: str) -> list[dict[str, str]]:
    entries: list[dict[str, str]] = browser.execute("getLog", {"type": kind})["value"]
    return entries
