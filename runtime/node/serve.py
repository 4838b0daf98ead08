"""Runs a node, and another one after it while it has to rejoin; the command that launchers start."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress

from onnxsplit.errors import CustomOpsError
from onnxsplit.files import check_outputs, written_file
from runtime.errors import PipelineError
from runtime.home import hold, private_folder, sweep
from runtime.node.command_line import options_of
from runtime.node.health import write_health
from runtime.node.options import NodeOptions
from runtime.node.origin import Launched, Predecessor
from runtime.node.process import NodeProcess
from runtime.node.state import NodePhase
from runtime.node.successors import Successors
from runtime.wire.keys import Keys
from runtime.wire.security import Security, check_address

_ASK_AGAIN_S = 0.5  # wait between the first two requests for a place; doubled each time
_ASK_AGAIN_MOST_S = 5.0
_SUCCESSOR_PATIENCE_S = 20.0  # time in which the coordinator of a successor, which waits for it, must answer
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
        if options.succeeds:
            return NodeProcess(options, options.home, keys, Predecessor(), _SUCCESSOR_PATIENCE_S).serve()
        return NodeProcess(options, options.home, keys, Launched()).serve()
    sweep()
    successors = Successors(options, security, keys.of("coordinator") if keys else "")
    try:
        return _serve_by_hand(options, keys, successors)
    finally:
        successors.close()
        if options.health is not None:
            with suppress(OSError):
                written_file(options.health).unlink(missing_ok=True)


def _serve_by_hand(options: NodeOptions, keys: Keys | None, successors: Successors) -> int:
    """Run one node after the other until one does not rejoin, and wait for successors; returns the exit code."""
    patience: float | None = None
    waiting_since: float | None = None
    pause = _ASK_AGAIN_S
    while True:
        home = private_folder()
        held = hold(home)
        try:
            node = NodeProcess(options, home, keys, successors, patience, asked_before=waiting_since is not None)
            code = node.serve()
        finally:
            shutil.rmtree(home, ignore_errors=True)
            os.close(held)
        was_told, rejoins, had_place = node.ended.is_set(), node.rejoins, node.had_place
        del node  # while this process waits for successors, it needs neither session nor weights
        outlived = successors.wait(lost=rejoins)
        if outlived is not None and not was_told:
            code, rejoins, had_place = outlived.code, outlived.lost, True
        if successors.asked.is_set() or not rejoins:
            return code
        if options.health is not None:
            write_health(options.health, NodePhase.WAITING.name.lower())
        if had_place:
            patience, waiting_since, pause = options.rejoin_s, None, _ASK_AGAIN_S
            _log.warning("asking %s for a place again, for %.0f s", options.connect, options.rejoin_s)
            continue
        waiting_since = waiting_since or time.monotonic()
        left = options.rejoin_s - (time.monotonic() - waiting_since)
        if left <= 0:
            _log.error("ending: there was no place for this node at %s in %.0f s", options.connect, options.rejoin_s)
            return 1
        if successors.asked.wait(min(pause, left)):
            return code
        patience, pause = max(left, _ASK_AGAIN_S), min(2 * pause, _ASK_AGAIN_MOST_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a node with the options of a command line, as launchers do; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        options = options_of(arguments)
    except CustomOpsError as error:
        _log.error("%s", error)
        return 1
    return serve(options)
