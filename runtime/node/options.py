"""The options of a node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnxsplit.custom_ops import Library
from runtime.files.stage_cache import DEFAULT_CACHE_BYTES
from runtime.timings import Timings

DEFAULT_MEMORY_BYTES = 1 << 30
"""The usual limit of a node's outputs in shared memory at once; outputs that do not fit are sent as frames."""


@dataclass(frozen=True)
class NodeOptions:
    """The options of a node.

    Attributes:
        connect: control address of the coordinator.
        bind: address for fragments; when None, any free port or path, of the same kind as ``connect``.
        stage: the stage it wants; -1 for any.
        replica: the replica it wants to be; -1 for any.
        number: the number its launcher gave it; 0 for none.
        plan: its own copy of the plan directory. When None, it reads the coordinator's folder if it can see it, and
            else fetches the stage's files. So does a successor whose copy is of another plan.
        fetch: whether to fetch the files even if it sees the coordinator's folder.
        cache_bytes: the largest size of fetched stage files on this host.
        host: the name of this host in the cluster file; its own name when None.
        health: file with the node's phase, for probes; see :mod:`runtime.node.health`.
        provider: execution provider; the coordinator's choice when None.
        threads: threads of the session; the plan's number when 0.
        memory_bytes: the largest size of its outputs in shared memory at once; 0 for no shared memory.
        home: a folder of the launcher's, which is removed when the launcher dies; set together with ``lifeline``.
        lifeline: whether to end when standard input ends.
        drain_s: seconds to finish the work in after a signal.
        rejoin_s: without a lifeline, seconds to look for a coordinator that fell silent, or to ask for a place at one
            that has none free, before ending.
        advertise: the address that peers are told; None for the one that was bound.
        keys: folder with the keys that protect links over tcp; None leaves them plain.
        insecure: whether plain links may leave this host.
        succeeds: whether it is the successor of a node that was started by hand; set together with ``lifeline``. See
            :mod:`runtime.node.origin`.
        background: whether it was started at idle priority, and is to return to normal priority when it is ready.
        custom_ops: the only libraries of custom ops that it may load, for stages that need them.
    """

    connect: str
    bind: str | None = None
    stage: int = -1
    replica: int = -1
    number: int = 0
    plan: Path | None = None
    fetch: bool = False
    cache_bytes: int = DEFAULT_CACHE_BYTES
    host: str | None = None
    health: Path | None = None
    provider: str | None = None
    threads: int = 0
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    home: Path | None = None
    lifeline: bool = False
    drain_s: float = Timings().drain_s
    rejoin_s: float = 60.0
    advertise: str | None = None
    keys: Path | None = None
    insecure: bool = False
    succeeds: bool = False
    background: bool = False
    custom_ops: tuple[Library, ...] = ()
