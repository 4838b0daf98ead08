"""What a request waits for, in words, for the messages of errors and the log. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from runtime.coordinator.node_record import NodeRecord, Phase
from runtime.coordinator.roster import Roster
from runtime.topology import StageGraph
from runtime.wire.messages.data import Step


def awaited(graph: StageGraph, roster: Roster, needed: Collection[int], steps: Mapping[int, Step]) -> str:
    """What an attempt waits for: the stages whose turn it is, with their nodes, as far as is known.

    Args:
        graph: the stages.
        roster: the nodes.
        needed: the stages of the attempt.
        steps: how far nodes are with it, by number.
    """
    at = {step: {roster.stage_of(n): n for n, known in steps.items() if known is step} for step in Step}
    unfinished = set(needed) - at[Step.DONE].keys()
    if not unfinished:
        return "its outputs were on their way from " + stage_name(roster, max(needed))
    words = []
    for stage in sorted(unfinished):
        running = roster.by_number(at[Step.RUNNING].get(stage, -1))
        if running is not None:
            words.append(f"{running.called} was running it")
        elif not graph.senders[stage] & unfinished:  # else it is the turn of another first
            words.append(f"{stage_name(roster, stage)} had not begun it")
    return "; ".join(words)


def stage_name(roster: Roster, stage: int) -> str:
    """A stage and its nodes, as messages name them, with what is wrong with those that are not ready."""
    nodes = [node for slot, node in roster.nodes.items() if slot[0] == stage]
    if len(nodes) == 1:
        return nodes[0].called + _unready(nodes[0])
    names = ", ".join(f"{stage}.{node.slot[1]}{_unready(node)}" for node in nodes)
    return f"stage {stage} (nodes {names})"


def _unready(node: NodeRecord) -> str:
    """What is wrong with a node that is not ready; empty for one that is."""
    if node.phase is Phase.READY:
        return ""
    return f": {node.phase.value}" + (f", it {node.reason}" if node.reason else "")
