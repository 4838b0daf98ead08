"""Chooses the process that a fragment is sent to: applies the balancing policy to the load of the replicas."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnxsplit.cluster import Link
from onnxsplit.plan import CALLER
from runtime.balance.board import LoadBoard
from runtime.balance.policies import FULL_SCAN_LIMIT, Balancer, Replica
from runtime.wire.messages.control import Peer, Policy
from runtime.wire.messages.data import Receipt

_BETWEEN_HOSTS = Link()
_REPORT_HALF_LIFE = 16.0  # in service times: a reported load decays towards the average load
_AVERAGE_WEIGHT = 0.05  # weight of a new report in the average load (EWMA)
_LOST_NS = 10_000_000_000  # work sent this long ago that has not arrived counts as lost
_NOTE_INTERVAL_NS = 1_000_000_000  # interval of the notes of work sent
_SILENT_NS = 15_000_000_000  # a peer without receipts for this long, and for several runs, counts as silent


@dataclass(slots=True)
class _LastReceipt:
    """The last :class:`~runtime.wire.messages.data.Receipt` of a peer on another host.

    Attributes:
        lost: cost of the work for it that counts as lost on the way; computed again from each receipt, so a wrong
            value lasts until the next one.
        notes: pairs of a time and the cost of all work that had been sent to the peer by then, the oldest first.
    """

    done: int = 0
    others: int = 0
    service_ns: int = 0
    peak_ns: int = 0
    measured_ns: int = 0
    lost: int = 0
    notes: deque[tuple[int, int]] = field(default_factory=deque)

    def hear(self, receipt: Receipt, sent: int, now_ns: int) -> None:
        """Record a receipt; ``sent`` is the cost of all work sent to the peer so far."""
        self.lost = max(0, self._due(sent, now_ns) - receipt.arrived)
        self.done, self.others = receipt.done, receipt.others
        self.service_ns, self.peak_ns, self.measured_ns = receipt.service_ns, receipt.peak_ns, now_ns

    def outstanding(self, sent: int, now_ns: int) -> int:
        """Cost of the work at the peer or on its way; for a silent peer, only of the work sent in the last seconds."""
        over = self.done + self.lost
        if now_ns - self.measured_ns > max(_SILENT_NS, 4 * self.peak_ns):
            over = max(over, self._due(sent, now_ns))
        return max(0, sent - over)

    def _due(self, sent: int, now_ns: int) -> int:
        """Cost of all work that was sent long enough ago to have arrived; also notes what has been sent by now."""
        notes = self.notes
        if not notes or now_ns - notes[-1][0] >= _NOTE_INTERVAL_NS:
            notes.append((now_ns, sent))
        while len(notes) > 1 and now_ns - notes[1][0] >= _LOST_NS:
            notes.popleft()
        return notes[0][1] if now_ns - notes[0][0] >= _LOST_NS else 0


_NO_RECEIPT = _LastReceipt()


class Router:
    """Knows the replicas of every stage and their load, and chooses among them.

    The load of a peer whose memory is mapped is read from the load boards: its own and those of all mapped senders. The
    load of a peer on another host is what this process has sent there, corrected by the peer's receipts.

    Args:
        policy: how to choose among the replicas of a stage.
        board: this process's own load board.

    Attributes:
        unreachable: processes that cannot be reached now; they are chosen only where a stage has no others.
    """

    def __init__(self, policy: Policy, board: LoadBoard) -> None:
        self.unreachable: frozenset[int] = frozenset()
        self._policy = policy
        self._board = board
        self._me = -1
        # The replicas of each stage that take requests. If all are leaving, all: they finish what had begun before.
        self._nodes: dict[int, tuple[int, ...]] = {}
        self._numbers: dict[int, tuple[int, ...]] = {}  # all replicas of each stage
        self._boards: dict[int, LoadBoard] = {}  # this process's, and those of peers whose memory is mapped
        self._receipts: dict[int, _LastReceipt] = {}  # from the other peers
        self._senders: dict[tuple[int, ...], Mapping[int, LoadBoard]] = {}  # the boards of senders, by their stages
        self._balancers: dict[int, Balancer] = {}
        self._known: frozenset[int] = frozenset()
        self._average_service_ns = 0.0  # average over nodes on other hosts
        self._average_others = 0.0  # cost of the work of others that they report

    def learn(self, me: int, peers: Sequence[Peer], boards: Mapping[int, LoadBoard]) -> None:
        """Record the present processes of the pipeline.

        Args:
            me: this process's number.
            peers: all processes.
            boards: the load boards of those whose memory is mapped, by their numbers.
        """
        self._me = me
        stages: dict[int, list[Peer]] = {}
        for peer in peers:
            stages.setdefault(peer.stage, []).append(peer)
        self._numbers = {stage: tuple(p.number for p in members) for stage, members in stages.items()}
        nodes = {stage: tuple(p.number for p in members if p.takes) for stage, members in stages.items()}
        nodes = {stage: takers or self._numbers[stage] for stage, takers in nodes.items()}
        for stage in stages.keys() - {CALLER}:
            if nodes[stage] != self._nodes.get(stage):  # the positions of replicas have changed
                self._balancers[stage] = Balancer(self._policy, seed=me * 1_000_003 + stage)
        self._nodes = nodes
        known = frozenset(peer.number for peer in peers)
        for number in known - self._known:
            self._board.clear(number)
        self._known = known
        self._boards = {**boards, me: self._board}
        self._receipts = {n: last for n, last in self._receipts.items() if n in known and n not in self._boards}
        self._senders.clear()

    def mapped(self, number: int) -> bool:
        """Whether a peer can read this process's load board; True for a process that is not known."""
        return number in self._boards or number not in self._known

    def told(self, receipt: Receipt, now_ns: int) -> None:
        """Record a receipt of a peer on another host."""
        if not self.mapped(receipt.sender):
            self._average_others += _AVERAGE_WEIGHT * (receipt.others - self._average_others)
            self._average_service_ns += (
                _AVERAGE_WEIGHT * (receipt.service_ns - self._average_service_ns)
                if self._average_service_ns
                else receipt.service_ns
            )
            last = self._receipts.setdefault(receipt.sender, _LastReceipt())
            last.hear(receipt, self._board.sent(receipt.sender), now_ns)

    @property
    def known(self) -> frozenset[int]:
        """The numbers of all processes."""
        return self._known

    def nodes(self, stage: int) -> tuple[int, ...]:
        """The numbers of a stage's replicas that take requests."""
        return self._nodes.get(stage, ())

    def choose(
        self,
        stage: int,
        sources: Sequence[int],
        cost: int,
        size_bytes: int,
        now_ns: int,
        *,
        avoid: frozenset[int] = frozenset(),
    ) -> int | None:
        """Choose the replica for a request.

        Args:
            stage: the stage.
            sources: the stages that send to it; :data:`~onnxsplit.plan.CALLER` for the caller.
            cost: cost of the request.
            size_bytes: size of the tensors to be sent.
            now_ns: the host's monotonic clock.
            avoid: processes to choose only where a stage has no others, in addition to :attr:`unreachable`.

        Returns:
            The number of the replica; None when the stage has none.
        """
        nodes = self._nodes.get(stage, ())
        if len(nodes) < 2:
            return nodes[0] if nodes else None
        balancer = self._balancers[stage]
        places = balancer.candidates(len(nodes))
        if self.unreachable or avoid:
            avoid |= self.unreachable
            reachable = [place for place, number in enumerate(nodes) if number not in avoid]
            places = [place for place in places if nodes[place] not in avoid] or reachable or places
            places = tuple(places) if len(nodes) <= FULL_SCAN_LIMIT else places
        if len(places) == 1:
            return nodes[balancer.choose((), cost, places)]
        senders = self._sending(tuple(sources))
        replicas = [self._replica(nodes[place], senders, size_bytes, now_ns) for place in places]
        return nodes[balancer.choose(replicas, cost, places)]

    def outstanding(self, number: int) -> int:
        """Cost of the work that has been sent to a node and is not finished, as far as this process knows."""
        return self._outstanding(number, self._sending(tuple(self._numbers)))

    def running(self, number: int) -> int:
        """Cost of the work that a node executes now; 0 where it does nothing, or its memory is not mapped."""
        board = self._boards.get(number)
        *_, since, cost = board.times if board is not None else (0, 0)
        return cost if since else 0

    def _outstanding(self, number: int, senders: Mapping[int, LoadBoard]) -> int:
        board = self._boards.get(number)
        if board is None:
            last = self._receipts.get(number, _NO_RECEIPT)
            return max(0, self._board.sent(number) - last.done - last.lost)
        return sum([max(0, sent.sent(number) - board.done(sender)) for sender, sent in senders.items()])

    def _sending(self, stages: tuple[int, ...]) -> Mapping[int, LoadBoard]:
        """The load boards of the processes of some stages, as far as they are mapped."""
        boards = self._senders.get(stages)
        if boards is None:
            numbers = {number for stage in stages for number in self._numbers.get(stage, ())}
            boards = self._senders[stages] = {n: board for n, board in self._boards.items() if n in numbers}
        return boards

    def _replica(self, number: int, senders: Mapping[int, LoadBoard], size_bytes: int, now_ns: int) -> Replica:
        board = self._boards.get(number)
        if board is None:
            last = self._receipts.get(number) or self._receipts.setdefault(number, _LastReceipt(measured_ns=now_ns))
            outstanding = last.outstanding(self._board.sent(number), now_ns)
            age_ns, transfer_ns = now_ns - last.measured_ns, _BETWEEN_HOSTS.transfer_ns(size_bytes)
            # The reported load ages: it decays towards the average load.
            trust = 0.5 ** (age_ns / max(1, _REPORT_HALF_LIFE * last.service_ns))
            outstanding += int(self._average_others + (last.others - self._average_others) * trust)
            service = self._average_service_ns + (last.service_ns - self._average_service_ns) * trust
            return Replica(outstanding, int(service), last.peak_ns, age_ns, transfer_ns=transfer_ns)
        service_ns, peak_ns, measured_ns, running_since, running = board.times
        return Replica(
            self._outstanding(number, senders),
            service_ns,
            peak_ns,
            max(0, now_ns - measured_ns),
            running if running_since else 0,
            max(0, now_ns - running_since) if running_since else 0,
        )

    def sent(self, number: int, cost: int) -> None:
        """A request of this cost is sent to a process."""
        self._board.send(number, cost)
