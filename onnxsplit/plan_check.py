"""Checks that a plan does not contradict itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from onnxsplit.plan import PLAN_FILE, Plan
from onnxsplit.plan_base import MOST_NODES
from onnxsplit.plan_borders import NarrowBorders
from onnxsplit.plan_decoder import Decoder, State

_SHA256 = re.compile(r"[0-9a-f]{64}")


def plan_problems(plan: Plan) -> list[str]:
    """Every contradiction within a plan, one sentence each; empty for a good plan.

    Files are not opened; :func:`~onnxsplit.plan_files.load_plan` compares them with the plan.
    """
    return [
        *_files_problems(plan),
        *_custom_ops_problems(plan),
        *_stages_problems(plan),
        *_target_problems(plan),
        *_tensors_problems(plan),
        *_ends_problems(plan),
        *(_decoder_problems(plan, plan.decoder) if plan.decoder is not None else ()),
        *(_borders_problems(plan, plan.borders) if plan.borders is not None else ()),
    ]


def _files_problems(plan: Plan) -> Iterator[str]:
    seen: set[str] = set()
    for entry in plan.files():
        plain = Path(entry.name).name == entry.name and not {"/", "\\", "\0"} & set(entry.name)
        if not plain or entry.name in ("", ".", "..", PLAN_FILE):
            yield f"file name {entry.name!r} is not a plain name inside the plan's folder"
        if entry.name in seen:
            yield f"file {entry.name!r} is listed twice"
        if not _SHA256.fullmatch(entry.sha256):
            yield f"file {entry.name!r} has no valid SHA-256: expected 64 hexadecimal digits"
        seen.add(entry.name)


def _custom_ops_problems(plan: Plan) -> Iterator[str]:
    names = [library.name for library in plan.custom_ops]
    for library in plan.custom_ops:
        if Path(library.name).name != library.name or not library.name or "\0" in library.name:
            yield f"the custom op library {library.name!r} is not named by a plain file name"
        if names.count(library.name) > 1:
            yield f"the custom op library {library.name!r} is listed twice"
        if not _SHA256.fullmatch(library.sha256):
            yield f"the custom op library {library.name!r} has no valid SHA-256: expected 64 hexadecimal digits"
    for stage in plan.stages:
        for name in stage.custom_ops:
            if name not in names:
                yield f"stage {stage.index} needs the custom op library {name!r}, which the plan does not list"


def _stages_problems(plan: Plan) -> Iterator[str]:
    available = set(plan.inputs)
    for position, stage in enumerate(plan.stages):
        where = f"stage {position}"
        if stage.index != position:
            yield f"{where} carries the index {stage.index}"
        if not stage.files or stage.files[0].name != stage.file:
            yield f"{where}: {stage.file!r} is not the first of its files"
        for name, given in (("devices", stage.devices), ("hosts", stage.hosts)):
            if len(given) not in (0, stage.replicas):
                yield f"{where} names {len(given)} {name} for {stage.replicas} replicas"
        if not stage.outputs:
            yield f"{where} has no outputs"
        for name in stage.inputs:
            if name not in available:
                yield f"{where} reads {name!r}, which neither an earlier stage nor the caller gives"
        for name in stage.outputs:
            if name in available:
                yield f"{where} writes {name!r}, which an earlier stage or the caller writes too"
        for name in (*stage.inputs, *stage.outputs):
            if name not in plan.tensors:
                yield f"{where}: {name!r} is not among the tensors"
        available.update(stage.outputs)
    nodes = sum(stage.replicas for stage in plan.stages)
    if nodes > MOST_NODES:
        yield f"the stages have {nodes} replicas together; at most {MOST_NODES} are allowed"


def _target_problems(plan: Plan) -> Iterator[str]:
    if plan.target is None:
        return
    names = [device.name for device in plan.target.devices]
    if len(set(names)) != len(names):
        yield "two devices of its target have the same name"
    used = [number for stage in plan.stages for number in stage.device_numbers]
    if len(set(used)) != len(used):
        yield "a device of its target has more than one replica"
    for stage in plan.stages:
        count = len(stage.device_numbers)
        if count not in (0, stage.replicas):
            yield f"stage {stage.index} names {count} devices of the target for {stage.replicas} replicas"
        if any(number >= len(names) for number in stage.device_numbers):
            yield f"stage {stage.index} is on a device that the target, with {len(names)} devices, does not have"


def _tensors_problems(plan: Plan) -> Iterator[str]:
    for name, spec in plan.tensors.items():
        if spec.batch_axis is not None and spec.shape is not None and spec.batch_axis >= len(spec.shape):
            yield f"tensor {name!r} has the batch axis {spec.batch_axis} and {len(spec.shape)} dimensions"
    producer = plan.producers()
    for cut in plan.cuts:
        if producer.get(cut.tensor) != cut.from_stage:
            yield f"cut {cut.tensor!r} is not an output of stage {cut.from_stage}"
        for stage in cut.to_stages:
            if stage >= len(plan.stages) or cut.tensor not in plan.stages[stage].inputs:
                yield f"cut {cut.tensor!r} is not an input of stage {stage}"


def _ends_problems(plan: Plan) -> Iterator[str]:
    producer = plan.producers()
    for name in plan.inputs:
        if name not in plan.tensors:
            yield f"input {name!r} is not among the tensors"
    for name in plan.defaults:
        if name not in plan.inputs:
            yield f"{name!r} has a default and is not an input"
    for name in (*plan.constant_inputs, *plan.dropped_inputs):
        if name in plan.inputs:
            yield f"input {name!r} is a constant, or was left out"
    for name in plan.outputs:
        source = plan.passthrough.get(name)
        if source is None and name not in producer:
            yield f"output {name!r} has no source: no stage writes it, and no input or file passes through to it"
        if source is not None and (source.input is None) == (source.file is None):
            yield f"output {name!r} must pass through either an input or a file"
        if source is not None and source.input is not None and source.input not in plan.inputs:
            yield f"output {name!r} passes through {source.input!r}, which is not an input"
        if name not in plan.tensors:
            yield f"output {name!r} is not among the tensors"
        needed, listed = sorted(plan.stages_for((name,))), plan.outputs_need.get(name)
        if listed is None or sorted(set(listed)) != needed:
            yield f"output {name!r} needs the stages {needed}, and outputs_need lists {listed and list(listed)}"


def _borders_problems(plan: Plan, borders: NarrowBorders) -> Iterator[str]:
    """Contradictions between the narrow borders and the rest of the plan."""
    written, crossing = plan.producers(), {cut.tensor for cut in plan.cuts}
    for border in borders.tensors:
        if border.tensor not in written:
            yield f"the narrowed tensor {border.tensor!r} is not an output of a stage"
        for name in border.wire:
            if name not in crossing:
                yield f"{name!r} stands for the narrowed tensor {border.tensor!r}, and is not cut"
        for stage in border.compressed:
            if border.form != "int8" or stage >= len(plan.stages) or border.wire[0] not in plan.stages[stage].inputs:
                yield f"{border.tensor!r} goes compressed to stage {stage}, which does not read it as int8"
    names = [border.tensor for border in borders.tensors]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"the tensor {name!r} is narrowed more than once"


def _decoder_problems(plan: Plan, decoder: Decoder) -> Iterator[str]:
    """Contradictions between the decoder block and the rest of the plan."""
    for state in decoder.states:
        yield from _state_problems(plan, state)
    if not any(control.role == "tokens" for control in decoder.controls):
        yield "the decoder has no input with the tokens"
    for control in decoder.controls:
        if control.input not in plan.inputs:
            yield f"control {control.input!r} is not an input"
        if (control.value is not None) != (control.role == "fixed"):
            yield f"control {control.input!r} has the role {control.role} and the value {control.value}"
    ends = [s.past for s in decoder.states] + [control.input for control in decoder.controls]
    for name in sorted({name for name in ends if ends.count(name) > 1}):
        yield f"input {name!r} is a state or control more than once"
    written = [*(state.present for state in decoder.states), decoder.scores]
    for name in sorted({name for name in written if written.count(name) > 1}):
        yield f"output {name!r} is a state or the scores more than once"
    for name in plan.inputs:
        if name not in ends:
            yield f"input {name!r} of a decoder is neither a state nor a control"
    if decoder.scores not in plan.producers() or decoder.scores not in plan.outputs:
        yield f"the scores {decoder.scores!r} are not an output that a stage writes"
    for token in decoder.end_tokens:
        if token >= decoder.vocabulary:
            yield f"the end token {token} is not below the vocabulary of {decoder.vocabulary}"
    if decoder.last_only != any(control.role == "first-scored" for control in decoder.controls):
        yield "last_only does not fit the controls"
    if decoder.rollback and any(state.kind not in ("in-place", "append") for state in decoder.states):
        yield "a decoder whose states are replaced cannot be rolled back"


def _state_problems(plan: Plan, state: State) -> Iterator[str]:
    where, grows = f"state {state.past!r}", state.kind in ("in-place", "append")
    if state.stage >= len(plan.stages):
        yield f"{where} belongs to stage {state.stage}, and the plan has {len(plan.stages)}"
        return
    stage = plan.stages[state.stage]
    if state.past not in plan.inputs or state.past not in stage.inputs:
        yield f"{where} is not an input of the model that stage {state.stage} reads"
    if state.present not in plan.outputs or state.present not in stage.outputs:
        yield f"{where}: {state.present!r} is not an output of the model that stage {state.stage} writes"
    for other in plan.stages:
        if other.index != state.stage and {state.past, state.present} & set(other.inputs):
            yield f"{where} crosses from stage {state.stage} to stage {other.index}"
    if (state.axis is None) != (state.kind == "recurrent"):
        yield f"{where} is of the kind {state.kind} and has the axis {state.axis}"
    rank = len(state.shape)
    if state.batch_axis >= rank or (state.axis is not None and state.axis >= rank) or state.axis == state.batch_axis:
        yield f"{where} has {rank} dimensions, the batch axis {state.batch_axis} and the axis {state.axis}"
    elif state.shape[state.batch_axis] != 1 or (state.axis is not None and state.shape[state.axis] != 0):
        yield f"{where}: the shape {list(state.shape)} is not that of one row and no position"
    for end in (state.past, state.present):
        spec = plan.tensors.get(end)
        if spec is not None and spec.shape is not None and len(spec.shape) != rank:
            yield f"{where} has {rank} dimensions, and {end!r} has {len(spec.shape)}"
    if (state.token_bytes > 0 and not grows) or (state.fixed_bytes > 0 and grows):
        yield f"{where} is of the kind {state.kind}, with {state.token_bytes} and {state.fixed_bytes} bytes"
    if state.kind == "window" and state.capacity is None:
        yield f"{where} is a window, and says nothing of the most positions that it holds"
