"""Values that options take: counts, sizes, shares, times."""

from __future__ import annotations

from typing import Any

import click

from onnxsplit.cluster import parse_size


class StageCount(click.ParamType):  # type: ignore[type-arg]  # older click has no parameter here
    """A number, or ``auto``."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            return self.fail(f"{value!r} is neither a number nor auto", param, ctx)


class Size(click.ParamType):  # type: ignore[type-arg]  # as above
    """Bytes, with K, M, G or T for powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        found = value if isinstance(value, int) else parse_size(value)
        return found if found is not None else self.fail(f"{value!r} is no size; write 512M or 2.5G", param, ctx)


class Share(click.ParamType):  # type: ignore[type-arg]  # as above
    """``1%`` or ``0.01``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        text = str(value).strip()
        try:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return self.fail(f"{value!r} is no share; write 1% or 0.01", param, ctx)


class Seconds(click.ParamType):  # type: ignore[type-arg]  # as above
    """``10``, ``10s``, ``2m``."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        text = str(value).strip()
        unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
        try:
            return float(text[:-1]) * unit if unit else float(text)
        except ValueError:
            return self.fail(f"{value!r} is no time; write 10s or 2m", param, ctx)
