"""Settings from a file: ``onnxsplit.toml`` in the current folder, or in the nearest folder above it that has one.

    [serve]
    http-port = 9000
    replicas = ["0=2"]

Each table is a command, each key is an option without its dashes. Precedence: the command line, ``ONNXSPLIT_*``
variables, this file, the defaults.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from onnxsplit.errors import one_line
from onnxsplit.files import MOST_TEXT_BYTES, read_regular

FILE = "onnxsplit.toml"


def find(start: Path) -> Path | None:
    """The settings file that is nearest: in a folder, or in one above it; None when there is none."""
    return next((place / FILE for place in (start, *start.parents) if (place / FILE).is_file()), None)


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The settings of each command by parameter name: dashes become underscores.

    Raises:
        click.UsageError: the file cannot be read, is not TOML, or has a setting outside of a table.
    """
    try:
        tables = tomllib.loads(read_regular(file, most_bytes=MOST_TEXT_BYTES).decode())
    except OSError as error:
        raise click.UsageError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # tomllib raises both, besides its own error
        raise click.UsageError(f"{file} is not valid TOML: {one_line(error, 300)}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise click.UsageError(
                f"{file}: {name!r} is outside of a table; put settings in a table named after their command"
            )
    return {name: {key.replace("-", "_"): value for key, value in table.items()} for name, table in tables.items()}


def apply(context: click.Context, commands: click.Group, command: str) -> None:
    """Take the file's settings as the defaults of a command.

    Raises:
        click.UsageError: the file names an unknown command or option, or an option that the file may not set.
    """
    file = find(Path.cwd())
    if file is None:
        return
    tables = read(file)
    unknown = [name for name in tables if name not in commands.list_commands(context)]
    if unknown:
        raise click.UsageError(
            f"{file}: there is no command {unknown[0]!r}; allowed: {', '.join(commands.list_commands(context))}"
        )
    chosen = commands.get_command(context, command)
    given = tables.get(command, {})
    if chosen is None or not given:
        return
    options = {
        name.lstrip("-").replace("-", "_"): parameter
        for parameter in chosen.params
        if isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    wrong = [key for key in given if key not in options]
    if wrong:
        raise click.UsageError(f"{file}: {command} has no option {wrong[0].replace('_', '-')!r}")
    values = {}
    for key, value in given.items():
        parameter = options[key]
        if not parameter.allow_from_autoenv:
            raise click.UsageError(
                f"{file}: {key.replace('_', '-')} loads code, so only the command line may give it; remove it here"
            )
        if parameter.multiple and not isinstance(value, list):
            value = [value]
        if isinstance(value, list) and not parameter.multiple:
            raise click.UsageError(f"{file}: {command}.{key} is {value!r}; it takes one value, not a list")
        if parameter.is_flag and not isinstance(value, bool):
            raise click.UsageError(f"{file}: {command}.{key} is {value!r}; allowed: true, false")
        if isinstance(value, bool) and parameter.flag_value is not None and not parameter.is_flag:
            value = parameter.flag_value if value else None  # an option that may be given without a value
        values[str(parameter.name)] = value if parameter.is_flag or value is None else _text(value)
    context.default_map = {**(context.default_map or {}), command: values}


def _text(value: Any) -> Any:
    """A value as text, as the command line would give it, so that the same checks apply."""
    return [str(item) for item in value] if isinstance(value, list) else str(value)


def different(context: click.Context) -> list[str]:
    """The options that differ from their defaults, each with its source; for a log."""
    words = {
        ParameterSource.COMMANDLINE: "command line",
        ParameterSource.ENVIRONMENT: "environment",
        ParameterSource.DEFAULT_MAP: FILE,
    }
    settings = []
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name)) if isinstance(parameter, click.Option) else None
        if source in words and parameter.name is not None:
            value = context.params.get(parameter.name)
            if isinstance(value, Mapping):  # as a repeated option has it
                value = " ".join(f"{key}={each}" for key, each in value.items())
            settings.append(f"{parameter.name.replace('_', '-')} = {value} ({words[source]})")
    return settings
