"""The report in a real browser, and properties of the file itself."""

from __future__ import annotations

import re

import build
import pytest
from decoders import plain
from told_page import BOXES, crossed, overlaps

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


WIDTHS = [1000, 390]


@pytest.fixture(params=WIDTHS)
def sized(browser, report, request):
    opened = browser.new_page(viewport={"width": request.param, "height": 900})
    opened.goto(report.as_uri())
    yield opened
    opened.close()


def test_values_stand_clear_of_bars_and_marks(sized):
    found = sized.evaluate("""() => {
      const box = (one) => one.getBoundingClientRect().toJSON();
      const all = (what) => [...document.querySelectorAll(what)].map(box);
      return { texts: all(".measure .value, .measure .name"), bars: all(".measure .bar, .measure .bar *") };
    }""")
    assert len(found["texts"]) == 2 * (9 + 3), "three measures of three stages, and three ways to run the model"
    assert not [(text, bar) for text in found["texts"] for bar in found["bars"] if overlaps(text, bar)]
    assert sized.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_legend_has_the_values_of_the_marks(page):
    legend = page.locator("#bars .legend").inner_text()
    assert re.search(r"equal shares [\d.]+ ms", legend)
    assert re.search(r"lower bound [\d.]+ ms", legend)
    assert page.locator("#bars .bar b.bound").count() == 3


def test_the_graph_takes_the_width_and_no_line_meets_a_label(sized):
    found = sized.eval_on_selector("#graph", BOXES)
    assert len(found["labels"]) == 2
    assert not [(box, at) for box in found["labels"] + found["boxes"] for at in found["lines"] if crossed(box, at)]
    right = max(box["right"] for box in found["boxes"])
    assert right > found["frame"]["right"] - 40, "at least as wide as its frame"


def test_texts_are_aligned_to_the_left_and_figures_to_the_right(page):
    sides = page.evaluate("""[...document.querySelectorAll("#cuts th, #cuts tbody tr:first-child td")]
      .map(one => getComputedStyle(one).textAlign)""")
    assert sides == ["left", "left", "left", "left", "right"] * 2


def test_a_plan_without_decoder_has_no_block_for_it(page):
    assert page.locator("#decoder-section").count() == 0


@pytest.fixture(scope="module")
def decoder_report(tmp_path_factory):
    """The report of a decoder in two stages."""
    folder = tmp_path_factory.mktemp("decoder")
    wanted = CutOptions(stages=2)
    subject = examine_for(build.save(plain(), folder), wanted, decode_rows=2, context=16)
    result = write_plan(subject, folder / "model.plan", wanted)
    write_report(result, folder / "report.html")
    return folder / "report.html", result.plan


def test_a_decoder_has_a_block_with_what_is_known_of_it(browser, decoder_report):
    file, plan = decoder_report
    opened = browser.new_page()
    opened.goto(file.as_uri())
    block = opened.locator("#decoder").inner_text()
    assert f"at most {plan.decoder.max_length} positions" in block
    assert "2 sequences with 16 positions each" in block
    per_s = re.search(r"Tokens per second\s+([\d,.]+):", block)[1].replace(",", "")
    assert float(per_s) == pytest.approx(2 * plan.prediction.throughput_per_s, rel=0.01)
    assert f"room for {plan.decoder.cache_tokens} positions" in block
    assert "Proven by" in block
    assert opened.locator("#decoder .bar").count() == 2
    opened.close()
