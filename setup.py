"""Makes the description of the package from the README. All else about the package is in pyproject.toml.

Registries show the description without the repository, where relative links and pictures lead nowhere. If
``[project.urls]`` has a ``Source``, the repository's address, they become absolute. Otherwise links become plain text,
and pictures are left out.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
_BLOCKS = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_PICTURE = re.compile(r"^!\[([^\]]*)\]\((?!\w+://)([^)\s]+)\)\n\n?", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+://|#)([^)\s]+)\)")


def description(readme: str, source: str | None) -> str:
    """Return the README for readers who do not have the repository.

    Args:
        readme: the README, as Markdown.
        source: the address of the repository, if it has one, such as ``https://host/owner/name``.
    """
    base = (source or "").rstrip("/")
    picture = rf"![\1]({base}/raw/HEAD/\2)\n\n" if base else ""
    link = rf"[\1]({base}/blob/HEAD/\2)" if base else r"\1"
    parts = _BLOCKS.split(readme)
    parts[::2] = [_LINK.sub(link, _PICTURE.sub(picture, part)) for part in parts[::2]]
    return "".join(parts)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    setup(
        long_description=description((ROOT / "README.md").read_text(), project.get("urls", {}).get("Source")),
        long_description_content_type="text/markdown",
    )
