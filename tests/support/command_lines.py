"""Reads command lines of onnxsplit with the parsers of its commands, without running them."""

from __future__ import annotations

import shlex

import click

from onnxsplit.cli import cli


def parse(command: str) -> click.Context:
    """Read a command line; files that its options name need not exist.

    Raises:
        click.UsageError: the command does not accept it.
    """
    name, *words = shlex.split(command, comments=True)[1:]
    found = cli.get_command(None, name)
    assert found is not None, f"there is no command {name}"
    context = found.make_context(name, words, ignore_unknown_options=False)
    while isinstance(found, click.Group):  # its own command is read, too
        name, *words = [*context._protected_args, *context.args]
        found = found.commands[name]
        context = found.make_context(name, words, parent=context)
    return context
