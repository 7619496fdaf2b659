"""A headless Chromium for tests of HTML pages: the one in `$DINO_CHROMIUM`, or on the path."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    """Path of Chromium; skips the test if there is none."""
    path = os.environ.get("DINO_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium: install it, or set DINO_CHROMIUM to its path")
    return path


@contextmanager
def launched() -> Iterator[Any]:
    """A running `playwright` browser."""
    api = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install -e ".[browser]"')
    path = chromium()
    with api.sync_playwright() as playwright:
        # Chromium's sandbox does not work as root, which is usual in containers.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
