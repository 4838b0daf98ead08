"""The chains of a pipeline: which nodes form them, and which of them has room for a sequence. Pure.

Chain i takes replica i mod n of each stage with n nodes. A chain stays as it is while its nodes live, because the
states of its sequences lie on them. When nodes join, there are new chains, which new sequences use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from onnxsplit.plan import CALLER
from onnxsplit.plan_decoder import RowLayout
from runtime.coordinator.chains import Chain
from runtime.coordinator.events import Effects, Forget
from runtime.coordinator.links import DeadLinks
from runtime.coordinator.node_record import Phase
from runtime.coordinator.reach import LinkKey
from runtime.coordinator.roster import Roster
from runtime.coordinator.sequence_limits import SequenceLimits
from runtime.coordinator.sequence_record import SequenceRecord
from runtime.topology import StepGraph
from runtime.wire.messages.data import NOT_NEEDED

_COORDINATOR = 0


class ChainTable:
    """All chains.

    Args:
        graph: the stages that run in a step.
        stages: the number of stages of the plan.
        roster: the nodes.
        links: the dead links.
        limits: the limits of sequences.
        layout: which rows may share a run.
        effects: collects what nodes have to forget.
    """

    def __init__(
        self,
        graph: StepGraph,
        stages: int,
        roster: Roster,
        links: DeadLinks,
        limits: SequenceLimits,
        layout: RowLayout,
        effects: Effects,
    ) -> None:
        self._effects = effects
        self._graph = graph
        self._stages = stages
        self._roster = roster
        self._links = links
        self._limits = limits
        self._layout = layout
        self._chains: dict[tuple[int, ...], Chain] = {}
        self._used_bytes: Counter[int] = Counter()  # by the number of the node

    def __iter__(self) -> Iterator[Chain]:
        return iter(list(self._chains.values()))

    def __contains__(self, chain: Chain) -> bool:
        return self._chains.get(chain.route) is chain

    # Which chains exist

    def refresh(self) -> None:
        """Make the chains that the present nodes can form, and close those that they no longer would."""
        wanted = dict.fromkeys(self._wanted())
        for chain in self:
            chain.is_open = chain.route in wanted
            chain.leaves = any(node.phase is not Phase.READY for node in chain.nodes.values())
            self._drop_ended(chain)
        self._open(wanted)

    def _open(self, wanted: Iterable[tuple[int, ...]]) -> None:
        """Make the chains that are wanted and not there, as far as there are slots for them."""
        for route in wanted:
            if route not in self._chains and (place := self._place_for(route)) is not None:
                self._chains[route] = self._new(route, place)

    def tidy(self, chain: Chain) -> None:
        """Remove a closed chain without sequences; another one may have waited for its slots."""
        if self._drop_ended(chain):
            self._open(self._wanted())

    def _drop_ended(self, chain: Chain) -> bool:
        """Remove a closed chain without sequences; returns whether it was one."""
        ended = not chain.is_open and not chain.sequences and chain in self
        if ended:
            self.drop(chain)
        return ended

    def _wanted(self) -> Iterator[tuple[int, ...]]:
        """The routes of the chains that the present nodes can form."""
        nodes = {
            stage: [number for number in self._roster.takers(stage) if number not in self._roster.dead_ends]
            for stage in self._graph.stages
        }
        if all(nodes.values()):
            for place in range(max(map(len, nodes.values()))):
                route = [NOT_NEEDED] * self._stages
                for stage, numbers in nodes.items():
                    turn = place % len(numbers)
                    choices = (n for n in (*numbers[turn:], *numbers[:turn]) if self._reaches(route, stage, n))
                    route[stage] = next(choices, NOT_NEEDED)
                if all(route[stage] != NOT_NEEDED for stage in nodes):
                    yield tuple(route)

    def _reaches(self, route: Sequence[int], stage: int, number: int) -> bool:
        """Whether the links between a node of a stage and the nodes of earlier stages work."""
        return self._links.stories.keys().isdisjoint(self._ends(route, stage, number))

    def _ends(self, route: Sequence[int], stage: int, number: int) -> list[LinkKey]:
        """The links that a step passes to a node of a stage, and from there back to the coordinator."""
        links = [(_COORDINATOR if source == CALLER else route[source], number) for source in self._graph.sources[stage]]
        return [*links, (number, _COORDINATOR)] if stage == self._graph.tail else links

    def _place_for(self, route: tuple[int, ...]) -> int | None:
        """The first range of slots that no chain with one of these nodes has."""
        taken = {chain.place for chain in self if any(number in chain.nodes for number in route)}
        return next((place for place in range(self._limits.places) if place not in taken), None)

    def _new(self, route: tuple[int, ...], place: int) -> Chain:
        nodes = {}
        for stage in self._graph.stages:
            node = self._roster.by_number(route[stage])
            assert node is not None
            nodes[node.number] = node
        links = frozenset(link for stage in self._graph.stages for link in self._ends(route, stage, route[stage]))
        return Chain(route, nodes, links, place=place, limits=self._limits, layout=self._layout)

    def drop(self, chain: Chain) -> None:
        """Remove a chain, and what is kept on it."""
        if chain in self:
            chain.drop_kept(list(chain.prefixes.kept))
            self._forget_dropped(chain)
            del self._chains[chain.route]

    def _forget_dropped(self, chain: Chain) -> None:
        """Let nodes forget the sequences that a chain no longer keeps."""
        for sequence in chain.dropped:
            if chain.identities:
                self._effects.on_nodes.append(Forget(sequence.number, sequence.epoch, chain.identities))
        chain.dropped.clear()

    def has_other(self, chain: Chain) -> bool:
        """Whether sequences of a chain can go to another one."""
        return any(other.is_open for other in self if other is not chain)

    # Room

    def room_for(self, sequence: SequenceRecord) -> Chain | None:
        """The chain that a sequence joins; None when none has room.

        That is the chain that knows most of the beginning of its text, unless it has many more sequences than another.
        Among equal ones, it is the one with the most free bytes.
        """
        chains = [chain for chain in self if chain.is_open and self._fits(chain, sequence)]
        fewest = min((len(chain.sequences) for chain in chains), default=0)
        most = fewest + max(1, self._limits.rows // 4)

        def rank(chain: Chain) -> tuple[int, ...]:
            known = chain.prefixes.donor(sequence, sent=False)[1] if len(chain.sequences) <= most else 0
            return -known, *self._load(chain), len(chain.sequences)

        return min(chains, key=rank, default=None)

    def _fits(self, chain: Chain, sequence: SequenceRecord) -> bool:
        return chain.vacancy() is not None and self._has_bytes(chain, sequence)

    def will_fit(self, sequence: SequenceRecord) -> bool:
        """Whether a sequence has room now, or when the steps in flight have come back, whatever other sequences do."""
        return any(chain.is_open and chain.has_rows and self._has_bytes(chain, sequence) for chain in self)

    def _has_bytes(self, chain: Chain, sequence: SequenceRecord) -> bool:
        most = self._limits.cache_bytes
        return all(
            self._used_bytes[chain.route[stage]] + sequence.needed_bytes[stage] <= most for stage in self._graph.stages
        )

    def _load(self, chain: Chain) -> tuple[int, int]:
        """The reserved bytes of the fullest node of a chain, and of all its nodes."""
        used = [self._used_bytes[number] for number in chain.nodes]
        return max(used), sum(used)

    def used_bytes(self, number: int) -> int:
        """The bytes that are reserved on a node."""
        return self._used_bytes[number]

    @property
    def usage(self) -> float:
        """The share of the bytes for states that is reserved on the fullest node."""
        return max(self._used_bytes.values(), default=0) / self._limits.cache_bytes

    def add(self, chain: Chain, sequence: SequenceRecord) -> None:
        """Reserve the bytes of a sequence on the nodes of a chain, and give it a slot."""
        for stage in self._graph.stages:
            self._used_bytes[chain.route[stage]] += sequence.needed_bytes[stage]
        chain.add(sequence)
        self._make_room()
        self._forget_dropped(chain)

    def _make_room(self) -> None:
        """Drop kept sequences, those used first first, until all bytes fit again."""
        kept = [(s, chain) for chain in self for s in chain.prefixes.kept.values()]
        if not kept:
            return
        used = Counter(self._used_bytes)
        for sequence, chain in reversed(kept):
            needed = self._limits.needed_bytes(sequence.sent)
            nodes = [(chain.route[stage], needed[stage]) for stage in self._graph.stages]
            if all(used[node] + size <= self._limits.cache_bytes for node, size in nodes):
                used.update(dict(nodes))
            else:
                chain.drop_kept([sequence.slot])
                self._forget_dropped(chain)

    @property
    def kept(self) -> tuple[int, ...]:
        """The numbers of the sequences that have ended, and whose states nodes keep."""
        kept = [sequence.number for chain in self for sequence in chain.prefixes.kept.values()]
        return (*kept, *(s.taken.number for chain in self for s in chain.sequences if s.taken is not None))

    @property
    def kept_tokens(self) -> int:
        """The number of positions that nodes keep of sequences that have ended."""
        return sum(sequence.sent for chain in self for sequence in chain.prefixes.kept.values())

    def remove(self, sequence: SequenceRecord, *, keep: bool = False) -> tuple[bytes, ...]:
        """Free the bytes and the slot of a sequence.

        Args:
            sequence: the sequence.
            keep: whether to keep its states for others, if they are worth it.

        Returns:
            the identities of the nodes that have to forget it.
        """
        chain, done = sequence.chain, sequence.sent - len(sequence.steps)
        assert chain is not None
        keep = keep and self._limits.keeps and chain.is_open and done >= self._limits.chunk
        for stage in self._graph.stages:
            number = chain.route[stage]
            self._used_bytes[number] -= sequence.needed_bytes[stage]
            if not self._used_bytes[number]:
                del self._used_bytes[number]
        chain.remove(sequence)
        if keep:
            sequence.sent = done
            chain.prefixes.keep(sequence)
            self._make_room()
        self._forget_dropped(chain)
        self.tidy(chain)
        return () if keep else chain.identities
