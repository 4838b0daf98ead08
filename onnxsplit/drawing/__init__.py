"""Parts that all HTML pages share: graph drawing, tables and colours. Each page is one file that needs no network."""

from __future__ import annotations

from importlib.resources import files

LIBRARIES = ("dagre.min.js", "draw.js")
"""Names of the scripts that draw, in the order in which a page loads them."""

CHARTS = "uPlot.iife.min.js"
"""Name of the script that draws charts, for pages that have some."""

LICENCES = (("dagre", "dagre.LICENSE"), ("uPlot", "uPlot.LICENSE"))
"""Names of the third-party libraries, and of the files with their licences."""


def script(source: str) -> str:
    """JavaScript without its pointer to a source map, which is not shipped."""
    return "\n".join(line for line in source.splitlines() if not line.startswith("//# sourceMappingURL"))


def asset(name: str) -> str:
    """Text of a file of this package: a library, a licence, or ``base.css``."""
    return (files(__name__) / "assets" / name).read_text(encoding="utf-8")


def libraries(*, charts: bool = False) -> str:
    """The scripts that draw, as one text; they define ``draw`` and, with ``charts``, ``uPlot``."""
    return "\n".join(script(asset(name)) for name in (*LIBRARIES, *((CHARTS,) if charts else ())))


def styles(*, charts: bool = False) -> str:
    """The style sheet for colours, text, tables, bars and graphs, and with ``charts`` for these too."""
    return asset("base.css") + (asset("uPlot.min.css") if charts else "")


def fill(page: str, **parts: str) -> str:
    """Fill in a page: each part replaces the first comment ``/*name*/``."""
    for name, part in parts.items():
        page = page.replace(f"/*{name}*/", part, 1)
    return page


def licences(*, charts: bool = False) -> str:
    """Names and licences of the libraries, as text for an HTML comment."""
    used = LICENCES if charts else LICENCES[:1]
    return "\n".join(f"{name}\n{asset(file)}" for name, file in used).replace("--", "- -")
