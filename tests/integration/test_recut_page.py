"""The page while the plan of a model changes."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import threading
from contextlib import closing
from typing import Any

import build
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("tritonclient.grpc", reason="needs the extra test")

from recuts import answer, begun, callers, serve
from served import Served
from waiting import wait_until
from watched_page import watched_page

import onnxsplit


class Events:
    """Reads the events of a server's page in a thread."""

    def __init__(self, server: Served) -> None:
        self.plans: list[Any] = []
        self.samples: list[Any] = []
        self._connection = http.client.HTTPConnection(server.host, timeout=60)
        self._connection.request("GET", "/events")
        self._response = self._connection.getresponse()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        kind = ""
        try:
            for line in self._response:
                word, _, rest = line.decode().strip().partition(": ")
                if word == "event":
                    kind = rest
                elif word == "data":
                    {"plans": self.plans, "": self.samples}.get(kind, []).append(json.loads(rest))
                elif not word:
                    kind = ""
        except (OSError, ValueError, AttributeError):  # the test has closed it
            pass

    def close(self) -> None:
        self._connection.sock.shutdown(2)
        self._thread.join()
        self._response.close()
        self._connection.close()


def test_the_page_follows_a_change_of_the_plan(tmp_path, browser):
    from playwright.sync_api import expect

    model = build.save(build.chain(), tmp_path)
    for name, cut_at in (("model.plan", ["h2"]), ("three.plan", ["h1", "h3"])):
        onnxsplit.partition(model, out=tmp_path / name, cut_at=cut_at, costs="analytic")
    with serve(tmp_path) as server, watched_page(browser, server.http) as (page, _), closing(Events(server)) as events:
        expect(page.locator(".graph .box")).to_have_count(4)
        assert page.locator(".recut").is_hidden(), "the plan was never changed, and nobody watches"
        with callers([lambda x: answer(server, x)]):
            wait_until(lambda: events.samples[-1]["models"][0]["nodes"][0]["per_s"] > 0)
            change = begun(server, "three.plan")
            expect(page.locator(".recut")).to_contain_text("The plan is being changed:")
            expect(page.locator(".graph .box")).to_have_count(5)
            expect(page.locator("table tbody tr")).to_have_count(3)
            assert change.result(120)[0] == 200
            expect(page.locator(".recut")).to_have_text(re.compile(r"^Last change of the plan: .* Plan 2 serves\.$"))
            wait_until(lambda: events.samples[-1]["models"][0]["nodes"][2]["per_s"] > 0)
        points = page.evaluate("document.querySelector('.chart').plot.data[1].filter((rate) => rate !== null)")
        assert min(points) >= 0
    samples = (sample["models"][0] for sample in events.samples)
    models = list(itertools.dropwhile(lambda model: not model["generation"], samples))  # not loaded yet
    stages = {plan["generation"]: len(plan["stages"]) for plans in events.plans for plan in plans}
    assert stages == {1: 2, 2: 3}
    for model in models:
        assert {node["stage"] for node in model["nodes"]} == set(range(stages[model["generation"]]))
        rates = [node[name] for node in model["nodes"] for name in ("per_s", "now_per_s", "output_bytes_per_s")]
        assert min([*rates, model["per_s"], model["losses"]]) >= 0
        assert model["ready"], model["reason"]
