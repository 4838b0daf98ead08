"""``onnxsplit completion``."""

from __future__ import annotations

import click

from onnxsplit.cli.output import Output, make_command


@make_command
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(output: Output, *, shell: str) -> None:
    """Print what makes SHELL complete onnxsplit's commands and options.

    bash: eval "$(onnxsplit completion bash)"; the same for zsh. fish: onnxsplit completion fish | source
    """
    from click.shell_completion import get_completion_class

    from onnxsplit.cli import cli

    found = get_completion_class(shell)
    assert found is not None
    script = found(cli, {}, "onnxsplit", "_ONNXSPLIT_COMPLETE").source()
    output.line(script)
    output.result({"shell": shell, "script": script})
