"""Finds the links between processes that are dead while the processes at both ends live. Pure.

A link goes one way, from a sender to a receiver. The coordinator's number is 0. The input is the connection state that
processes report; the output is the dead links.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set

from onnxsplit.plan import CALLER

LinkKey = tuple[int, int]
"""The numbers of the sender and of the receiver of a link."""


class Reachability:
    """Remembers which links are not connected, and since when.

    Args:
        unreachable_s: seconds without a connection after which a link counts as dead.
    """

    def __init__(self, unreachable_s: float) -> None:
        self._patience_ns = int(unreachable_s * 1e9)
        self._since: dict[LinkKey, int] = {}
        self._dead: frozenset[LinkKey] = frozenset()

    def seen(self, sender: int, unreachable: Collection[int], now_ns: int) -> None:
        """Record the processes to which a process is not connected now."""
        for link in [link for link in self._since if link[0] == sender and link[1] not in unreachable]:
            del self._since[link]
        for number in unreachable:
            self._since.setdefault((sender, number), now_ns)

    def dead(self, known: Set[int], heard: Set[int], now_ns: int) -> frozenset[LinkKey]:
        """The dead links among ``known`` processes. Observations of other links are forgotten.

        A link is only found dead while both its processes were ``heard`` recently; else the process may be dead.
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
    """The numbers of the processes from which requests cannot get back to the caller; 0 stands for the coordinator.

    Args:
        readers: for each stage, and for the caller, the stages (and the caller) that read from it. Stages are numbered
            in topological order.
        nodes: for each stage, the numbers of the nodes that take requests. A stage without any is ignored.
        dead: the dead links.
    """
    if not dead:
        return frozenset()
    stuck_nodes: set[int] = set()

    def ends(number: int, stage: int) -> bool:
        for reader in readers[stage]:
            targets = (0,) if reader == CALLER else nodes.get(reader, ())
            stuck = stuck_nodes if reader != CALLER else ()
            if targets and all((number, target) in dead or target in stuck for target in targets):
                return True
        return False

    for stage in sorted(nodes, reverse=True):
        stuck_nodes.update([number for number in nodes[stage] if ends(number, stage)])
    return frozenset({*stuck_nodes, 0} if ends(0, CALLER) else stuck_nodes)
