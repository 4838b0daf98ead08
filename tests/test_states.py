"""docs/states.md is drawn from the tables of the state machines, and every table is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.coordinator import node_record, pipeline_phase, sequence_record
from runtime.node import state as node_state
from runtime.recut import phases as recut_phases
from runtime.transition_table import IllegalEventError, Machine, drawing

DRAWING = Path(__file__).parents[1] / "docs" / "states.md"
TABLES = {
    "A pipeline, as its coordinator sees it": (
        "runtime/coordinator/pipeline_phase.py",
        pipeline_phase.TRANSITIONS,
        pipeline_phase.PipelinePhase.STARTING,
        {pipeline_phase.PipelinePhase.CLOSED},
    ),
    "A node, as the coordinator sees it": (
        "runtime/coordinator/node_record.py",
        node_record.TRANSITIONS,
        node_record.Phase.BACKOFF,
        {node_record.Phase.GONE},
    ),
    "A sequence": (
        "runtime/coordinator/sequence_record.py",
        sequence_record.TRANSITIONS,
        sequence_record.SequencePhase.WAITING,
        {sequence_record.SequencePhase.ENDED},
    ),
    "A change of a pipeline's plan": (
        "runtime/recut/phases.py",
        recut_phases.TRANSITIONS,
        recut_phases.RecutPhase.STEADY,
        {recut_phases.RecutPhase.ENDED},
    ),
    "A node, as it sees itself": (
        "runtime/node/state.py",
        node_state.TRANSITIONS,
        node_state.NodePhase.WAITING,
        {node_state.NodePhase.STOPPED},
    ),
}


def text() -> str:
    parts = [
        "# Which states do pipelines, nodes and sequences have?\n\nThe diagrams show all states and transitions. "
        "`python tests/test_states.py` draws them from the tables in the code. A\n"
        "transition that no table lists is an error, and its message names the events before it.\n"
    ]
    for title, (module, table, first, _) in TABLES.items():
        parts.append(f"## {title}\n\n`{module}`\n\n```mermaid\n{drawing(table, first)}\n```\n")
    return "\n".join(parts)


def test_the_drawings_show_the_tables_as_they_are():
    assert DRAWING.read_text() == text(), "run: python tests/test_states.py"


@pytest.mark.parametrize("name", TABLES)
def test_every_state_can_be_reached_and_all_but_the_last_can_be_left(name):
    _, table, first, last = TABLES[name]
    reached, before = {first}, set()
    while reached != before:
        before = set(reached)
        reached |= {target for (state, _), target in table.items() if state in reached}
    assert reached == set(type(first))
    assert {state for (state, _), target in table.items() if target is not state} >= set(type(first)) - last


@pytest.mark.parametrize("name", TABLES)
def test_a_transition_that_no_table_lists_is_an_error_that_names_earlier_events(name):
    _, table, first, _ = TABLES[name]
    changes = {change for _, change in table}
    machine = Machine(name, table, first)
    for change in [change for change in changes if (first, change) not in table]:
        with pytest.raises(IllegalEventError, match=f"in state {first.name}; before it: nothing"):
            machine.go(change)


if __name__ == "__main__":
    DRAWING.write_text(text())
