"""The command ``onnxsplit completion``."""

from __future__ import annotations

import functools

import click

from onnxsplit.cli.output import Output, make_command


@functools.partial(make_command, modes=False)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(output: Output, *, shell: str) -> None:
    """Print a script that makes SHELL complete the commands and options of onnxsplit.

    In bash: eval "$(onnxsplit completion bash)"; zsh takes the same. In fish: onnxsplit completion fish | source
    """
    from click.shell_completion import get_completion_class

    from onnxsplit.cli import cli

    completion = get_completion_class(shell)
    assert completion is not None
    script = completion(cli, {}, "onnxsplit", "_ONNXSPLIT_COMPLETE").source()
    output.line(script)
