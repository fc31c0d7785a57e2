"""A real Chromium for tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """One browser for a block; where there is none the test skips, or fails if CI demands it."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is missing: apt-get install chromium")
        pytest.skip("needs chromium")
    with sync_playwright() as playwright:
        quiet = ("--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync",
                 "--disable-component-update", "--no-first-run", "--no-sandbox")  # fmt: skip
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(quiet))
        yield browser
        browser.close()
