"""Where a process sends what it has for a stage: what its peers' boards say, put before the balancing policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onnxsplit.cluster import Link
from runtime.balance import Chooser, Policy, Replica
from runtime.board import Board
from runtime.messages import CALLER, Peer, Receipt

_BETWEEN_HOSTS = Link()


class Router:
    """The replicas of every stage, and how busy they are.

    Args:
        policy: how to choose among them.
        board: this process's own.
    """

    def __init__(self, policy: Policy, board: Board) -> None:
        self._policy = policy
        self._board = board
        self._me = -1
        # Of each stage those that take requests; where all leave, those: they stay for what began before they left.
        self._nodes: dict[int, tuple[int, ...]] = {}
        self._numbers: dict[int, tuple[int, ...]] = {}  # of each stage, all
        self._boards: dict[int, Board] = {}
        self._copies: dict[int, Board] = {}  # of peers whose memory is not mapped
        self._choosers: dict[int, Chooser] = {}
        self._known: frozenset[int] = frozenset()

    def learn(self, me: int, peers: Sequence[Peer], boards: Mapping[int, Board]) -> None:
        """All processes of the pipeline, and the boards of those whose memory is mapped."""
        self._me = me
        stages = {peer.stage for peer in peers}
        self._numbers = {stage: tuple(p.number for p in peers if p.stage == stage) for stage in stages}
        nodes = {stage: tuple(p.number for p in peers if p.stage == stage and p.takes) for stage in stages}
        nodes = {stage: takers or self._numbers[stage] for stage, takers in nodes.items()}
        for stage in stages - {CALLER}:
            if nodes[stage] != self._nodes.get(stage):  # positions mean others now
                self._choosers[stage] = Chooser(self._policy)
        self._nodes = nodes
        known = frozenset(peer.number for peer in peers)
        for number in known - self._known:
            self._board.clear(number)
        self._known = known
        self._copies = {n: self._copies.get(n) or Board() for n in known - boards.keys() - {me}}
        self._boards = {**self._copies, **boards, me: self._board}

    def mapped(self, number: int) -> bool:
        """True when a peer reads this process's board by itself."""
        return number not in self._copies

    def told(self, receipt: Receipt, now_ns: int) -> None:
        """A peer on another host said what its board shows."""
        copy = self._copies.get(receipt.sender)
        if copy is not None:
            copy.told(self._me, receipt.done)
            copy.show(receipt.service_ns, receipt.peak_ns, now_ns)

    @property
    def known(self) -> frozenset[int]:
        """The numbers of all processes."""
        return self._known

    def nodes(self, stage: int) -> tuple[int, ...]:
        """The numbers of the replicas that take requests."""
        return self._nodes.get(stage, ())

    def choose(self, stage: int, sources: Sequence[int], cost: int, size_bytes: int, now_ns: int) -> int | None:
        """The number of the replica that is to take a request; None when there is none.

        Args:
            stage: the stage.
            sources: the stages that send there, :data:`~runtime.messages.CALLER` for the caller.
            cost: of the request.
            size_bytes: of the tensors that are to get there.
            now_ns: the host's monotonic clock.
        """
        nodes = self._nodes.get(stage, ())
        if len(nodes) < 2:
            return nodes[0] if nodes else None
        senders = [number for source in sources for number in self._numbers.get(source, ())]
        replicas = [self._replica(number, senders, size_bytes, now_ns) for number in nodes]
        return nodes[self._choosers[stage].choose(replicas, cost)]

    def outstanding(self, number: int, senders: Iterable[int]) -> int:
        """The cost of what some processes have sent to a node and it is not done with."""
        board = self._boards[number]
        return sum(max(0, self._boards[sender].sent(number) - board.done(sender)) for sender in senders)

    def _replica(self, number: int, senders: Sequence[int], size_bytes: int, now_ns: int) -> Replica:
        service_ns, peak_ns, measured_ns, running_since, running = self._boards[number].times
        away = number in self._copies
        return Replica(
            outstanding=self.outstanding(number, senders),
            service_ns=service_ns,
            peak_ns=peak_ns,
            age_ns=max(0, now_ns - measured_ns),
            running=running if running_since else 0,
            running_ns=max(0, now_ns - running_since) if running_since else 0,
            transfer_ns=_BETWEEN_HOSTS.transfer_ns(size_bytes) if away else 0,
        )

    def sent(self, number: int, cost: int) -> None:
        """A request of a cost goes there."""
        self._board.send(number, cost)
