"""Which links between processes are dead while the processes at both ends live. Pure: what is seen in, verdicts out.

A link goes one way: from a process that sends (its number first) to one that receives. The coordinator is number 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set

from onnxsplit.plan import CALLER

LinkKey = tuple[int, int]
"""Who sends and who should receive, by number."""


class Reachability:
    """Remembers which links are not connected, and since when.

    Args:
        unreachable_s: a link is taken for dead after so long.
    """

    def __init__(self, unreachable_s: float) -> None:
        self._patience_ns = int(unreachable_s * 1e9)
        self._since: dict[LinkKey, int] = {}
        self._dead: frozenset[LinkKey] = frozenset()

    def seen(self, sender: int, unreachable: Collection[int], now_ns: int) -> None:
        """A process says which others it is not connected to now."""
        for link in [link for link in self._since if link[0] == sender and link[1] not in unreachable]:
            del self._since[link]
        for number in unreachable:
            self._since.setdefault((sender, number), now_ns)

    def dead(self, known: Set[int], heard: Set[int], now_ns: int) -> frozenset[LinkKey]:
        """The links among ``known`` processes that are dead; all others are forgotten.

        A link to or from a process that was not ``heard`` lately is not found dead: the process may be.
        """
        self._since = {link: since for link, since in self._since.items() if known >= set(link)}
        self._dead = frozenset(
            link
            for link, since in self._since.items()
            if now_ns - since >= self._patience_ns and (link in self._dead or heard >= set(link))
        )
        return self._dead


def dead_ends(
    readers: Mapping[int, Collection[int]], nodes: Mapping[int, Collection[int]], dead: Set[LinkKey]
) -> frozenset[int]:
    """The processes from which a request cannot get to the end of its way, the coordinator's number 0 among them.

    Args:
        readers: of each stage, and of the caller, the stages (and the caller) that read from it; stages are in
            topological order.
        nodes: of each stage, the numbers of those that take requests. A stage without any is not a matter of links.
        dead: the links that are dead.
    """
    if not dead:
        return frozenset()
    found: set[int] = set()

    def ends(number: int, stage: int) -> bool:
        for reader in readers[stage]:
            targets = (0,) if reader == CALLER else nodes.get(reader, ())
            stuck = found if reader != CALLER else ()
            if targets and all((number, target) in dead or target in stuck for target in targets):
                return True
        return False

    for stage in sorted(nodes, reverse=True):
        found.update([number for number in nodes[stage] if ends(number, stage)])
    return frozenset({*found, 0} if ends(0, CALLER) else found)
