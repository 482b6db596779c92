"""The system's Chromium, or the word why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tools.screenshots import BROWSERS, browser, open_page, system_chromium


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    pytest.importorskip("playwright.sync_api", reason="no playwright here: the extra `test` brings it")
    if system_chromium() is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} (Debian's package is chromium)")
    with browser() as found:
        yield found


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """An empty page; `page.asked` lists the addresses that it asks for."""
    made = open_page(chromium)
    made.asked = []
    made.on("request", lambda request: made.asked.append(request.url))
    yield made
    made.close()
