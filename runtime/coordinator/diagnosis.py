"""Describes what a request is waiting for, in errors and in the log. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from runtime.coordinator.node_record import NodeRecord, Phase
from runtime.coordinator.roster import Roster
from runtime.topology import StageGraph
from runtime.wire.messages.data import Step


def awaited(graph: StageGraph, roster: Roster, needed: Collection[int], steps: Mapping[int, Step]) -> str:
    """Describe what an attempt is waiting for: the stages that come next, and their nodes, as far as is known.

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
        elif not graph.senders[stage] & unfinished:  # else another stage comes first
            words.append(f"{stage_name(roster, stage)} had not begun it")
    return "; ".join(words)


def stage_name(roster: Roster, stage: int) -> str:
    """The name of a stage and its nodes in messages, with the state of the nodes that are not ready."""
    nodes = [node for slot, node in roster.nodes.items() if slot[0] == stage]
    if len(nodes) == 1:
        return nodes[0].called + _unready(nodes[0])
    names = ", ".join(f"{stage}.{node.slot[1]}{_unready(node)}" for node in nodes)
    return f"stage {stage} (nodes {names})"


def _unready(node: NodeRecord) -> str:
    """The state of a node that is not ready, and the reason; empty for a node that is ready."""
    if node.phase is Phase.READY:
        return ""
    return f": {node.phase.value}" + (f", it {node.reason}" if node.reason else "")
