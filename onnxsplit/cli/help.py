"""Commands and options as the help shows them."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from onnxsplit.cli.settings import FILE
from onnxsplit.errors import shown

Command = Callable[..., Any]


NETWORK, NODES, REQUESTS, MODELS = "Network", "Nodes", "Requests and batches", "Models"
LANGUAGE_MODELS, SECURITY, OTHER_HOSTS = "Language models", "Security", "Nodes on other hosts"
MEASURING, RESULTS, REST = "Measuring", "Results", "Options"
_SHARED = (NETWORK, NODES, REQUESTS, MODELS, LANGUAGE_MODELS, SECURITY, OTHER_HOSTS, RESULTS)
"""Headings of several commands, in the order of the help. A command's own headings come before them."""

OptionTable = list[tuple[tuple[str, ...], dict[str, Any]]]
"""Options in the order of the help: the names of each, and the arguments of ``click.option``."""


class SectionOption(click.Option):
    """An option that the help lists under a heading. Its variable is named as the option is written.

    Attributes:
        section: the heading; options without one are listed last, as "Options".
    """

    def __init__(self, *names: Any, section: str = "", **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.section = section
        if not self.allow_from_autoenv:
            self.help = f"{self.help} Only the command line can set it."

    @property
    def written(self) -> str:
        """The first name with two dashes, such as ``--dim``."""
        return next(name for name in self.opts if name.startswith("--"))

    def variable(self, ctx: click.Context) -> str | None:
        """The name of the environment variable that sets the option; None where no variable can."""
        if not self.allow_from_autoenv or ctx.auto_envvar_prefix is None:
            return None
        return f"{ctx.auto_envvar_prefix}_{self.written[2:].replace('-', '_').upper()}"

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The value in the environment. Names that follow the parameter, as in earlier versions, are accepted, too."""
        variable = self.variable(ctx)
        return (os.environ.get(variable) if variable is not None else None) or super().resolve_envvar_value(ctx)


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """An option; ``section`` is the heading that the help lists it under."""
    return click.option(*names, cls=SectionOption, **settings)


def under(section: str, options: OptionTable) -> OptionTable:
    """The options of a table under a heading."""
    return [(names, {**settings, "section": section}) for names, settings in options]


def add_options(options: OptionTable) -> Callable[[Command], Command]:
    """A decorator that gives a command the options of a table."""

    def decorate(command: Command) -> Command:
        for names, settings in reversed(options):
            command = option(*names, **settings)(command)
        return command

    return decorate


def path_option(*names: str, metavar: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that takes the path of a file or folder."""
    return option(*names, type=click.Path(path_type=Path), metavar=metavar, **settings)


class ManyValues(click.Command):
    """A command whose repeatable options also take several values at once: ``--dim a=1 b=2``."""

    def get_help_option_names(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  the same in every context
        """The names of the option for help. click keeps that of the first context which asks for it."""
        return ["-h", "--help"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings of their sections; those without one come last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        for parameter in sorted(options, key=_place):
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(parameter, "section", "") or REST, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Say how else options can be set, with the variable of the first one as the example."""
        options = (one for one in self.params if isinstance(one, SectionOption) and not one.hidden)
        example = next((one for one in options if one.variable(ctx) is not None), None)
        if example is not None:
            file = f", or in {FILE}" if ctx.parent is not None and ctx.parent.parent is None else ""
            text = f"Options can be set by variables, e.g. {example.written} as {example.variable(ctx)}{file}."
            formatter.write_paragraph()
            formatter.write_text(text)

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
        try:
            return super().parse_args(ctx, [token for place, token in enumerate(result) if place not in claimed])
        except click.NoSuchOption as error:
            names = [name for one in self.get_params(ctx) if not getattr(one, "hidden", False) for name in one.opts]
            near = get_close_matches(error.option_name, names)
            raise click.NoSuchOption(error.option_name, possibilities=near, ctx=ctx) from error


class CommandGroup(click.Group):
    """A group that answers an unknown command with the nearest one that it has."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments begin with.

        Raises:
            click.UsageError: there is none of this name.
        """
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            near = get_close_matches(name, known, n=1)
            what = f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(known)}."
            ctx.fail(f"No such command {shown(name)}. {what}")
        return super().resolve_command(ctx, args)


def _place(parameter: click.Option) -> int:
    """The place of an option's heading; options with the same place keep their order."""
    section = getattr(parameter, "section", "")
    return len(_SHARED) if not section else _SHARED.index(section) if section in _SHARED else -1
