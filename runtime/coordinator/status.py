"""What a pipeline tells of itself while it runs, and the door at which other processes of the user can ask for it.

The door is a Unix socket in the pipeline's own folder, which only the user can open: whoever connects gets one
:class:`Snapshot` as JSON, and the connection is closed.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from runtime.balance.policies import UNIT_COST
from runtime.coordinator.roster import Roster
from runtime.home import _DOOR, _PATIENCE_S


class NodeStats(Struct, frozen=True):
    """What one node has done.

    Attributes:
        stage: its stage.
        replica: which replica of it.
        pid: of its process, once it has reported.
        host: it runs on.
        state: of the node now, in words.
        provider: that it was told to run on.
        requests: answered ones that it executed.
        failures: that could not be executed.
        restarts: processes that were lost there.
        retries: attempts that were made again because one of those was.
        queue: ordinary requests' worth of work on its way to it or in it; on other hosts, as far as the caller sent it.
        wait_ns: mean time a request waited there for its turn, once the node had read it; it reads between runs.
        run_ns: mean time in the session.
        waited_ns: sum of the times it waited there.
        ran_ns: sum of the times in the session.
        run_buckets: how many of those ended in each of :data:`~runtime.coordinator.counters.BUCKETS_NS`, and above all.
        p50_ns: of the last thousand requests, the median time from their arrival to their departure.
        p99_ns: and the 99th percentile.
        output_bytes: of all tensors it gave for them.
        shared_bytes: of those that crossed in shared memory.
    """

    stage: int
    replica: int
    pid: int | None
    host: str | None
    state: str
    provider: str
    requests: int
    failures: int
    restarts: int
    retries: int
    queue: float
    wait_ns: int
    run_ns: int
    waited_ns: int
    ran_ns: int
    run_buckets: tuple[int, ...]
    p50_ns: int
    p99_ns: int
    output_bytes: int
    shared_bytes: int


class Snapshot(Struct, frozen=True):
    """A pipeline at a moment.

    Attributes:
        plan: its folder.
        pid: of the process that runs it.
        state: of the pipeline.
        taken_ns: when, by the host's monotonic clock.
        requests: submitted so far.
        in_flight: not answered yet.
        waiting: of those, the ones that wait for a node.
        retries: attempts that were made again so far.
        losses: nodes that were lost so far.
        cause: the story of a link that is dead now, else of the first node or link that was lost of late; empty when
            all went well.
        nodes: each.
    """

    plan: str
    pid: int
    state: str
    taken_ns: int
    requests: int
    in_flight: int
    waiting: int
    retries: int
    losses: int
    cause: str
    nodes: tuple[NodeStats, ...]


def node_stats(roster: Roster, queues: Mapping[int, int], providers: Sequence[str]) -> tuple[NodeStats, ...]:
    """Of every slot.

    Args:
        roster: the nodes.
        queues: the cost of what is on its way to each node or in it, by number.
        providers: of every stage.
    """
    found = []
    for (stage, replica), record in roster.nodes.items():
        counters = record.counters
        latencies = sorted(counters.latencies_ns)
        found.append(
            NodeStats(
                stage=stage,
                replica=replica,
                pid=record.hello.pid if record.hello is not None else None,
                host=record.hello.host if record.hello is not None else None,
                state=record.phase.value,
                provider=providers[stage],
                requests=counters.requests,
                failures=counters.failures,
                restarts=counters.restarts,
                retries=counters.retries,
                queue=queues.get(record.number, 0) / UNIT_COST,
                wait_ns=counters.wait_ns // max(1, counters.requests),
                run_ns=counters.run_ns // max(1, counters.requests),
                waited_ns=counters.wait_ns,
                ran_ns=counters.run_ns,
                run_buckets=tuple(counters.buckets),
                p50_ns=latencies[len(latencies) // 2] if latencies else 0,
                p99_ns=latencies[len(latencies) * 99 // 100] if latencies else 0,
                output_bytes=counters.output_bytes,
                shared_bytes=counters.shared_bytes,
            )
        )
    return tuple(found)


class StatusServer:
    """Where to ask; a context manager.

    Args:
        home: the pipeline's folder.
    """

    def __init__(self, home: Path) -> None:
        self._path = home / _DOOR
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.bind(str(self._path))
        self._socket.listen(8)

    def __enter__(self) -> StatusServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def fileno(self) -> int:
        """Readable when somebody asks."""
        return self._socket.fileno()

    def answer(self, snapshot: Snapshot) -> None:
        """Tell one who asks; one who does not listen is left."""
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(0.1)
            try:
                connection.sendall(msgspec.json.encode(snapshot))
            except OSError:
                return


def ask(door: Path) -> Snapshot | None:
    """What a pipeline tells; None when it is gone or does not answer."""
    found = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PATIENCE_S)
        try:
            connection.connect(str(door))
            while piece := connection.recv(1 << 16):
                found += piece
            return msgspec.json.decode(found, type=Snapshot)
        except (OSError, msgspec.DecodeError):
            return None
