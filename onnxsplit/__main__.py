"""Runs the command line: ``python -m onnxsplit``, and the script ``onnxsplit``."""

from __future__ import annotations

import os
import signal
import sys


def run() -> None:
    """Run the command line. Ctrl-C while it is being imported ends it as Ctrl-C in a command does, in one line."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    from onnxsplit.cli import main

    signal.signal(signal.SIGINT, before)
    main()


def _interrupted(*_: object) -> None:
    sys.stderr.write("onnxsplit: interrupted\n")
    sys.stderr.flush()
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    run()
