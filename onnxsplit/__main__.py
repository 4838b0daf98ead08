"""Runs the command line: ``python -m onnxsplit``."""

from onnxsplit.cli import main

main()
