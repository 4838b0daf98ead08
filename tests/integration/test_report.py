"""The report in a real browser, and properties of the file itself."""

from __future__ import annotations

import re

import build
import pytest

from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import examine_for, write_plan
from onnxsplit.planning.sweep import sweep
from onnxsplit.views.report import write_report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of a chain in three stages; one of its names contains the end tag of a script."""
    folder = tmp_path_factory.mktemp("report")
    proto = build.chain(9)
    proto.graph.node[0].name = "</script><script>alert(1)</script>"
    model = build.save(proto, folder)
    wanted = CutOptions(stages=3)
    result = write_plan(examine_for(model, wanted, costs="analytic"), folder / "model.plan", wanted)
    write_report(result, folder / "report.html", sweep(result.subject, range(1, 5)))
    return folder / "report.html"


def test_the_file_stands_alone(report):
    text = report.read_text()
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)["']|@import|url\((?!#)""", text.split('id="data"')[0])
    assert loaded == []
    assert "default-src 'none'" in text
    assert "sourceMappingURL" not in text
    assert text.count("Permission is hereby granted") >= 2, "the licences of what is inside"
    assert not re.search(r"/\*(styles|data|libraries|script|licences)\*/", text)
    assert list(report.parent.glob(".*.tmp")) == []


@pytest.fixture(params=["light", "dark"])
def page(browser, report, request):
    opened = browser.new_page(color_scheme=request.param)
    opened.problems = []
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("console", lambda said: opened.problems.append(said.text) if said.type == "error" else None)
    opened.on("request", lambda sent: opened.problems.append(sent.url) if not sent.url.startswith("file:") else None)
    opened.goto(report.as_uri())
    yield opened
    assert opened.problems == []
    opened.close()


def boxes(page) -> list[str]:
    return page.locator("#graph .box").evaluate_all("all => all.map(box => box.getAttribute('aria-label'))")


def test_every_stage_is_shown(page):
    assert [label.split(",")[0] for label in boxes(page)] == ["stage 0", "stage 1", "stage 2"]
    assert page.locator("#bars .bar").count() == 9
    assert page.locator("#cuts tbody tr").count() == 2
    assert page.locator("#sweep canvas").count() == 1
    assert page.locator("#sweep-table tbody tr").count() == 4
    assert "no cut is below" in page.locator("#summary").inner_text()


def test_the_verdict_compares_the_plan_with_other_ways_to_run_the_model(page):
    assert "Cutting makes this slower here" in page.locator("#verdict").inner_text()
    labels = page.locator("#verdict .measure > div:not(.bar)").all_inner_texts()
    assert labels == ["3 stages, 1 thread", "1 session, 1 thread", "3 replicas, 1 thread"]


def test_a_click_opens_a_stage_and_its_ops(page):
    page.locator("#graph .box").nth(1).click()
    assert "stage 1" in page.locator("#path").inner_text()
    titles = [label.split(",")[0] for label in boxes(page)]
    assert {"MatMul", "Relu", "stage 0", "stage 2"} == set(titles)
    page.locator("#path button").first.click()
    assert len(boxes(page)) == 3


def test_keys_walk_open_and_go_back(page):
    page.locator("#graph .box").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("stage 1")
    page.keyboard.press("Enter")
    assert "stage 1" in page.locator("#path").inner_text()
    wide = page.locator("#graph svg").get_attribute("width")
    page.keyboard.press("+")
    assert float(page.locator("#graph svg").get_attribute("width")) > float(wide)
    page.keyboard.press("Escape")
    assert len(boxes(page)) == 3


def test_names_are_text_and_never_code(page):
    page.locator("#graph .box").first.click()
    page.locator("#graph .box").first.focus()
    assert "<script>alert(1)</script>" in page.locator("#detail").inner_text()


def test_it_fits_a_phone(browser, report):
    narrow = browser.new_page(viewport={"width": 380, "height": 800})
    narrow.goto(report.as_uri())
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 380
    narrow.close()


def test_it_prints(browser, report):
    sheet = browser.new_page()
    sheet.goto(report.as_uri())
    assert len(sheet.pdf()) > 10_000
    sheet.close()
