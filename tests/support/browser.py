"""A browser for tests of the dashboard's page."""

import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

from support import ROOT

PAGE = ROOT / "adapters" / "evsys_adapters" / "dashboard" / "_web"


def require(condition: object, what: str) -> None:
    """Skip on a laptop, fail where all checks must run."""
    if not condition:
        if os.environ.get("CI"):
            pytest.fail(f"there is no {what}")
        pytest.skip(f"there is no {what}")


@contextmanager
def chromium() -> Generator[Any]:
    """A browser; the test is skipped where there is none, or where the page was not built."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    require(program, "chromium")
    require((PAGE / "index.html").is_file(), "page: uv sync --reinstall-package evsys-bus")
    if not os.environ.get("CI"):
        pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox refuses to run as root, as in a container.
        yield playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])


class Tab:
    """A tab that remembers what the browser complained about, and what it requested."""

    def __init__(self, browser: Any, width: int = 1280, height: int = 800) -> None:
        self.page: Any = browser.new_context(viewport={"width": width, "height": height}).new_page()
        self.complaints: list[str] = []
        self.page.on("console", self._add_complaint)
        self.requests: list[Any] = []
        self.page.on("pageerror", self._add_error)
        self.page.on("request", self._add_request)

    def _add_complaint(self, message: Any) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)

    def _add_error(self, error: Any) -> None:
        self.complaints.append(str(error))

    def _add_request(self, request: Any) -> None:
        self.requests.append(request)

    def open(self, url: str, until: str) -> None:
        """Open a page, with the token in the fragment, and wait for a JavaScript expression to be true."""
        self.page.goto(f"{url}#token=a-token")
        self.until(until)

    def until(self, condition: str, seconds: float = 8) -> Any:
        """Wait for an expression to be true. (The page's policy refuses what Playwright would wait with.)"""
        end = time.monotonic() + seconds
        while not (value := self.page.evaluate(condition)):
            assert time.monotonic() < end, f"{condition}; the page: {self.text()[:800]}; {self.complaints}"
            time.sleep(0.03)
        return value

    def text(self, selector: str = "body") -> str:
        """The text of an element as it is seen."""
        return self.page.inner_text(selector)

    def is_wider_than_the_screen(self) -> bool:
        """Whether the page scrolls sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth > innerWidth")

    def close(self) -> None:
        """Close the tab."""
        self.page.context.close()
