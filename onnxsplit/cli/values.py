"""Values that options take: counts, sizes, shares, times. Each has bounds, and none takes infinity or ``nan``."""

from __future__ import annotations

from typing import Any

import click

from onnxsplit.cluster import parse_size
from onnxsplit.numbers import MOST_BYTES, MOST_SECONDS, parse_whole
from onnxsplit.plan import MOST_NODES, MOST_THREADS

THREADS = click.IntRange(1, MOST_THREADS)
NODES = click.IntRange(1, MOST_NODES)
STAGE = click.IntRange(0, MOST_NODES - 1)


class StageCountParam(click.ParamType):  # type: ignore[type-arg]  # older click has no parameter here
    """A number, or ``auto``."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        if value == "auto" or isinstance(value, int):
            return value
        count = parse_whole(value, MOST_NODES)
        if not count:
            self.fail(f"{value!r} is neither a number from 1 to {MOST_NODES} nor auto", param, ctx)
        return count


class SizeParam(click.ParamType):  # type: ignore[type-arg]  # as above
    """Bytes, with K, M, G or T for powers of 1024.

    Args:
        least: bytes that it must be at least.
    """

    name = "size"

    def __init__(self, least: int = 1) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        found = value if isinstance(value, int) else parse_size(value)
        if found is None or not self._least <= found <= MOST_BYTES:
            self.fail(f"{value!r} is no size; write 512M or 2.5G, at least {self._least} and at most 1024T", param, ctx)
        return found


class NumberParam(click.FloatRange):
    """A number between two others; not ``nan``, which a range alone would let through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        found = super().convert(value, param, ctx)
        return found if found == found else self.fail(f"{value!r} is not a number", param, ctx)


class ShareParam(click.ParamType):  # type: ignore[type-arg]  # as above
    """``1%`` or ``0.01``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        text = str(value).strip()
        try:
            found = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return self.fail(f"{value!r} is no share; write 1% or 0.01", param, ctx)
        return found if 0 <= found <= 10 else self.fail(f"{value!r} is no share from 0% to 1000%", param, ctx)


class SecondsParam(click.ParamType):  # type: ignore[type-arg]  # as above
    """``10``, ``10s``, ``2m``."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        text = str(value).strip()
        unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
        try:
            found = float(text[:-1]) * unit if unit else float(text)
        except ValueError:
            return self.fail(f"{value!r} is no time; write 10s or 2m", param, ctx)
        if not 0 < found <= MOST_SECONDS:
            self.fail(f"{value!r} is no time above 0 and at most {MOST_SECONDS:.0f} seconds", param, ctx)
        return found
