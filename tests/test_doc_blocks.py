"""Every fenced block of the README and the documentation is run or checked by a test, or says here why not.

A test claims blocks by the calls ``pages.blocks_of("PAGE")`` (all of a page, each by its kind) and
``pages.block_of("PAGE", "START")`` (one). A new block that no test claims fails here.
"""

from __future__ import annotations

import ast
import re
from functools import cache

import pages
import pytest
from command_lines import parse

from onnxsplit.cli import cli

PAGES = ["README.md", *sorted(str(page.relative_to(pages.ROOT)) for page in pages.ROOT.glob("docs/**/*.md"))]
WHOLE = {"docs/states.md": "tests/test_states.py compares the page with the tables in the code"}
PARSED = {
    (
        "docs/hosts.md",
        "$ pip install -e '.[cpu,serve,ray]'",
    ): "starts a Ray cluster; tests/integration/test_ray.py does",
    ("docs/providers.md", "$ onnxsplit partition"): "needs a device of OpenVINO",
}
"""Blocks whose onnxsplit commands are only read by their parsers, and why."""
DRAWINGS = {
    "README.md": 1,
    "docs/advise.md": 0,
    "docs/architecture.md": 3,
    "docs/cutting.md": 1,
    "docs/decoders.md": 1,
    "docs/recut.md": 1,
    "docs/running.md": 1,
    "docs/serving.md": 1,
}
"""The number of drawings on each page that has a block of text. Names of folders and commands in them are checked."""


@cache
def claims() -> dict[str, set[str]]:
    """The starts of the blocks that tests claim, by page; "" is the start of any."""
    found: dict[str, set[str]] = {page: {""} for page in WHOLE}
    for file in pages.ROOT.glob("tests/**/test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr="blocks_of"), args=[ast.Constant(value=str(page))]):
                    found.setdefault(page, set()).add("")
                case ast.Call(
                    func=ast.Attribute(attr="block_of"),
                    args=[ast.Constant(value=str(page)), ast.Constant(value=str(start))],
                ):
                    found.setdefault(page, set()).add(start)
    for page, start in PARSED:
        found.setdefault(page, set()).add(start)
    return found


def drawings(page: str) -> list[str]:
    """The drawings of a page: its blocks of text that no test claims by their start."""
    starts = claims().get(page, set()) - {""}
    return [block for kind, block in pages.blocks_of(page) if kind == "text" and not any(map(block.startswith, starts))]


def unclaimed(page: str, starts: set[str]) -> list[str]:
    return [
        block
        for kind, block in pages.blocks_of(page)
        if kind != "text" and not any(block.startswith(start) for start in starts)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_claimed_by_a_test(page):
    assert unclaimed(page, claims().get(page, set())) == [], "run it in a test, or add it to PARSED with the reason"
    assert len(drawings(page)) == DRAWINGS.get(page, 0), "is it a drawing? Output has the kind output"


def test_a_new_block_is_noticed():
    assert len(unclaimed("docs/cutting.md", set())) >= 3
    assert unclaimed("docs/cutting.md", {"2 stages: ", "$ onnxsplit partition"}) != []


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_fenced_and_has_a_kind(page):
    text = (pages.ROOT / page).read_text()
    assert "" not in [kind for kind, _ in pages.blocks(text)]
    assert re.findall(r"\n\n {4}\S.*", pages.FENCE.sub("", text)) == [], "this is indented code; fence it"


def test_pages_that_a_test_claims_exist():
    assert set(claims()) <= set(PAGES)
    assert set(DRAWINGS) <= set(PAGES)


@pytest.mark.parametrize(("page", "start"), PARSED, ids=lambda value: value)
def test_the_parsers_accept_what_cannot_run_here(page, start):
    commands = [command for _, command in pages.commands(pages.block_of(page, start))]
    assert [parse(command) for command in commands if command.startswith("onnxsplit ")]


NAMES = re.compile(r"(?<![\w./-])((?:[a-z_]+/)+)|\bonnxsplit (\w+)")


@pytest.mark.parametrize("page", DRAWINGS)
def test_what_a_drawing_names_exists(page):
    for drawing in drawings(page):
        for folder, command in NAMES.findall(drawing):
            assert not folder or any(pages.ROOT.glob(f"*/{folder}")) or (pages.ROOT / folder).is_dir(), folder
            assert not command or cli.get_command(None, command) is not None, command
