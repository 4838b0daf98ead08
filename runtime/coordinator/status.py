"""What a pipeline tells of itself while it runs, and the socket at which other processes of the user can ask for it.

The socket is a Unix socket in the pipeline's own folder, which only the user can open. Whoever connects gets one
:class:`Snapshot` as JSON, and the connection is closed.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from runtime.balance.policies import UNIT_COST
from runtime.coordinator.roster import Roster
from runtime.home import STATUS_SOCKET

_ANSWER_S = 2.0  # a pipeline that does not answer in this time is taken for gone


@dataclass(frozen=True)
class NodeInfo:
    """One node.

    Attributes:
        stage: its stage.
        replica: which replica of the stage.
        pid: of its process; None when it is not known.
        host: it runs on; None before it has reported.
        address: where it takes fragments; None before it has reported.
        state: in words.
    """

    stage: int
    replica: int
    pid: int | None
    host: str | None
    address: str | None
    state: str


class NodeStats(Struct, frozen=True):
    """What one node, with all processes that were lost in its place, has done.

    Attributes:
        stage: its stage.
        replica: which replica of the stage.
        pid: of its process, once it has reported.
        host: it runs on, once it has reported.
        state: of the node now, in words.
        provider: the provider that it was told to run on.
        requests: answered requests that it executed.
        failures: requests that could not be executed.
        restarts: processes that were lost.
        retries: attempts that were made again because one of those was lost.
        queue: work on its way to the node or in it, in ordinary requests. For nodes on other hosts, what the caller
            itself sent.
        wait_ns: mean time that a request waited for its turn after the node had read it. Nodes read between runs.
        run_ns: mean time in the session.
        waited_ns: sum of the times that requests waited for their turn.
        ran_ns: sum of the times in the session.
        run_buckets: how many of those ended in each of :data:`~runtime.coordinator.counters.BUCKETS_NS`, and above all.
        p50_ns: median time from arrival to departure, of the last thousand requests.
        p99_ns: 99th percentile of that time.
        output_bytes: bytes of all outputs.
        shared_bytes: bytes of those outputs that crossed in shared memory.
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
        requests: requests that were submitted so far.
        in_flight: requests that are not answered yet.
        waiting: requests among those that wait for a node.
        retries: attempts that were made again so far.
        losses: nodes that were lost so far.
        cause: what happened to a link that is dead now, else to the first of the nodes and links that were lost
            recently; empty when all went well.
        nodes: what each node has done.
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
    """What the nodes of every slot have done.

    Args:
        roster: the nodes.
        queues: the cost of what is on its way to each node or in it, by number.
        providers: the provider of every stage.
    """
    stats = []
    for (stage, replica), node in roster.nodes.items():
        counters = node.counters
        latencies = sorted(counters.latencies_ns)
        stats.append(
            NodeStats(
                stage=stage,
                replica=replica,
                pid=node.hello.pid if node.hello is not None else None,
                host=node.hello.host if node.hello is not None else None,
                state=node.phase.value,
                provider=providers[stage],
                requests=counters.requests,
                failures=counters.failures,
                restarts=counters.restarts,
                retries=counters.retries,
                queue=queues.get(node.number, 0) / UNIT_COST,
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
    return tuple(stats)


def node_infos(roster: Roster, pids: Mapping[int, int]) -> tuple[NodeInfo, ...]:
    """The nodes of every slot.

    Args:
        roster: the nodes.
        pids: the process IDs of the nodes that were started here, by number.
    """
    return tuple(
        NodeInfo(
            stage=slot[0],
            replica=slot[1],
            pid=node.hello.pid if node.hello is not None else pids.get(node.number),
            host=node.hello.host if node.hello is not None else None,
            address=node.hello.address if node.hello is not None else None,
            state=node.phase.value,
        )
        for slot, node in roster.nodes.items()
    )


class StatusServer:
    """Answers processes that ask how a pipeline is; a context manager.

    Args:
        home: the pipeline's folder.
    """

    def __init__(self, home: Path) -> None:
        self._path = home / STATUS_SOCKET
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.bind(str(self._path))
        self._socket.listen(8)

    def __enter__(self) -> StatusServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Answer nobody any more; closing twice is as good as once."""
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def fileno(self) -> int:
        """The descriptor that is readable when a process asks."""
        return self._socket.fileno()

    def answer(self, snapshot: Snapshot) -> None:
        """Answer one process that asks. One that does not read is left alone."""
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


def ask(status_socket: Path) -> Snapshot | None:
    """What a pipeline tells of itself; None when it is gone or does not answer."""
    answer = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_ANSWER_S)
        try:
            connection.connect(str(status_socket))
            while piece := connection.recv(1 << 16):
                answer += piece
            return msgspec.json.decode(answer, type=Snapshot)
        except (OSError, msgspec.DecodeError):
            return None
