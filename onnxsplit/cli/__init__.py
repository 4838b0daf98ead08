"""The command line. Each command has a file of its own, imported when the command is used, so that help is fast."""

from __future__ import annotations

import atexit
import json
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Any

import click

import onnxsplit
from onnxsplit.cli import settings, streams
from onnxsplit.cli.help import CommandGroup
from onnxsplit.cli.output import Output

_COMMANDS = {
    "Prepare": {
        "export": "Export a model of another framework to ONNX.",
        "inspect": "Show a model's ops, cost and memory, and where to cut it.",
        "advise": "Find the best way to run a model that serves requests.",
        "partition": "Cut a model into balanced stages and write a plan.",
        "cluster": "Describe devices and links in a file, and measure them.",
        "place": "Move a plan's stages to other devices without a new cut.",
        "replan": "Cut a plan's model again for devices whose speed has changed.",
        "verify": "Compare a plan's outputs with those of the whole model.",
        "merge": "Join the stages of a plan into one model again.",
    },
    "Run": {
        "run": "Run a plan on one set of inputs.",
        "chat": "Talk with a plan that has a decoder and a chat template.",
        "generate": "Continue a text with a plan that has a decoder.",
        "serve": "Serve plans over HTTP and gRPC, with metrics and a status page.",
        "node": "Start one node by hand, for a pipeline that waits for it.",
        "deploy": "Write Kubernetes manifests for a plan.",
        "status": "Show the pipelines on this host: nodes, rates and restarts.",
        "keys": "Make and manage the keys that protect links between hosts.",
        "load": "Send load to a server or a plan, and measure how it answers.",
        "bench": "Measure a plan's throughput, latency and efficiency.",
    },
    "Help": {
        "doctor": "Show what this host has, and what onnxsplit can use of it.",
        "completion": "Print a script for completion in your shell.",
    },
}


class _Commands(CommandGroup):
    """The commands, listed in groups; each is imported from its own file when it is called."""

    def list_commands(self, ctx: click.Context | None) -> list[str]:
        return [name for group in _COMMANDS.values() for name in group]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f"onnxsplit.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            settings.apply(ctx, self, name)
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))


@click.command(
    cls=_Commands,
    context_settings={
        "auto_envvar_prefix": "ONNXSPLIT",
        "help_option_names": ["-h", "--help"],
        "show_default": True,
    },
    epilog="Start with: onnxsplit partition model.onnx",
)
@click.version_option(onnxsplit.__version__, "-V", "--version")
def cli() -> None:
    """Cut any ONNX model into stages, and run the stages as one pipeline of processes."""


def main() -> None:
    """Run ``onnxsplit`` and exit. A failure is one message on stderr, and an error object on stdout with ``--json``."""
    streams.prepare()
    signal.signal(signal.SIGTERM, _terminate)
    for number in (signal.SIGTERM, signal.SIGINT):  # Python drops other handlers before it has ended
        atexit.register(signal.signal, number, signal.SIG_IGN)
    try:
        code = _called()
        sys.stdout.flush()
    except streams.OutputFailed as failed:
        streams.drop_output()
        if not failed.reader_gone:
            click.echo(f"onnxsplit: {failed}", err=True)
        code = failed.code
    sys.exit(code)


def _called() -> Any:
    """Call the command that the arguments name; returns the exit code."""
    as_json = "--json" in sys.argv
    try:
        return cli(prog_name="onnxsplit", standalone_mode=False)
    except SystemExit as ending:
        return ending.code
    except click.ClickException as error:
        error.show()
        if as_json:
            message = {"type": "UsageError", "message": error.format_message()}
            click.echo(json.dumps({"error": message}))
        return error.exit_code
    except click.Abort:
        return 128 + signal.SIGINT
    except streams.OutputFailed:
        raise
    except Exception as error:  # outside of a command: while reading settings, or finding the command
        return Output(as_json=as_json).fail(error)


def _terminate(number: int, _: FrameType | None) -> Any:
    """Exit by an exception, so that context managers close what they opened."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + number)
