"""The page of ``advise`` in a real browser, and properties of the file itself."""

from __future__ import annotations

import re

import pytest

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


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("advice") / "advice.html"
    advice = Advice(
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
    write_page(advice, file)
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
