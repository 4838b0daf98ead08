"""Types of option values: counts, sizes, shares and times. Each has bounds; none accepts infinity or ``nan``."""

from __future__ import annotations

import re
from typing import Any

import click

from onnxsplit.cluster import parse_size
from onnxsplit.numbers import MOST_BYTES, MOST_SECONDS, MOST_SIZE, parse_whole
from onnxsplit.plan_base import MOST_NODES, MOST_THREADS

THREADS = click.IntRange(1, MOST_THREADS)
NODES = click.IntRange(1, MOST_NODES)
STAGE = click.IntRange(0, MOST_NODES - 1)


class FilePath(click.Path):
    """A file or a folder. An empty name is refused, because pathlib takes it for the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, or fail on an empty name."""
        if value == "":
            self.fail("the name is empty; name a file or a folder", param, ctx)
        return super().convert(value, param, ctx)


class StageCountParam(click.ParamType):  # type: ignore[type-arg]  # older click has no parameter here
    """A number of stages, or ``auto``."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text of an option."""
        if isinstance(value, int):
            return value
        if value.lower() == "auto":
            return "auto"
        count = parse_whole(value, MOST_NODES)
        if not count:
            self.fail(f"{value!r} is neither a number from 1 to {MOST_NODES} nor auto", param, ctx)
        return count


class SizeParam(click.ParamType):  # type: ignore[type-arg]  # as above
    """A number of bytes, with K, M, G or T for powers of 1024.

    Args:
        least: the smallest size that is accepted, in bytes.
    """

    name = "size"

    def __init__(self, least: int = 1) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text of an option."""
        size = value if isinstance(value, int) else parse_size(value)
        if size is None or not self._least <= size <= MOST_BYTES:
            self.fail(
                f"{value!r} is not a size; write 512M or 2.5G, at least {self._least} and at most 1024T", param, ctx
            )
        return size


class NumberParam(click.FloatRange):
    """A number in a range; ``nan``, which click's range accepts, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text of an option."""
        number = super().convert(value, param, ctx)
        return number if number == number else self.fail(f"{value!r} is not a number", param, ctx)


class ShareParam(click.ParamType):  # type: ignore[type-arg]  # as above
    """A share: ``1%`` or ``0.01``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text of an option."""
        text = str(value).strip()
        try:
            number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return self.fail(f"{value!r} is not a share; write 1% or 0.01", param, ctx)
        return number if 0 <= number <= 10 else self.fail(f"{value!r} is not a share from 0% to 1000%", param, ctx)


class SecondsParam(click.ParamType):  # type: ignore[type-arg]  # as above
    """A time in seconds: ``10``, ``10s``, ``50ms``, ``2m`` or ``1h``.

    Args:
        unit: True refuses a number without a unit, where milliseconds are as likely to be meant.
    """

    name = "time"

    def __init__(self, *, unit: bool = False) -> None:
        self._unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text of an option."""
        text = str(value).strip()
        number_text, unit = re.fullmatch(r"(.*?)(ms|s|m|h|)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        try:
            number = float(number_text) * {"ms": 1e-3, "m": 60, "h": 3600}.get(unit, 1)
        except ValueError:
            return self.fail(f"{value!r} is not a time; write 10s, 50ms or 2m", param, ctx)
        if not 0 < number <= MOST_SECONDS:
            self.fail(f"{value!r} is not a time above 0 and at most {MOST_SECONDS:.0f} seconds", param, ctx)
        if self._unit and not unit:
            self.fail(f"{value!r} has no unit; write {text}ms or {text}s", param, ctx)
        return number


class TokensParam(click.ParamType):  # type: ignore[type-arg]  # as above
    """Numbers of tokens, with commas or spaces between them: ``1,2,3``.

    Args:
        none: whether ``none`` stands for no token.
    """

    name = "tokens"

    def __init__(self, *, none: bool = False) -> None:
        self._none = none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text of an option."""
        if isinstance(value, tuple):
            return value
        if self._none and value.lower() == "none":
            return ()
        text = str(value).strip()
        numbers = [parse_whole(part, MOST_SIZE) for part in re.split(r"\s*,\s*|\s+", text)]
        if None in numbers:
            self.fail(f"{value!r:.80} is not a list of tokens; write numbers such as 1,2,3", param, ctx)
        return tuple(numbers)


class RangeParam(click.ParamType):  # type: ignore[type-arg]  # as above
    """A number, or a range ``START:END`` or ``START:END:STEP``; the value is a tuple of start, end and step or None.

    Args:
        whole: whether only whole numbers are accepted.
        most: the largest number that is accepted.
    """

    name = "range"

    def __init__(self, *, whole: bool, most: float) -> None:
        self._whole = whole
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text of an option."""
        if isinstance(value, tuple):
            return value
        kind = "whole numbers" if self._whole else "numbers"
        texts = str(value).split(":")
        try:
            numbers = [float(int(text)) if self._whole else float(text) for text in texts]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 3 or not all(0 < number <= self._most for number in numbers):
            self.fail(
                f"{value!r:.80} is neither a number nor START:END or START:END:STEP, with {kind} above 0 and at most "
                f"{self._most:g}",
                param,
                ctx,
            )
        start, end = numbers[0], numbers[min(1, len(numbers) - 1)]
        if start > end:
            self.fail(f"{value!r} ends below its beginning; write the smaller number first", param, ctx)
        return start, end, numbers[2] if len(numbers) == 3 else None
