"""Where a process sends what it has for a stage: what its peers' boards say, put before the balancing policy."""

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
_FRESH = 16.0  # times of a request after which half of what a node said of others' work is still true
_FORGET = 0.05
_LOST_NS = 10_000_000_000  # what was sent so long ago and has not arrived is taken for lost
_APART_NS = 1_000_000_000  # between two notes of what had been sent
_DEAF_NS = 15_000_000_000  # a peer that says nothing for so long, and for some runs, cannot be heard


@dataclass(slots=True)
class _Heard:
    """What a peer on another host said last: see :class:`~runtime.wire.messages.data.Receipt`.

    Attributes:
        lost: cost of the work for it that is taken for lost on the way. Worked out anew from each receipt, so that a
            wrong belief lasts until the next one.
        notes: when, and the cost of all work that had been sent there by then; the first one is ``_LOST_NS`` old.
    """

    done: int = 0
    others: int = 0
    service_ns: int = 0
    peak_ns: int = 0
    measured_ns: int = 0
    lost: int = 0
    notes: deque[tuple[int, int]] = field(default_factory=deque)

    def hear(self, receipt: Receipt, sent: int, now_ns: int) -> None:
        """Take in a receipt; ``sent`` is the cost of all work that has been sent there by now."""
        self.lost = max(0, self._due(sent, now_ns) - receipt.arrived)
        self.done, self.others = receipt.done, receipt.others
        self.service_ns, self.peak_ns, self.measured_ns = receipt.service_ns, receipt.peak_ns, now_ns

    def outstanding(self, sent: int, now_ns: int) -> int:
        """The cost of what is there or on its way; of a peer that cannot be heard, what was sent of late."""
        over = self.done + self.lost
        if now_ns - self.measured_ns > max(_DEAF_NS, 4 * self.peak_ns):
            over = max(over, self._due(sent, now_ns))
        return max(0, sent - over)

    def _due(self, sent: int, now_ns: int) -> int:
        """The cost of all work that was sent so long ago that it should have arrived; notes what was sent by now."""
        notes = self.notes
        if not notes or now_ns - notes[-1][0] >= _APART_NS:
            notes.append((now_ns, sent))
        while len(notes) > 1 and now_ns - notes[1][0] >= _LOST_NS:
            notes.popleft()
        return notes[0][1] if now_ns - notes[0][0] >= _LOST_NS else 0


_NOTHING = _Heard()


class Router:
    """The replicas of every stage, and how busy they are.

    Of peers whose memory is mapped, everything is known: what all others whose memory is, too, have sent there. Of
    peers on other hosts, what this process sent there itself, and what they say of that and of others' work.

    Args:
        policy: how to choose among them.
        board: this process's own.

    Attributes:
        unreachable: processes that nothing can be sent to now; they are chosen only where there are no others.
    """

    def __init__(self, policy: Policy, board: LoadBoard) -> None:
        self.unreachable: frozenset[int] = frozenset()
        self._policy = policy
        self._board = board
        self._me = -1
        # Of each stage those that take requests; where all leave, those: they stay for what began before they left.
        self._nodes: dict[int, tuple[int, ...]] = {}
        self._numbers: dict[int, tuple[int, ...]] = {}  # of each stage, all
        self._boards: dict[int, LoadBoard] = {}  # of this process, and of the peers whose memory is mapped
        self._heard: dict[int, _Heard] = {}  # of others
        self._senders: dict[tuple[int, ...], Mapping[int, LoadBoard]] = {}  # by the stages that send
        self._choosers: dict[int, Balancer] = {}
        self._known: frozenset[int] = frozenset()
        self._usual_ns = 0.0
        self._usual = 0.0  # work of others that nodes on other hosts have

    def learn(self, me: int, peers: Sequence[Peer], boards: Mapping[int, LoadBoard]) -> None:
        """All processes of the pipeline, and the boards of those whose memory is mapped."""
        self._me = me
        stages: dict[int, list[Peer]] = {}
        for peer in peers:
            stages.setdefault(peer.stage, []).append(peer)
        self._numbers = {stage: tuple(p.number for p in members) for stage, members in stages.items()}
        nodes = {stage: tuple(p.number for p in members if p.takes) for stage, members in stages.items()}
        nodes = {stage: takers or self._numbers[stage] for stage, takers in nodes.items()}
        for stage in stages.keys() - {CALLER}:
            if nodes[stage] != self._nodes.get(stage):  # positions mean others now
                self._choosers[stage] = Balancer(self._policy, seed=me * 1_000_003 + stage)
        self._nodes = nodes
        known = frozenset(peer.number for peer in peers)
        for number in known - self._known:
            self._board.clear(number)
        self._known = known
        self._boards = {**boards, me: self._board}
        self._heard = {n: heard for n, heard in self._heard.items() if n in known and n not in self._boards}
        self._senders.clear()

    def mapped(self, number: int) -> bool:
        """True when a peer reads this process's board by itself."""
        return number in self._boards or number not in self._known

    def told(self, receipt: Receipt, now_ns: int) -> None:
        """A peer on another host said what its board shows."""
        if not self.mapped(receipt.sender):
            self._usual += _FORGET * (receipt.others - self._usual)
            self._usual_ns += _FORGET * (receipt.service_ns - self._usual_ns) if self._usual_ns else receipt.service_ns
            heard = self._heard.setdefault(receipt.sender, _Heard())
            heard.hear(receipt, self._board.sent(receipt.sender), now_ns)

    @property
    def known(self) -> frozenset[int]:
        """The numbers of all processes."""
        return self._known

    def nodes(self, stage: int) -> tuple[int, ...]:
        """The numbers of the replicas that take requests."""
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
        """The number of the replica that is to take a request; None when there is none.

        Args:
            stage: the stage.
            sources: the stages that send there, :data:`~onnxsplit.plan.CALLER` for the caller.
            cost: of the request.
            size_bytes: of the tensors that are to get there.
            now_ns: the host's monotonic clock.
            avoid: processes to be chosen only where there are no others, besides those that are unreachable.
        """
        nodes = self._nodes.get(stage, ())
        if len(nodes) < 2:
            return nodes[0] if nodes else None
        chooser = self._choosers[stage]
        places = chooser.look_at(len(nodes))
        if self.unreachable or avoid:
            avoid |= self.unreachable
            reachable = [place for place, number in enumerate(nodes) if number not in avoid]
            places = [place for place in places if nodes[place] not in avoid] or reachable or places
            places = tuple(places) if len(nodes) <= FULL_SCAN_LIMIT else places
        if len(places) == 1:
            return nodes[chooser.choose((), cost, places)]
        senders = self._sending(tuple(sources))
        replicas = [self._replica(nodes[place], senders, size_bytes, now_ns) for place in places]
        return nodes[chooser.choose(replicas, cost, places)]

    def outstanding(self, number: int) -> int:
        """The cost of what has been sent to a node and it is not done with, as far as that is known here."""
        return self._outstanding(number, self._sending(tuple(self._numbers)))

    def _outstanding(self, number: int, senders: Mapping[int, LoadBoard]) -> int:
        board = self._boards.get(number)
        if board is None:
            heard = self._heard.get(number, _NOTHING)
            return max(0, self._board.sent(number) - heard.done - heard.lost)
        return sum([max(0, sent.sent(number) - board.done(sender)) for sender, sent in senders.items()])

    def _sending(self, stages: tuple[int, ...]) -> Mapping[int, LoadBoard]:
        """The boards of those in some stages that can be read."""
        found = self._senders.get(stages)
        if found is None:
            numbers = {number for stage in stages for number in self._numbers.get(stage, ())}
            found = self._senders[stages] = {n: board for n, board in self._boards.items() if n in numbers}
        return found

    def _replica(self, number: int, senders: Mapping[int, LoadBoard], size_bytes: int, now_ns: int) -> Replica:
        board = self._boards.get(number)
        if board is None:
            heard = self._heard.get(number) or self._heard.setdefault(number, _Heard(measured_ns=now_ns))
            outstanding = heard.outstanding(self._board.sent(number), now_ns)
            age_ns, transfer_ns = now_ns - heard.measured_ns, _BETWEEN_HOSTS.transfer_ns(size_bytes)
            # What it had of others is known as of then; by and by it is taken to have what nodes usually have.
            trust = 0.5 ** (age_ns / max(1, _FRESH * heard.service_ns))
            outstanding += int(self._usual + (heard.others - self._usual) * trust)
            service = self._usual_ns + (heard.service_ns - self._usual_ns) * trust
            return Replica(outstanding, int(service), heard.peak_ns, age_ns, transfer_ns=transfer_ns)
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
        """A request of a cost goes there."""
        self._board.send(number, cost)
