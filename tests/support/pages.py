"""Reads the Markdown pages of this repository: their fenced blocks, links and headings."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PROMPT = re.compile(r"([\w-]*)\$ (.*)")
NUMBER = r"\d[\d,.]*(?:e[+-]\d+)?"
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page, in order: what follows the opening fence, and the content."""
    return FENCE.findall(text)


def blocks_of(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page that is named from the root. Whoever calls this runs or checks every one of them."""
    return blocks((ROOT / page).read_text())


def block_of(page: str, start: str) -> str:
    """The content of the one block of a page that begins with ``start``. Whoever calls this runs or checks it."""
    (found,) = [block for _, block in blocks_of(page) if block.startswith(start)]
    return found


def commands(block: str) -> list[tuple[str, str]]:
    """The commands of a console block: the host before the prompt ("" for this one), and what is typed there."""
    joined = block.replace("\\\n", " ")
    return [match.groups() for match in map(PROMPT.fullmatch, joined.splitlines()) if match is not None]


def pattern(shown: str) -> str:
    """A pattern of output that a page shows.

    Any numbers fit in the place of its numbers, any gaps in its gaps, and anything in the place of three dots.
    """
    words = (".*?" if word == "..." else NUMBER.join(map(re.escape, re.split(NUMBER, word))) for word in shown.split())
    return r"(?s)" + r"\s+".join(words)


def links(text: str) -> list[str]:
    """The targets of a page's links and images that do not lead to another site."""
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))
    return [target for target in targets if "://" not in target]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of it."""
    dead = []
    for link in links(page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            dead.append(link)
    return dead


def missing_paths(page: Path) -> list[str]:
    """The paths of this repository that a page names in backquotes, or as a command's file, and that do not exist."""
    named = re.findall(r"\b(?:onnxsplit|runtime|tests|benchmarks|models|docs)/[\w/.-]+", page.read_text())
    paths = {name.rstrip("./") for name in named if Path(name.rstrip(".")).suffix in (".py", ".json", ".toml", ".md")}
    return sorted(path for path in paths if not (ROOT / path).exists())
