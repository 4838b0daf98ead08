"""The page of ``advise`` in a real browser, and properties of the file itself."""

from __future__ import annotations

import re

import msgspec
import pytest
from told_page import overlaps

from onnxsplit.planning.candidates import Candidate, Choice, Figures, Wishes
from onnxsplit.views.advice import Advice, AdviceRow, write_page

MS = 1_000_000


def row(kind, replicas, limit, p99_ms, *, measured=True, **marks) -> AdviceRow:
    candidate = Candidate(kind=kind, replicas=replicas, threads=1)
    figures = Figures(limit_per_s=limit, rate_per_s=0.7 * limit, p50_ns=MS, p99_ns=p99_ms and p99_ms * MS)
    choice = Choice(
        candidate=candidate,
        memory_bytes=1 << 20,
        total_bytes=sum(replicas) << 20,
        predicted=figures,
        measured=figures if measured else None,
    )
    given = {"on_front": False, "picked": False, "keeps": True, **marks}
    return AdviceRow(name=candidate.name, choice=choice, rate_per_s=limit, **given)


ADVICE = Advice(
    model="</script><script>alert(1)</script>",
    wishes=Wishes(p99_ns=20 * MS),
    asked="Asked for: as many requests/s as possible.",
    rows=(
        row("replicas", (2,), 120.0, 12, picked=True, on_front=True),
        row("session", (1,), 80.0, 9, on_front=True),
        row("stages", (1, 1), 90.0, 30, measured=False, keeps=False),
        row("stages", (1, 1, 1), 50.0, None, keeps=False),
    ),
    reason="2 replicas x 1: it takes 120 requests/s (measured).",
    keeps=True,
    whole=None,
    commands=("onnxsplit serve m.plan --replicas 2",),
    notes=("A note.",),
    disturbed=0.0,
)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("advice") / "advice.html"
    write_page(ADVICE, file)
    return file


def test_the_file_stands_alone(picture):
    text = picture.read_text()
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)["']|@import|url\((?!#)""", text.split('id="data"')[0])
    assert loaded == []
    assert "default-src 'none'" in text
    assert not re.search(r"/\*(styles|data|libraries|script|licences)\*/", text)


def test_the_page_shows_each_candidate_with_a_p99_as_a_circle_and_all_in_the_table(browser, picture):
    page = browser.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(picture.as_uri())
    assert page.locator("#picture circle").count() == 3
    assert page.locator("#picture circle.picked").count() == 1
    assert page.locator("#picture circle.predicted").count() == 1
    assert page.locator("#table tbody tr").count() == 4
    assert page.locator("tr.picked td").first.text_content() == "2 replicas x 1"
    assert "120" in (page.locator("#reason").text_content() or "")
    assert problems == []
    page.close()


@pytest.mark.parametrize("width", [1000, 390])
def test_names_meet_no_circle_no_line_and_no_other_name(browser, tmp_path, width):
    near = [row("stages", (2, 1), 95.0, 11), row("hybrid", (2, 2), 100.0, 11), row("stages", (1, 1), 90.0, 10)]
    rows = [row("replicas", (2,), 120.0, 12, picked=True, on_front=True), row("session", (1,), 80.0, 9, on_front=True)]
    rows += [msgspec.structs.replace(one, on_front=True) for one in near]
    write_page(msgspec.structs.replace(ADVICE, rows=tuple(rows)), tmp_path / "advice.html")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto((tmp_path / "advice.html").as_uri())
    found = page.evaluate("""() => {
      const box = (one) => one.getBoundingClientRect().toJSON();
      const all = (what) => [...document.querySelectorAll(what)].map(box);
      const path = document.querySelector("#picture .front"), zero = box(path.ownerSVGElement), line = [];
      for (let at = 0; at <= path.getTotalLength(); at += 1) {
        const { x, y } = path.getPointAtLength(at);
        line.push({ left: zero.left + x, right: zero.left + x, top: zero.top + y, bottom: zero.top + y });
      }
      const others = [...all("#picture circle"), ...all("#picture .limit"), ...line];
      return { names: all("#picture .name rect"), others };
    }""")
    names = found["names"]
    assert len(names) >= 2
    assert not [(name, one) for name in names for one in found["others"] if overlaps(name, one, slack=-0.1)]
    assert not [(one, two) for at, one in enumerate(names) for two in names[:at] if overlaps(one, two)]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
