"""The command ``onnxsplit export``."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from onnxsplit.cli.help import option, path_option
from onnxsplit.cli.model_options import custom_ops_option, custom_ops_words
from onnxsplit.cli.output import Output, binary, make_command
from onnxsplit.cli.series import first_of_many


def _parse_settings(context: click.Context, parameter: click.Parameter, value: Sequence[str]) -> dict[str, Any]:
    """Arguments by name; a value that is not a Python literal is text."""
    settings = {}
    for text in value:
        name, equals, literal = text.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", context, parameter)
        try:
            settings[name] = ast.literal_eval(literal)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # the latter two when it is nested too deeply
            settings[name] = literal
    return settings


@make_command
@click.argument("source")
@path_option("-o", "--out", required=True, metavar="model.onnx", help="Model file to write.")
@option(
    "--opset",
    type=click.IntRange(7, 100),
    metavar="N",
    help="Version of the standard operators. Without it: the converter's choice.",
)
@option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=DTYPE[DIMS]",
    help="Input of the model, as x=float32[batch,3,224,224], if the source does not declare it. Repeatable.",
)
@option(
    "--set",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_parse_settings,
    help="Argument of the recipe's function. Repeatable.",
)
@option("--check/--no-check", default=True, help="Compare the outputs with the framework's own.")
@option(
    "--trust",
    is_flag=True,
    help="Load a source that runs code when it is loaded. Use it only for sources that you trust.",
)
@option("--simplify", is_flag=True, help="Simplify the exported model with onnxsim.")
@option("--cache/--no-cache", default=True, help="Give decoders their key/value cache as inputs and outputs.")
@option(
    "--static-cache",
    is_flag=True,
    help="Give decoders a cache of a fixed size that they write into, instead of one that grows (opset 24).",
)
@custom_ops_option
@option(
    "--weights",
    type=click.Choice(["auto", "4", "8", "float"]),
    default="auto",
    help="Weights of a GGUF file: those nearest to the file's, blocks of 4 or 8 bits, or float32.",
)
@option("--offline", is_flag=True, help="Use only files that were fetched before; do not contact the hub.")
def command(
    output: Output,
    *,
    source: str,
    out: Path,
    inputs: tuple[str, ...],
    **options: Any,
) -> None:
    """Export SOURCE to ONNX, and compare the outputs of both.

    SOURCE is a recipe (FILE.py[:NAME] or package.module:NAME; its code is run), a saved model of PyTorch, TensorFlow,
    Keras, scikit-learn, LightGBM, XGBoost or CatBoost, a folder or config.json of transformers, hf://ORG/REPO, a GGUF
    file or an ONNX file.
    """
    from onnxsplit.export import export
    from onnxsplit.export.specs import parse_spec

    output.say(f"exporting {source}")
    done = export(source, out, inputs=tuple(parse_spec(text) for text in inputs), say=output.say, **options)
    output.done()
    for exported in done:
        _show_differences(output, exported.differences)
        for name in exported.unread:
            output.note(f"warning: no op in {exported.path} reads the input {name!r}, so no output depends on it")
        for note in exported.notes:
            output.note(f"note: {note}")
        output.line(f"Wrote {exported.path} ({binary(exported.size_bytes)}), from {exported.framework}.")
        if exported.files:
            output.line(f"Wrote beside it: {', '.join(path.name for path in exported.files)}")
    output.line(f"Next: onnxsplit partition {done[0].path}{custom_ops_words(options['custom_ops'])}")
    models = [
        {
            "model": one.path,
            "framework": one.framework,
            "differences": one.differences,
            "unread": one.unread,
            "files": one.files,
            "notes": one.notes,
        }
        for one in done
    ]
    output.result(
        {key: models[0][key] for key in ("model", "differences", "unread", "files", "notes")} | {"models": models}
    )


def _show_differences(output: Output, differences: Mapping[str, float]) -> None:
    """Print how far outputs differ; of many, such as a decoder's caches, the first ones and the largest difference."""
    shown, rest = first_of_many(list(differences.items()))
    for name, difference in shown:
        output.line(f"{name}: differs from the framework's output by {difference:.1e} of its scale")
    if rest:
        output.line(f"{len(rest)} more outputs: differ by {max(one for _, one in rest):.1e} of their scale at most")
