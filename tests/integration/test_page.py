"""The gateway's page in a real browser: live figures, a form, a dead stage, a phone, the keyboard."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path

import build
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from served import Served
from watched_page import watched_page

from onnxsplit.planning.planner import partition

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    partition(build.save(build.diamond(), folder), stages=4, out=folder / "diamond.plan", costs="measured", rounds=0)
    return folder


@pytest.fixture
def stage_file(folder):
    return folder / "diamond.plan" / "stage0.onnx"


@pytest.fixture(scope="module")
def server(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Served(folder / "diamond.plan", "--replicas", "3=2", environment=environment) as found:
        yield found


@pytest.fixture
def page(browser, server):
    """The open page; it may log nothing and load nothing from other hosts."""
    with watched_page(browser, server.http) as (opened, _):
        opened.wait_for_selector(".graph .box")
        yield opened


GIVEN = json.dumps({"inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [0.5] * 16}]}).encode()


class Load:
    """Sends requests one after another while its context is entered."""

    def __init__(self, server: Served) -> None:
        self.failed: list[bytes] = []
        self._server = server
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._ending.is_set():
            status, _, body = self._server.ask("/v2/models/diamond/infer", GIVEN)
            if status != 200:
                self.failed.append(body)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ending.set()
        self._thread.join()


def test_the_pipeline_is_drawn_as_it_is_connected(page):
    titles = page.locator(".graph .box text:not(.small)").all_text_contents()
    assert sorted(titles) == ["inputs", "outputs", "stage 0", "stage 1", "stage 2", "stage 3"]
    assert page.locator(".graph path.edge").count() == 6
    assert page.locator(".graph", has_text="2 of 2 nodes").count() == 1
    assert page.locator("#health").text_content() == "ready"
    assert page.locator("table tbody tr").count() == 5


def test_the_figures_of_the_page_are_live(page, server):
    from playwright.sync_api import expect

    with Load(server) as load:
        some = re.compile(r"^(?!0\.0$)\d+\.\d$")
        expect(page.locator(".figures div b").first).to_have_text(some)
        line = re.compile(r"L.* (?!20\.0)\d")  # not all points are zero
        expect(page.locator("tbody tr .spark path").first).to_have_attribute("d", line)
        expect(page.locator("table tbody tr").first.locator("td").nth(2)).to_have_text(some)
        cells = page.locator("table tbody tr").first.locator("td").all_text_contents()
    assert load.failed == []
    assert re.match(r"[\d.]+ ms, planned [\d.]+", cells[4]), "the prediction is beside the measured time"


def test_a_page_that_is_opened_now_shows_the_past(page, browser, server):
    page.wait_for_function("document.querySelector('.chart').plot.data[0].length > 2")
    with watched_page(browser, server.http) as (opened, _):
        opened.wait_for_selector(".graph .box")
        assert len(opened.evaluate("document.querySelector('.chart').plot.data[0]")) > 2


def test_wrong_requests_are_said_quietly(page, server):
    from playwright.sync_api import expect

    for path, body in (("diamond", b"{"), ("nothing", GIVEN)):
        assert server.ask(f"/v2/models/{path}/infer", body)[0] in (400, 404)
    expect(page.locator(".quiet")).to_contain_text("refused (wrong input): the last said")
    expect(page.locator("#astray")).to_contain_text("asked for a model that is not here: the last said")
    assert page.locator(".trouble").is_hidden()


def test_the_slowest_requests_are_listed_with_their_timelines(page, server):
    assert server.ask("/v2/models/diamond/infer", GIVEN)[0] == 200
    page.locator(".slow button").first.click()
    assert re.search(r"[\d.]+ of [\d.]+ ms", page.inner_text(".timeline .summary"))
    (told,) = server.json("/slowest")
    assert (told["name"], 1 <= len(told["requests"]) <= 5) == ("diamond", True)
    for request in told["requests"]:
        assert sum(period["ns"] for period in request["periods"]) == request["total_ns"]
        ran = {period["node"][0] for period in request["periods"] + request["beside"] if period["kind"] == "run"}
        assert request["reason"] or ran == {"0", "1", "2", "3"}


def test_the_form_runs_a_request(page):
    from playwright.sync_api import expect

    for source in ("example", "zeros", "json"):
        page.select_option("#source", source)
        if source == "json":
            expect(page.locator("#json")).to_have_value(re.compile('"x"'))
        page.click("#run")
        expect(page.locator("#ran")).to_have_text(re.compile("^Answered in"))
        row = page.locator("#outputs tbody td").all_text_contents()
        assert row[:2] == ["y", "FP32"]
        assert row[2].endswith(", 16]")
        assert len(row[3].split(", ")) == 7
    page.fill("#json", '{"inputs": []}')
    page.click("#run")
    expect(page.locator("#ran")).to_have_text(re.compile("^No answer: .*is missing"))


def test_it_is_used_by_keyboard(page):
    from playwright.sync_api import expect

    page.locator(".graph .box").first.focus()
    page.wait_for_timeout(1500)  # a redraw keeps the focus
    assert page.evaluate("document.activeElement.classList.contains('box')")
    assert "x" in page.locator("section .detail").text_content()
    page.locator("#source").focus()
    page.select_option("#source", "example")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "run"
    page.keyboard.press("Enter")
    expect(page.locator("#ran")).to_have_text(re.compile("^Answered in"))


def test_a_dead_stage_is_shown_and_comes_back(page, server, stage_file):
    from playwright.sync_api import expect

    node = page.locator("table tbody tr").first.locator("td").first
    pid = int(node.get_attribute("title").split()[1])
    hidden = stage_file.rename(stage_file.with_suffix(".away"))  # so that it cannot be replaced
    os.kill(pid, signal.SIGKILL)
    page.wait_for_selector(".graph .box.down")
    expect(page.locator("#health")).to_have_text("not ready")
    expect(page.locator(".trouble")).to_have_text(re.compile("Last node lost: stage 0"))
    status, _, body = server.ask("/v2/health/ready")
    assert (status, "has no node that is ready" in json.loads(body)["error"]) == (503, True)
    assert server.ask("/v2/health/live")[0] == 200
    hidden.rename(stage_file)
    expect(page.locator("#health")).to_have_text("ready", timeout=120_000)  # its circuit may be open for 30 s
    assert server.ask("/v2/health/ready")[0] == 200


def test_it_fits_a_phone(browser, server):
    context = browser.new_context(viewport={"width": 360, "height": 740})
    opened = context.new_page()
    opened.goto(server.http)
    opened.wait_for_selector(".graph .box")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()


def test_the_page_says_when_the_server_is_gone(browser, chain_plan, python_environment):
    served = Served(chain_plan, environment=python_environment)
    context = browser.new_context()
    opened = context.new_page()
    opened.goto(served.http)
    opened.wait_for_selector(".graph .box")
    assert served.end() == 0, "an open page does not hold up the end"
    from playwright.sync_api import expect

    expect(opened.locator("#health")).to_have_text("no connection")
    context.close()


def test_a_browser_asks_for_the_token(browser, folder, tmp_path, python_environment):
    file = tmp_path / "tokens"
    file.write_text("sesame-open-yourself-now\n")
    file.chmod(0o600)
    with Served(folder / "diamond.plan", "--token-file", file, environment=python_environment) as server:
        context = browser.new_context(http_credentials={"username": "any", "password": "sesame-open-yourself-now"})
        opened = context.new_page()
        opened.goto(server.http)
        opened.wait_for_selector(".graph .box")
        context.close()
