"""What a node is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnxsplit.custom_ops import Library
from runtime.files.stage_cache import DEFAULT_CACHE_BYTES
from runtime.timings import Timings

DEFAULT_MEMORY_BYTES = 1 << 30
"""Of a node's outputs in shared memory at once; what does not fit is copied through sockets."""


@dataclass(frozen=True)
class NodeOptions:
    """What a node is started with.

    Attributes:
        connect: control address of the coordinator.
        bind: where to take fragments; a free port or path of the coordinator's kind when None.
        stage: the stage it wants, -1 for any.
        replica: the replica it wants to be, -1 for any.
        number: given by its launcher; 0 for none.
        plan: its own copy of the plan directory; when None, the coordinator's folder where it is seen from here, else
            the stage's files are fetched.
        fetch: fetch them also where the coordinator's folder is seen.
        cache_bytes: that fetched stage files may take on this host.
        host: by which the cluster file knows this host; its own name when None.
        health: a file that says how the node is, for probes; see :mod:`runtime.node.health`.
        provider: overrides the coordinator's choice.
        threads: overrides the plan's number; 0 does not.
        memory_bytes: of shared memory for its outputs at most; 0 for none.
        home: a folder of the launcher's, removed when the launcher dies. Set together with ``lifeline``.
        lifeline: end when standard input does.
        drain_s: wait so long to be relieved of work before ending on a signal.
        rejoin_s: without a lifeline, look so long for a coordinator that fell silent, or for a place at one that has
            none free, before ending.
        advertise: the address that others are told, where it is another than ``bind``.
        keys: folder with the keys that protect links by tcp; None leaves them plain.
        insecure: plain links may leave this host.
        custom_ops: libraries of custom ops that it may load, and loads for a stage that needs them; no others ever.
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
    custom_ops: tuple[Library, ...] = ()
