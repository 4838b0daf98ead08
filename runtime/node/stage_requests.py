"""Ordinary requests, as one stage sees them: what must arrive, and what leaves. Pure."""

from __future__ import annotations

from onnxsplit.plan import CALLER, Plan
from runtime.node.events import OutputsByTarget
from runtime.topology import sources
from runtime.wire.messages.data import NOT_NEEDED, Fragment

_REMEMBERED = 4096  # routes and sets of wanted outputs whose targets are remembered


class StageRequests:
    """The requests at one stage.

    Args:
        plan: the plan.
        stage: the stage.

    Attributes:
        sources: the stages that send to this one, and the caller if it does.
        readers: the outputs that each stage reads.
        co_senders: the stages that send to the same stages as this one.
    """

    def __init__(self, plan: Plan, stage: int) -> None:
        self.sources = sources(plan, stage)
        self._outputs = plan.stages[stage].outputs
        self.readers = {
            other.index: names
            for other in plan.stages
            if (names := tuple(name for name in self._outputs if name in other.inputs))
        }
        self.co_senders = frozenset(source for reader in self.readers for source in sources(plan, reader))
        self._targets: dict[tuple[tuple[int, ...], tuple[str, ...]], OutputsByTarget] = {}

    def leaving(self, fragment: Fragment) -> OutputsByTarget:
        """The outputs that each target gets; computed once for each route and set of wanted outputs."""
        targets = self._targets.get((fragment.route, fragment.wanted))
        if targets is None:
            if len(self._targets) >= _REMEMBERED:
                self._targets.clear()
            wanted = tuple(name for name in self._outputs if name in fragment.wanted)
            stages = ((s, names) for s, names in self.readers.items() if _needs(fragment, s))
            targets = (*stages, *([(CALLER, wanted)] if wanted else []))
            self._targets[fragment.route, fragment.wanted] = targets
        return targets


def _needs(fragment: Fragment, stage: int) -> bool:
    return stage < len(fragment.route) and fragment.route[stage] != NOT_NEEDED
