"""The gateway's page without a gateway: it is told canned plans, pasts and samples, so any state can be shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ADDRESS = "http://page.test/"
NOW_MS = 1_800_000_000_000
MS = 1_000_000


def node(stage: int, replica: int = 0, **changes: Any) -> dict[str, Any]:
    """A node as the samples have it, with some values changed."""
    return {
        "stage": stage, "replica": replica, "pid": 100 + stage, "host": "here", "state": "ready", "per_s": 20.0,
        "now_per_s": 21.0, "p99_ns": 3 * MS, "run_ns": MS, "queue": 0.0, "utilisation": 0.2,
        "output_bytes_per_s": 1e6, "restarts": 0, "failures": 0, **changes,
    }  # fmt: skip


def model(nodes: Sequence[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A model as the samples have it, with some values changed."""
    return {
        "name": "told", "version": "1", "state": "ready", "reason": "", "ready": True, "per_s": 20.0, "answered": 1200,
        "p50_ns": 4 * MS, "p99_ns": 9 * MS, "last_ms": NOW_MS, "failures": {}, "waiting": 0, "inside": 1, "retries": 0,
        "losses": 0, "loss": None, "nodes": list(nodes), "text": None, "now": [NOW_MS, 21.0, 9 * MS], "bin": None,
        "slowest": 0, "generation": 1, "recut": None, **changes,
    }  # fmt: skip


def plan(
    edges: Sequence[tuple[int, int]],
    *,
    estimated: bool = False,
    predicted_ns: int = MS,
    replicas: str = "",
    generation: int = 1,
) -> dict[str, Any]:
    """A plan whose stages are connected by ``edges``; -1 stands for the caller. ``replicas`` is the stages' range."""
    stages = sorted({stage for edge in edges for stage in edge} - {-1})
    return {
        "name": "told", "version": "1", "generation": generation, "estimated": estimated,
        "inputs": ["x"], "outputs": ["y"],
        "stages": [{"index": stage, "predicted_ns": predicted_ns, "replicas": replicas} for stage in stages],
        "edges": [
            {"from": source, "to": target, "bytes": 0 if -1 in (source, target) else 1_500_000}
            for source, target in edges
        ],
    }  # fmt: skip


def past(minute: Sequence[Any] = (), hour: Sequence[Any] = ()) -> dict[str, Any]:
    """The past of the model, as points ``[at_ms, per_s, p99_ns]``."""
    return {"name": "told", "version": "1", "minute": list(minute), "hour": list(hour), "nodes": {}}


@contextmanager
def told_page(
    browser: Any,
    plans: Sequence[dict[str, Any]],
    models: Sequence[dict[str, Any]],
    *,
    pasts: Sequence[dict[str, Any]] | None = None,
    slowest: Sequence[Any] = (),
    astray: dict[str, Any] | None = None,
    viewport: tuple[int, int] = (1180, 900),
    **options: Any,
) -> Iterator[Any]:
    """Open the page in a context of its own; it may log no error.

    Args:
        browser: The browser.
        plans: What the event ``plans`` has.
        models: The models of the one sample.
        pasts: What the event ``history`` has.
        slowest: What ``/slowest`` has.
        astray: Requests for models that are not there.
        viewport: Width and height.
        options: Options of the context.
    """
    from runtime.gateway.http import page

    view = {"at_ms": NOW_MS, "ready": all(one["ready"] for one in models), "astray": astray, "models": list(models)}
    events = [
        "retry: 1000000",
        f"event: plans\ndata: {json.dumps(list(plans))}",
        f"event: history\ndata: {json.dumps(list(pasts) if pasts is not None else [past()])}",
        f"data: {json.dumps(view)}",
        "",
    ]
    context = browser.new_context(viewport={"width": viewport[0], "height": viewport[1]}, **options)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    answers = {
        "": (page.html(), "text/html", page.headers()),
        "events": ("\n\n".join(events), "text/event-stream", {}),
        "slowest": (json.dumps(list(slowest)), "application/json", {}),
        "v1/models": (json.dumps({"data": []}), "application/json", {}),
    }

    def answer(route: Any) -> None:
        body, kind, headers = answers[route.request.url.removeprefix(ADDRESS)]
        route.fulfill(body=body, headers={"content-type": kind, **headers})

    opened.route("**/*", answer)
    opened.goto(ADDRESS)
    opened.wait_for_selector("#models section .figures b")
    yield opened
    context.close()
    assert problems == []


BOXES = """(root) => {
  const box = (one) => {
    const { left, right, top, bottom } = one.getBoundingClientRect();
    return { left, right, top, bottom };
  };
  const svg = root.querySelector("svg"), zero = svg.getBoundingClientRect();
  const scale = zero.width / svg.viewBox.baseVal.width;
  const lines = [...svg.querySelectorAll("path.edge")].map((path) => {
    const points = [];
    for (let at = 0; at <= path.getTotalLength(); at += 1) {
      const point = path.getPointAtLength(at);
      points.push([zero.left + scale * point.x, zero.top + scale * point.y]);
    }
    return points;
  });
  return { labels: [...svg.querySelectorAll(".label rect")].map(box), texts: [...svg.querySelectorAll("text")].map(box),
    boxes: [...svg.querySelectorAll(".box rect")].map(box), lines, frame: box(root), graph: box(svg) };
}"""
"""Finds where a graph's labels, texts, boxes and lines are, the latter as points."""


def overlaps(one: dict[str, float], other: dict[str, float], slack: float = 0.5) -> bool:
    """Whether two boxes overlap by more than some pixels."""
    return (
        one["left"] < other["right"] - slack
        and other["left"] < one["right"] - slack
        and one["top"] < other["bottom"] - slack
        and other["top"] < one["bottom"] - slack
    )


def crossed(box: dict[str, float], line: Sequence[Sequence[float]], slack: float = 1.0) -> bool:
    """Whether a line has a point inside a box."""
    return any(
        box["left"] + slack < x < box["right"] - slack and box["top"] + slack < y < box["bottom"] - slack
        for x, y in line
    )
