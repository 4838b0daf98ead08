"""Parts that all HTML pages share: graph drawing, tables and colours. Each page is one file that needs no network."""

from __future__ import annotations

from importlib.resources import files

LIBRARIES = ("dagre.min.js", "draw.js")
"""Names of the scripts that draw, in the order in which a page loads them."""

LICENCES = (("dagre", "dagre.LICENSE"),)
"""Names of the third-party libraries, and of the files with their licences."""


def script(source: str) -> str:
    """JavaScript without its pointer to a source map, which is not shipped."""
    return "\n".join(line for line in source.splitlines() if not line.startswith("//# sourceMappingURL"))


def asset(name: str) -> str:
    """Text of a file of this package: a library, a licence, or ``base.css``."""
    return (files(__name__) / "assets" / name).read_text(encoding="utf-8")


def libraries() -> str:
    """The scripts that draw, as one text; they define ``draw``."""
    return "\n".join(script(asset(name)) for name in LIBRARIES)


def styles() -> str:
    """The style sheet for colours, text, tables and graphs."""
    return asset("base.css")


def fill(page: str, **parts: str) -> str:
    """Fill in a page: each part replaces the first comment ``/*name*/``."""
    for name, part in parts.items():
        page = page.replace(f"/*{name}*/", part, 1)
    return page


def licences(*more: tuple[str, str]) -> str:
    """Names and licences of the libraries, and of ``more``, as text for an HTML comment."""
    all_of_them = (*((name, asset(file)) for name, file in LICENCES), *more)
    return "\n".join(f"{name}\n{text}" for name, text in all_of_them).replace("--", "- -")
