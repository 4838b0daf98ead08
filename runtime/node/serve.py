"""Runs a node, and another one after it while it has to rejoin; the command that launchers start."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from onnxsplit.custom_ops import find_libraries
from onnxsplit.errors import CustomOpsError
from onnxsplit.files import check_outputs, written_file
from runtime.errors import PipelineError
from runtime.home import hold, private_folder, sweep
from runtime.node.health import write_health
from runtime.node.options import NodeOptions
from runtime.node.process import NodeProcess
from runtime.node.state import NodePhase
from runtime.wire.keys import Keys
from runtime.wire.security import Security, check_address

_ASK_AGAIN_S = 0.5  # wait between the first two requests for a place; doubled each time
_ASK_AGAIN_MOST_S = 5.0
_log = logging.getLogger("runtime.node")


def serve(options: NodeOptions) -> int:
    """Run a node until it is told to stop; returns the process's exit code.

    When the coordinator falls silent or says that the node was replaced, a node that was started by hand drops its work
    and begins again. It then asks for a place for up to ``rejoin_s`` seconds.

    Raises:
        PipelineError: an address cannot be used.
        InputError: the keys cannot be used.
    """
    by_tcp = options.connect.startswith("tcp://")
    keys = Keys(options.keys) if options.keys is not None and by_tcp else None
    security = Security(pair=keys.pair if keys else None, insecure=options.insecure)
    check_address(options.connect, security)
    if options.advertise is not None:
        check_address(options.advertise, security)
        if options.advertise.endswith(":*"):
            raise PipelineError(f"--advertise {options.advertise}: peers need the port itself, as in tcp://HOST:PORT")
    check_outputs(options.health)
    if options.home is not None:
        return NodeProcess(options, options.home, keys).serve()
    sweep()
    try:
        return _serve_by_hand(options, keys)
    finally:
        if options.health is not None:
            with suppress(OSError):
                written_file(options.health).unlink(missing_ok=True)


def _serve_by_hand(options: NodeOptions, keys: Keys | None) -> int:
    """Run one node after the other until one does not rejoin; returns the exit code."""
    patience: float | None = None
    waiting_since: float | None = None
    pause = _ASK_AGAIN_S
    while True:
        home = private_folder()
        held = hold(home)
        try:
            node = NodeProcess(options, home, keys, patience, asked_before=waiting_since is not None)
            code = node.serve()
        finally:
            shutil.rmtree(home, ignore_errors=True)
            os.close(held)
        if node.ended.is_set() or not node.rejoins:
            return code
        if options.health is not None:
            write_health(options.health, NodePhase.WAITING.name.lower())
        if node.had_place:
            patience, waiting_since, pause = options.rejoin_s, None, _ASK_AGAIN_S
            _log.warning("asking %s for a place again, for %.0f s", options.connect, options.rejoin_s)
            continue
        waiting_since = waiting_since or time.monotonic()
        left = options.rejoin_s - (time.monotonic() - waiting_since)
        if left <= 0:
            _log.error("ending: there was no place for this node at %s in %.0f s", options.connect, options.rejoin_s)
            return 1
        if node.ended.wait(min(pause, left)):
            return code
        patience, pause = max(left, _ASK_AGAIN_S), min(2 * pause, _ASK_AGAIN_MOST_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a node with the options of a command line, as launchers do; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m runtime.node")
    parser.add_argument("--connect", required=True)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--replica", type=int, required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--memory", type=int, required=True)
    parser.add_argument("--keys", type=Path)
    parser.add_argument("--host")
    parser.add_argument("--custom-ops", action="append", default=[])
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        libraries = find_libraries(given.custom_ops)
    except CustomOpsError as error:
        _log.error("%s", error)
        return 1
    return serve(
        NodeOptions(
            connect=given.connect,
            stage=given.stage,
            replica=given.replica,
            number=given.number,
            memory_bytes=given.memory,
            home=given.home,
            keys=given.keys,
            host=given.host,
            custom_ops=libraries,
            lifeline=True,
        )
    )
