"""The status of a running pipeline, and the socket at which the user's other processes can ask for it.

The socket is a Unix socket in the pipeline's own folder, which only the user can open. The server sends one
:class:`Snapshot` as JSON to each connection, and closes it.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from runtime.balance.policies import UNIT_COST
from runtime.balance.replicas import ReplicaRange
from runtime.coordinator.roster import Roster
from runtime.coordinator.sequences import SequenceTable
from runtime.coordinator.state import CoordinatorState
from runtime.home import STATUS_SOCKET

_ANSWER_S = 2.0  # a pipeline that does not answer in this time counts as ended


@dataclass(frozen=True)
class NodeInfo:
    """A node of a running pipeline.

    Attributes:
        stage: its stage.
        replica: which replica of the stage.
        pid: its process ID; None when it is not known.
        host: the host that it runs on; None before it has reported.
        address: the address where it receives fragments; None before it has reported.
        state: its state, in words.
    """

    stage: int
    replica: int
    pid: int | None
    host: str | None
    address: str | None
    state: str


class NodeStats(Struct, frozen=True):
    """Statistics of one node, including the lost processes of its slot.

    Attributes:
        stage: its stage.
        replica: which replica of the stage.
        pid: its process ID, once it has reported.
        host: the host that it runs on, once it has reported.
        state: the present state of the node, in words.
        provider: the provider that it was told to run on.
        left_to_cpu: ops of the stage that this provider left to the CPU: their number by op type.
        requests: answered requests that it executed.
        failures: requests that could not be executed.
        restarts: processes that were lost.
        retries: attempts that were repeated because one of those was lost.
        queue: outstanding work of the node, in ordinary requests. For a node on another host, only the caller's own
            work.
        wait_ns: mean time that a request waited for its turn after the node had read it. Nodes read between runs.
        run_ns: mean time in the session.
        waited_ns: sum of the times that requests waited for their turn.
        ran_ns: sum of the times in the session.
        run_buckets: number of session times in each bucket of :data:`~runtime.coordinator.counters.BUCKETS_NS`, and
            above.
        p50_ns: median time from arrival to departure, of the last thousand requests.
        p99_ns: 99th percentile of that time.
        output_bytes: bytes of all outputs.
        shared_bytes: bytes of those outputs that were passed in shared memory.
        sequences: sequences whose states the node holds.
        state_bytes: bytes of those states.
        times: number of times from arrival to departure, by :func:`~runtime.time_buckets.bucket_of`. Not part of a
            :class:`Snapshot`.
        by_cost: number of requests and the sum of their times in the session, by the cost of the request
            (:class:`~runtime.coordinator.counters.NodeCounters`). Not part of a :class:`Snapshot`.
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
    sequences: int = 0
    state_bytes: int = 0
    left_to_cpu: dict[str, int] = {}
    times: dict[int, int] = {}
    by_cost: dict[int, tuple[int, int]] = {}


class SequenceStats(Struct, frozen=True):
    """Statistics of the sequences that a pipeline continues.

    Attributes:
        running: sequences that nodes have states of now.
        waiting: sequences that wait for room.
        tokens: tokens that callers have got so far.
        replays: how often a sequence was read again because its nodes were lost or left.
        steps: steps that have come back so far.
        rows: sequences in these steps, all together.
        cache_usage: share of the bytes for states that sequences have reserved, on the node with the largest share.
        reused_tokens: tokens of prompts that were not computed, because another sequence had begun alike.
        kept: sequences that have ended, and whose states nodes keep because others may begin alike.
        kept_tokens: positions of these.
    """

    running: int
    waiting: int
    tokens: int
    replays: int
    steps: int = 0
    rows: int = 0
    cache_usage: float = 0.0
    reused_tokens: int = 0
    kept: int = 0
    kept_tokens: int = 0


class StageReplicas(Struct, frozen=True):
    """The number of nodes of a stage.

    Attributes:
        stage: the stage.
        nodes: its nodes now, those that start included.
        least: the smallest number that the load may leave it. Equal to ``nodes`` where the number is fixed.
        most: the largest number that the load may give it. Equal to ``nodes`` where the number is fixed.
    """

    stage: int
    nodes: int
    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.nodes} ({self.least}–{self.most})" if self.least < self.most else f"{self.nodes}"  # noqa: RUF001


class Snapshot(Struct, frozen=True):
    """The status of a pipeline at one time.

    Attributes:
        plan: the plan directory.
        pid: the ID of the process that runs it.
        state: the pipeline's state.
        taken_ns: when it was taken, by the host's monotonic clock.
        requests: number of requests submitted so far.
        in_flight: number of unanswered requests.
        waiting: number of unanswered requests that wait for a node.
        retries: number of repeated attempts so far.
        losses: number of nodes lost so far.
        cause: a description of a link that is dead now, or else of the first recent loss of a node or link; empty when
            there was none.
        nodes: the statistics of each node.
        stages: the number of nodes of each stage.
        sequences: the statistics of sequences; None where the plan has no decoder.
        role: which plan of the process this is, and whether it takes new requests; empty where it is the only one.
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
    stages: tuple[StageReplicas, ...] = ()
    sequences: SequenceStats | None = None
    role: str = ""


def node_stats(roster: Roster, queues: Mapping[int, int], providers: Sequence[str]) -> tuple[NodeStats, ...]:
    """The statistics of every slot.

    Args:
        roster: the nodes.
        queues: the cost of the outstanding work of each node, by number.
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
                sequences=node.sequences,
                state_bytes=node.state_bytes,
                left_to_cpu=dict(node.left_to_cpu),
                times=dict(counters.times),
                by_cost={cost: (requests, ran_ns) for cost, (requests, ran_ns) in counters.by_cost.items()},
            )
        )
    return tuple(stats)


def stage_replicas(roster: Roster, ranges: Sequence[ReplicaRange]) -> tuple[StageReplicas, ...]:
    """The number of nodes of every stage.

    Args:
        roster: the nodes.
        ranges: the allowed numbers of nodes of every stage.
    """
    counts = Counter(stage for stage, _ in roster.nodes)
    return tuple(
        StageReplicas(stage, counts[stage], counts[stage], counts[stage])
        if each.is_fixed
        else StageReplicas(stage, counts[stage], each.least, each.most)
        for stage, each in enumerate(ranges)
    )


def sequence_stats(table: SequenceTable | None) -> SequenceStats | None:
    """The statistics of sequences; None where there is no table of them."""
    if table is None:
        return None
    waiting = table.waiting
    return SequenceStats(
        running=len(table) - waiting,
        waiting=waiting,
        tokens=table.tokens,
        replays=table.replays,
        steps=table.scheduler.steps.returned_steps,
        rows=table.scheduler.steps.returned_rows,
        cache_usage=table.scheduler.chains.usage,
        reused_tokens=table.reused_tokens,
        kept=len(table.kept),
        kept_tokens=table.scheduler.chains.kept_tokens,
    )


def snapshot(
    folder: Path,
    machine: CoordinatorState,
    requests: int,
    stats: Sequence[NodeStats],
    ranges: Sequence[ReplicaRange],
    now_ns: int,
    role: str = "",
) -> Snapshot:
    """The status of the pipeline of this process.

    Args:
        folder: the plan directory.
        machine: the coordinator's state machine.
        requests: number of requests submitted so far.
        stats: the statistics of every slot.
        ranges: the allowed numbers of nodes of every stage.
        now_ns: the time, by the host's monotonic clock.
        role: what this pipeline does beside another one.
    """
    roster = machine.roster
    causes = [*machine.links.stories.values(), *(incident.story for incident in roster.incidents)]
    return Snapshot(
        plan=str(folder.resolve()),
        pid=os.getpid(),
        state=machine.state.name.lower(),
        taken_ns=now_ns,
        requests=requests,
        in_flight=len(machine.requests),
        waiting=machine.requests.waiting,
        retries=machine.requests.retries,
        losses=roster.losses,
        cause=causes[0] if causes else "",
        nodes=tuple(msgspec.structs.replace(node, times={}, by_cost={}) for node in stats),
        stages=stage_replicas(roster, ranges),
        sequences=sequence_stats(machine.sequences),
        role=role,
    )


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
    """Answers processes that ask for a pipeline's status; a context manager.

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
        """Stop answering; closing twice has the same effect as once."""
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def fileno(self) -> int:
        """The descriptor that is readable when a process asks."""
        return self._socket.fileno()

    def answer(self, snapshot: Snapshot) -> None:
        """Answer one process that asks. A process that does not read is not waited for."""
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
    """The status of a pipeline; None when the pipeline has ended or does not answer."""
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
