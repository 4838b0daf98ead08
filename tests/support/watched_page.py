"""A page in a browser that may log nothing and load nothing from other hosts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def watched_page(browser: Any, address: str) -> Iterator[tuple[Any, list[Any]]]:
    """The page at an address, and the requests that it has made; it is judged when the context ends."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    problems, asked = [], []
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: asked.append(request))
    opened.goto(address)
    yield opened, asked
    context.close()
    assert [problem for problem in problems if not problem.startswith("Failed to load resource")] == []
    assert [one.url for one in asked if not one.url.startswith((address, "data:"))] == []
