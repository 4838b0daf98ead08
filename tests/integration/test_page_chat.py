"""The chat box of the gateway's page in a real browser, and the live figures of texts."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from served import Served
from text_plans import text_plan
from waiting import wait_until
from watched_page import watched_page


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    plan = text_plan(tmp_path_factory.mktemp("plans") / "writer.plan", length=4096)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with Served(plan, "--cache-bytes", "8M", environment=environment) as found:
        yield found


@pytest.fixture
def page(browser, server):
    """The open page; it may log nothing and load nothing from other hosts."""
    with watched_page(browser, server.http) as (opened, asked):
        opened.wait_for_selector("#chat:not([hidden])")
        opened.fill("#chat-temperature", "0")
        opened.fill("#chat-tokens", "12")
        opened.asked = asked
        yield opened


def expected(server, messages, tokens=12):
    body = {"model": "writer", "messages": messages, "temperature": 0, "max_tokens": tokens}
    return server.json("/v1/chat/completions", body)["choices"][0]["message"]["content"]


def conversations(page):
    """The bodies of the page's requests to the endpoint."""
    return [one.post_data_json for one in page.asked if one.url.endswith("/v1/chat/completions")]


class Load:
    """Asks for four texts at once, again and again, while its context is entered."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        body = {"model": "writer", "prompt": "Hello", "n": 4, "max_tokens": 600, "ignore_eos": True}
        while not self._ending.is_set():
            self._server.json("/v1/completions", body)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ending.set()
        self._thread.join()


def never_end(page):
    """The model's end tokens do not end the answers."""

    def changed(route):
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))

    page.route("**/v1/chat/completions", changed)
    page.fill("#chat-tokens", "3900")


def test_an_answer_is_the_endpoints_and_the_next_question_has_the_history(page, server):
    from playwright.sync_api import expect

    page.fill("#chat-message", "Hello <b>you</b>")
    page.press("#chat-message", "Enter")
    expect(page.locator("#chat-state")).to_have_text(re.compile(r"^\d+ tokens, the first after .* ms"))
    asked = [{"role": "user", "content": "Hello <b>you</b>"}]
    answer = expected(server, asked)
    assert page.locator(".message.assistant").evaluate("one => one.lastChild.data") == answer
    assert page.locator(".message.user").evaluate("one => one.lastChild.data") == "Hello <b>you</b>", "it is text"
    page.fill("#chat-message", "And now?")
    page.click("#chat-send")
    expect(page.locator(".message.assistant")).to_have_count(2)
    expect(page.locator("#chat-send")).to_be_enabled()
    history = [*asked, {"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}]
    assert conversations(page)[1]["messages"] == history
    assert conversations(page)[1]["temperature"] == 0
    assert page.locator(".message.assistant").nth(1).evaluate("one => one.lastChild.data") == expected(server, history)
    page.click("#chat-clear")
    expect(page.locator(".message")).to_have_count(0)


def test_escape_stops_the_answer_and_ends_its_sequence(page, server):
    from playwright.sync_api import expect

    never_end(page)
    page.fill("#chat-message", "Go on and on")
    page.press("#chat-message", "Enter")
    expect(page.locator(".message.assistant")).to_have_text(re.compile("Model."))
    assert page.locator(".message.assistant").get_attribute("aria-busy") == "true"
    expect(page.locator("#chat-stop")).to_be_enabled()
    page.press("#chat-message", "Escape")
    expect(page.locator("#chat-state")).to_have_text("Stopped.")
    assert page.locator(".message.assistant").get_attribute("aria-busy") is None
    wait_until(lambda: server.metric("onnxsplit_num_requests_running") == 0)
    expect(page.locator("#chat-send")).to_be_enabled()


def test_an_error_is_shown_and_the_question_can_be_sent_again(page):
    from playwright.sync_api import expect

    page.fill("#chat-tokens", "100000")
    page.fill("#chat-message", "Too long")
    page.press("#chat-message", "Enter")
    expect(page.locator("#chat-state")).to_have_text(re.compile("^No answer: max_tokens is 100000"))
    expect(page.locator(".message")).to_have_count(0)
    assert page.input_value("#chat-message") == "Too long"


def test_an_error_within_a_stream_is_shown(page):
    from playwright.sync_api import expect

    parts = ['{"choices":[{"delta":{"content":"half"}}]}', '{"error":{"message":"a node is lost"}}']
    stream = "".join(f"data: {part}\n\n" for part in parts)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    page.fill("#chat-message", "Hello")
    page.press("#chat-message", "Enter")
    expect(page.locator("#chat-state")).to_have_text("No answer: a node is lost")
    assert page.locator(".message.assistant").evaluate("one => one.lastChild.data") == "half"


def answer_with(page, body, status=200, kind="text/event-stream"):
    """Answer the page's questions in place of the server."""
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, status=status, content_type=kind))


def test_a_stream_that_is_cut_off_is_shown_as_such(page):
    from playwright.sync_api import expect

    answer_with(page, 'data: {"choices":[{"delta":{"content":"half"}}]}\n\n')
    page.fill("#chat-message", "Hello")
    page.press("#chat-message", "Enter")
    expect(page.locator("#chat-state")).to_have_text("No answer: the connection ended before the answer did")
    assert page.locator(".message.assistant").evaluate("one => one.lastChild.data") == "half"


def test_an_error_of_a_proxy_is_shown_by_its_status(page):
    from playwright.sync_api import expect

    answer_with(page, "<html>Bad gateway</html>", 502, "text/html")
    page.fill("#chat-message", "Hello")
    page.press("#chat-message", "Enter")
    expect(page.locator("#chat-state")).to_have_text("No answer: the server answered with the status 502")
    assert page.input_value("#chat-message") == "Hello"


def test_chunks_that_come_fast_are_drawn_together(page):
    from playwright.sync_api import expect

    chunk = 'data: {"choices":[{"delta":{"content":"word "}}]}\n\n'
    answer_with(page, chunk * 3000 + "data: [DONE]\n\n")
    observe = "records => { window.changes = (window.changes || 0) + records.length; }"
    watch = "{ characterData: true, subtree: true }"
    page.evaluate(f"() => new MutationObserver({observe}).observe(document.getElementById('chat-log'), {watch})")
    page.fill("#chat-message", "Hello")
    page.press("#chat-message", "Enter")
    expect(page.locator("#chat-send")).to_be_enabled()
    assert page.locator(".message.assistant").evaluate("one => one.lastChild.data") == "word " * 3000
    assert page.evaluate("() => window.changes") < 300


def test_the_chat_comes_when_the_models_could_not_be_read_at_first(browser, server):
    from playwright.sync_api import expect

    asked = []

    def once(route):
        asked.append(route)
        if len(asked) == 1:
            route.fulfill(status=503, body="{}")
        else:
            route.continue_()

    context = browser.new_context()
    opened = context.new_page()
    opened.route("**/v1/models", once)
    opened.goto(server.http)
    expect(opened.locator("#chat")).to_be_visible()
    assert len(asked) == 2
    context.close()


def test_the_chosen_model_stays_chosen_when_other_models_come(page):
    from playwright.sync_api import expect

    names = ["a", "writer"]
    answer = json.dumps({"data": [{"id": name} for name in names]})
    page.route("**/v1/models", lambda route: route.fulfill(body=answer, content_type="application/json"))
    models = [{"name": name, "text": True, "ready": True} for name in names]
    page.evaluate("models => window.chatModels(models)", models)
    expect(page.locator("#chat-model option")).to_have_count(2)
    page.select_option("#chat-model", "writer")
    page.evaluate("models => window.chatModels(models)", [*models, {"name": "z", "text": True, "ready": True}])
    assert page.input_value("#chat-model") == "writer"


def test_the_chat_is_used_by_keyboard_alone(page):
    from playwright.sync_api import expect

    page.locator("#chat-message").focus()
    page.keyboard.type("first")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    assert page.input_value("#chat-message") == "first\nsecond"
    for reached in ("chat-temperature", "chat-tokens", "chat-send"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == reached
    page.keyboard.press("Enter")
    expect(page.locator("#chat-state")).to_have_text(re.compile(r"^\d+ tokens"))


def test_the_figures_of_texts_are_live(page, server):
    from playwright.sync_api import expect

    def figure(name):
        return page.locator(".figures.text div", has_text=name).locator("b")

    with Load(server):
        expect(figure("sequences running")).to_have_text("4")
        expect(figure("tokens/s")).to_have_text(re.compile(r"[1-9]"))
        expect(figure("time to first token")).to_have_text(re.compile("ms$"))
        expect(figure("between tokens")).to_have_text(re.compile("ms$"))
        expect(figure("caches").first).to_have_text(re.compile("B$"))
        expect(figure("caches reserved")).to_have_text(re.compile(r"[1-9]\d* %"))
    expect(figure("sequences running")).to_have_text("0")


def test_a_model_without_text_has_no_chat(browser, chain_plan, python_environment):
    with Served(chain_plan, environment=python_environment) as server:
        context = browser.new_context()
        opened = context.new_page()
        opened.goto(server.http)
        opened.wait_for_selector(".graph .box")
        assert opened.locator("#chat").is_hidden()
        assert opened.locator(".figures.text").is_hidden()
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_chat_fits_a_phone_in_light_and_dark(browser, server, scheme):
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    opened = context.new_page()
    opened.goto(server.http)
    opened.wait_for_selector("#chat:not([hidden])")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    style = "getComputedStyle(document.querySelector('#chat-message'))"
    assert opened.evaluate(f"{style}.color") != opened.evaluate(f"{style}.backgroundColor")
    context.close()
