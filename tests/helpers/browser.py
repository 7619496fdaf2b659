"""A headless Chromium for the tests of pages: `$DINO_CHROMIUM`, or the one on the path."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    """Its path; the test is skipped where there is none."""
    found = os.environ.get("DINO_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium: install one, or name its file in DINO_CHROMIUM")
    return found


@contextmanager
def launched() -> Iterator[Any]:
    """A `playwright` browser."""
    api = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install -e ".[browser]"')
    path = chromium()
    with api.sync_playwright() as playwright:
        # Chromium's own sandbox does not start as root, as in containers.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
