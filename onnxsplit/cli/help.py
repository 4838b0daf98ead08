"""Commands and options as the help shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


class SectionOption(click.Option):
    """An option that the help of its command lists under a heading.

    Attributes:
        section: the heading; options without one are listed last, as "Options".
    """

    def __init__(self, *names: Any, section: str = "", **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.section = section


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """An option whose help names its environment variable; ``section`` is the heading that the help lists it under."""
    return click.option(*names, cls=SectionOption, show_envvar=True, **settings)


def path_option(*names: str, metavar: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that takes the path of a file or folder."""
    return option(*names, type=click.Path(path_type=Path), metavar=metavar, **settings)


class ManyValues(click.Command):
    """A command whose repeatable options also take several values at once: ``--dim a=1 b=2``."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings of their sections; those without one come last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        for parameter in sorted(options, key=lambda one: not getattr(one, "section", "")):
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(parameter, "section", "") or "Options", []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Write ``--dim a b`` as ``--dim a --dim b``; the last values are left to arguments that still need one."""
        options = {name: p for p in self.params if isinstance(p, click.Option) for name in p.opts}
        wanted = sum(isinstance(p, click.Argument) and p.required for p in self.params)
        result: list[str] = []
        spare: list[int] = []  # positions in the result of values that an argument could take instead
        many, position = None, 0
        while position < len(args):
            token = args[position]
            option = options.get(token)
            if token.startswith("-"):
                many = token if option is not None and option.multiple else None
                takes_value = option is not None and not option.is_flag
                result += args[position : position + 1 + takes_value]
                position += 1 + takes_value
                continue
            if many is not None:
                result += [many, token]
                spare.append(len(result) - 1)
            else:
                wanted -= 1
                result.append(token)
            position += 1
        claimed = {place - 1 for place in spare[len(spare) - wanted :]} if wanted > 0 else set()
        return super().parse_args(ctx, [token for place, token in enumerate(result) if place not in claimed])
