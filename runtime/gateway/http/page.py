"""The page at ``/``: one HTML file that loads nothing else, made with the code that draws reports."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from onnxsplit import drawing
from onnxsplit.npz import load_npz
from onnxsplit.plan_files import example_file
from runtime.gateway.http.codec import ask
from runtime.gateway.models.version import Version

_SCRIPTS = ("chat.js", "chart.js", "slowest.js", "request.js", "page.js")


@cache
def html() -> str:
    """The page, as HTML."""
    return drawing.fill(
        _asset("page.html"),
        styles=drawing.styles(charts=True) + _asset("page.css"),
        licences=drawing.licences(charts=True),
        script=_script(),
    )


def _script() -> str:
    return "\n".join((drawing.libraries(charts=True), *map(_asset, _SCRIPTS)))


def _asset(name: str) -> str:
    return (files(__package__ or "") / "assets" / name).read_text(encoding="utf-8")


@cache
def headers() -> dict[str, str]:
    """The headers of the page. Only its own script may run, and no other page may embed it."""
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src 'sha256-{digest}'; "
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }


def example(version: Version) -> tuple[list[bytes | memoryview], int]:
    """A request with the plan's example inputs: the pieces of the body, and the length of its JSON.

    Raises:
        PlanError: The plan holds no example inputs.
    """
    return ask(load_npz(example_file(version.folder, version.plan)))
