"""A real headless browser for tests: Chromium as the system has it, driven by playwright.

@needs_browser
def test_page():
    with open_page() as visit:
        visit.page.goto("http://127.0.0.1:8000/")
        ...
        visit.check()  # nothing was loaded from elsewhere, no script failed
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ELSEWHERE = re.compile(r"^(?!(file|data|blob|about):|https?://(127\.0\.0\.1|localhost)[:/])")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None,
    reason="needs a browser: apt install chromium, pip install playwright",
)


@dataclass
class Visit:
    """A page, and what it did that it should not."""

    page: Any  # playwright's Page
    outside: list[str] = field(default_factory=list)  # requests that left this machine; all were stopped
    faults: list[str] = field(default_factory=list)  # scripts that failed, resources that the policy refused

    def check(self) -> None:
        """Fail unless the page kept to this machine and all of it worked."""
        assert self.outside == [] and self.faults == []


@contextmanager
def open_browser() -> Iterator[Any]:
    """playwright's Browser. Not within an asyncio loop: the synchronous interface runs one of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def new_page(browser: Any, **options: Any) -> Iterator[Visit]:
    """A page with storage of its own; `options` as of playwright's new_context, such as color_scheme="dark"."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(20_000)
    try:
        visit = Visit(context.new_page())
        context.route(ELSEWHERE, lambda route: _stop(route, visit))
        visit.page.on("pageerror", lambda error: visit.faults.append(str(error)))
        visit.page.on("console", lambda line: visit.faults.append(line.text) if line.type == "error" else None)
        yield visit
    finally:
        context.close()


@contextmanager
def open_page(**options: Any) -> Iterator[Visit]:
    """One page in a browser of its own."""
    with open_browser() as browser, new_page(browser, **options) as visit:
        yield visit


def _stop(route: Any, visit: Visit) -> None:
    visit.outside.append(route.request.url)
    route.abort()
