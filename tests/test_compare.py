"""docs/compare.md: every row says what onnxsplit does, and names a test or command that shows it."""

from __future__ import annotations

import ast
import re

import pages
import pytest
from command_lines import parse

PAGE = (pages.ROOT / "docs" / "compare.md").read_text()
HEADER = "| | onnxsplit | Triton | Ray Serve | BentoML | KServe | mosec | LitServe |"
SAYS_NO = re.compile(r"no\b|\*\*(?:no|alpha)\b")  # these need no evidence


def rows() -> dict[str, list[str]]:
    """The cells of each row of a comparison, by its feature; ours comes first."""
    found: dict[str, list[str]] = {}
    for table in PAGE.split(f"{HEADER}\n")[1:]:
        for line in table.partition("\n\n")[0].splitlines()[1:]:
            feature, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found[feature] = cells
    return found


def test_every_row_has_a_cell_for_everyone():
    assert len(rows()) >= 30
    assert {feature for feature, cells in rows().items() if len(cells) != 7 or not all(cells)} == set()


@pytest.mark.parametrize("feature", rows())
def test_what_we_claim_is_shown_by_a_test_or_command(feature):
    ours = rows()[feature][0]
    evidence = re.findall(r"`([^`]+)`", ours)
    assert evidence or SAYS_NO.match(ours), "name a test or a command"
    for shown in evidence:
        if shown.startswith("onnxsplit "):
            parse(shown)
        else:
            file, _, name = shown.partition("::")
            assert name in functions(file), shown


def functions(file: str) -> set[str]:
    tree = ast.parse((pages.ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
