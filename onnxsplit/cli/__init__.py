"""The command line: one file a command, imported when it is used, so that help comes at once."""

from __future__ import annotations

import json
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Any

import click

import onnxsplit
from onnxsplit.cli import settings, streams
from onnxsplit.cli.output import Output

_COMMANDS = {
    "Prepare": {
        "export": "Turn a model of another framework into ONNX.",
        "inspect": "Show a model's ops, cost and memory, and where it can be cut.",
        "partition": "Cut a model into balanced stages.",
        "cluster": "Describe devices and links, and measure them.",
        "place": "Give a plan's stages other devices, without cutting anew.",
        "verify": "Compare the stages of a plan with the whole model.",
        "merge": "Put a plan back into one model.",
    },
    "Run": {
        "run": "Run a plan once: start its nodes, run, stop them.",
        "serve": "Serve plans over HTTP and gRPC, with metrics and a page.",
        "node": "Start one node by hand, for a pipeline that waits for it.",
        "deploy": "Write what Kubernetes needs to run a plan.",
        "status": "Show what runs on this host: nodes, rates, queues, restarts.",
        "keys": "Make and manage the keys that protect links between hosts.",
        "bench": "Measure a plan: throughput, latency, efficiency.",
    },
    "Help": {
        "doctor": "Show what this host has and what of it can be used.",
        "completion": "Complete commands and options in your shell.",
    },
}


class _Commands(click.Group):
    """Commands in groups, each imported from its own file when it is called."""

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
        found = super().resolve_command(ctx, args)
        if found[0] is not None:
            settings.apply(ctx, self, found[0])
        return found

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
@click.version_option(onnxsplit.__version__)
def cli() -> None:
    """Cut any ONNX model into stages and run them as one pipeline of processes."""


def main() -> None:
    """The entry point ``onnxsplit``. Whatever goes wrong is one message, and an error object with ``--json``."""
    streams.prepare()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _called()
        sys.stdout.flush()
    except streams.OutputFailed as failed:
        streams.drop_output()
        if not failed.nobody_reads:
            click.echo(f"onnxsplit: {failed}", err=True)
        code = failed.code
    sys.exit(code)


def _called() -> Any:
    """Call the command that the arguments name; the exit code."""
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
    except Exception as error:  # outside of a command: in reading settings, or in finding the command
        return Output(as_json=as_json).fail(error)


def _terminate(number: int, _: FrameType | None) -> Any:
    """End as on an exception, so that everything that was opened is closed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + number)
