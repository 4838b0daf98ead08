"""``onnxsplit export``."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from onnxsplit.cli.output import Output, binary, make_command, option


def _parse_settings(context: click.Context, parameter: click.Parameter, value: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for text in value:
        name, equals, literal = text.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", context, parameter)
        try:
            settings[name] = ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            settings[name] = literal
    return settings


@make_command
@click.argument("source")
@option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="model.onnx",
    help="The file to write.",
)
@option(
    "--set",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_parse_settings,
    help="An argument of the recipe's function. Repeatable.",
)
@option("--check/--no-check", default=True, help="Compare with the framework's own outputs.")
def command(output: Output, *, source: str, out: Path, parameters: dict[str, Any], check: bool) -> None:
    """Export SOURCE, a recipe FILE.py[:FUNCTION], to ONNX. The file is run: use only recipes you trust."""
    from onnxsplit.export import export

    output.say(f"exporting {source}")
    exported = export(source, out, parameters=parameters, check=check)
    output.done()
    for name, difference in exported.differences.items():
        output.line(f"{name}: differs from the framework by {difference:.1e} of its scale")
    output.line(f"Wrote {out} ({binary(out.stat().st_size)}). Next: onnxsplit partition {out}")
    output.result({"model": out, "differences": exported.differences})
