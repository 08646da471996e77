"""A browser that is installed, for what looks at the report as people do."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "google-chrome", "chrome", "chromium-browser")
MACOS = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium or Chrome, as installed; else the one that `playwright install chromium` brings.

    Raises:
        playwright.sync_api.Error: there is none.
    """
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    found = found or (str(MACOS) if MACOS.exists() else None)
    with sync_playwright() as p:
        launched = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield launched
        finally:
            launched.close()
