"""What all pages share: drawing of graphs of boxes, tables, colours. Each page is one file that needs no network."""

from __future__ import annotations

from importlib.resources import files

LIBRARIES = ("dagre.min.js", "draw.js")
"""The scripts that draw, in order."""

LICENCES = (("dagre", "dagre.LICENSE"),)
"""Whose work is in them, and the files that say under what licence."""


def script(source: str) -> str:
    """JavaScript without a pointer to a map that is not there."""
    return "\n".join(line for line in source.splitlines() if not line.startswith("//# sourceMappingURL"))


def asset(name: str) -> str:
    """A file of this package: a library, a licence, or ``base.css``."""
    return (files(__name__) / "assets" / name).read_text(encoding="utf-8")


def libraries() -> str:
    """The scripts that draw; they define ``draw``."""
    return "\n".join(script(asset(name)) for name in LIBRARIES)


def styles() -> str:
    """Colours, text, tables and graphs."""
    return asset("base.css")


def fill(page: str, **parts: str) -> str:
    """A page with its parts: each replaces the comment ``/*name*/``."""
    for name, part in parts.items():
        page = page.replace(f"/*{name}*/", part, 1)
    return page


def licences(*more: tuple[str, str]) -> str:
    """Whose work is in the libraries, and ``more`` names and texts, fit to stand in a comment of HTML."""
    all_of_them = (*((name, asset(file)) for name, file in LICENCES), *more)
    return "\n".join(f"{name}\n{text}" for name, text in all_of_them).replace("--", "- -")
