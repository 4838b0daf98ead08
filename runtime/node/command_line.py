"""The command line of ``python -m runtime.node``: how launchers, and nodes that start a successor, pass options on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onnxsplit.custom_ops import EXTENSIONS, find_libraries
from runtime.node.options import NodeOptions


def options_of(words: Sequence[str] | None) -> NodeOptions:
    """The options that a command line states; those of this process when None.

    Raises:
        CustomOpsError: a library of custom ops cannot be read.
    """
    parser = argparse.ArgumentParser(prog="python -m runtime.node")
    parser.add_argument("--connect", required=True)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--replica", type=int, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--memory", dest="memory_bytes", type=int, required=True)
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--bind")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--fetch", action="store_true")
    parser.add_argument("--cache", dest="cache_bytes", type=int, default=NodeOptions.cache_bytes)
    parser.add_argument("--host")
    parser.add_argument("--provider")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--drain", dest="drain_s", type=float, default=NodeOptions.drain_s)
    parser.add_argument("--keys", type=Path)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--succeeds", action="store_true")
    parser.add_argument("--background", action="store_true")
    parser.add_argument("--custom-ops", action="append", default=[])
    given = parser.parse_args(words)
    given.custom_ops = find_libraries(given.custom_ops)
    return NodeOptions(**vars(given), lifeline=True)


def words_of(options: NodeOptions) -> list[str]:
    """The command line that :func:`options_of` reads as these options, which are those of a node with a lifeline.

    A successor has neither a health file nor an address to announce, and it does not ask for a place again.
    """
    words = []
    for name, value in (
        ("connect", options.connect),
        ("stage", options.stage),
        ("replica", options.replica),
        ("home", options.home),
        ("memory", options.memory_bytes),
        ("number", options.number),
        ("bind", options.bind),
        ("plan", options.plan),
        ("cache", options.cache_bytes),
        ("host", options.host),
        ("provider", options.provider),
        ("threads", options.threads),
        ("drain", options.drain_s),
        ("keys", options.keys),
    ):
        if value is not None:
            words.append(f"--{name}={value}")  # a value may begin with a hyphen
    for library in options.custom_ops:
        words.append(f"--custom-ops={library.name if library.name == EXTENSIONS else library.path}")
    flags = ("fetch", "insecure", "succeeds", "background")
    return words + [f"--{flag}" for flag in flags if getattr(options, flag)]


def successor_of(
    options: NodeOptions, *, connect: str, stage: int, replica: int, home: Path, count: int, background: bool
) -> NodeOptions:
    """The options of a node's successor.

    Args:
        options: those of the node that the user has started.
        connect: control address of the successor's coordinator.
        stage: the stage that it asks for.
        replica: the replica that it asks to be.
        home: a folder of its own.
        count: the number of successors that were started so far, this one included.
        background: whether it is started at idle priority.
    """
    bind = options.bind
    if bind is not None and bind.startswith("ipc://"):
        bind = f"{bind}.{count}"
    return replace(
        options,
        connect=connect,
        bind=bind,
        stage=stage,
        replica=replica,
        number=0,
        home=home,
        health=None,
        rejoin_s=NodeOptions.rejoin_s,
        lifeline=True,
        succeeds=True,
        background=background,
    )


def why_no_successor(options: NodeOptions) -> str:
    """Why a second node with these options cannot listen beside the first one; empty if it can."""
    if options.advertise is not None:
        return (
            f"others reach it at the fixed address {options.advertise} (--advertise), and not a second node beside "
            "it; start it without --advertise to let its plan change while it serves"
        )
    if options.bind is not None and options.bind.startswith("tcp://") and not options.bind.endswith(":*"):
        host = options.bind.rpartition(":")[0]
        return (
            f"it listens at a fixed port, {options.bind} (--bind), where a second node cannot listen; start it with "
            f"--bind {host}:* to let its plan change while it serves"
        )
    return ""
