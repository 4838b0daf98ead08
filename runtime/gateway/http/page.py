"""The page at ``/``: one file without a network, drawn by the code that draws reports."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from onnxsplit import drawing
from onnxsplit.npz import load_npz
from onnxsplit.plan_files import example_file
from runtime.gateway.http.codec import ask
from runtime.gateway.repository import Version


@cache
def html() -> str:
    """The page."""
    return drawing.fill(
        _asset("page.html"), styles=drawing.styles() + _asset("page.css"), licences=drawing.licences(), script=_script()
    )


def _script() -> str:
    return f"{drawing.libraries()}\n{_asset('page.js')}"


def _asset(name: str) -> str:
    return (files(__package__ or "") / "assets" / name).read_text(encoding="utf-8")


@cache
def headers() -> dict[str, str]:
    """What a browser is told of it: nothing but its own script runs, and nobody frames it."""
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
    """A request with the plan's example inputs.

    Raises:
        PlanError: it holds none.
    """
    return ask(load_npz(example_file(version.folder, version.plan)))
