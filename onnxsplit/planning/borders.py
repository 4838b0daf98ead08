"""Narrow the borders of a cut: choose a form for each tensor that crosses, and rewrite the stages.

With ``auto``, a tensor takes the form that is fastest on its link, as long as the errors of all borders together stay
within the budget. The errors are seen on the example inputs: the stages run on values that went through a narrower form
and back. First all borders are narrowed as far as their links gain. If that is too much, they are narrowed one after
the other, the one that saves most bytes first, and each choice is checked together with those before. The rewritten
stages are run in the end, and their error is what the plan states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onnxsplit.errors import PartitionError
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.source import open_model
from onnxsplit.partitioner import score
from onnxsplit.plan_borders import Form
from onnxsplit.planning.border_forms import BorderForms, Narrowed, convert_ns
from onnxsplit.planning.border_trials import BorderTrials
from onnxsplit.planning.model_partitioner import ModelPartitioner
from onnxsplit.planning.plan_builder import CandidateCut, stage_file
from onnxsplit.planning.subject import Subject
from onnxsplit.progress import Say
from onnxsplit.stages.borders import NarrowTensor, names_in, narrow_stage, wire_names
from onnxsplit.stages.chain import StageFile, StageProcesses
from onnxsplit.stages.model_file import file_entry, serialized

_TRIES = 4  # how often the limit is halved if the rewritten stages have a larger error than their imitation


def narrowed(
    cut: CandidateCut, partitioner: ModelPartitioner, stages: Sequence[StageFile], say: Say
) -> tuple[CandidateCut, ModelPartitioner]:
    """Narrow the borders of a cut, and rewrite its stage files.

    Args:
        cut: the cut, whose stages read and write full tensors.
        partitioner: the partitioner that made it.
        stages: the stages as they run without optimisation.
        say: called with each step.

    Returns:
        The cut; and the partitioner, which no longer considers forms that break the budget by themselves.
    """
    subject = partitioner.subject
    forms = subject.borders
    if forms is None:
        return cut, partitioner
    if not cut.files or subject.costs.source != "measured":
        return narrowed_untried(cut, partitioner), partitioner
    wanted = _fastest(cut, partitioner, forms)
    if not wanted:
        cut = replace(cut, borders=Narrowed(error=0.0, inputs=1 + len(subject.more_inputs)))
    else:
        say("comparing the answers of stages with narrow borders")
        with StageProcesses(keep=True) as run_stage:
            trials = BorderTrials(subject, stages, run_stage)
            cut = _narrowed_by_error(cut, subject, forms, wanted, trials)
        if forms.asked == "auto":
            subject = replace(subject, borders=forms.without(trials.refused(forms.tolerance)))
            partitioner = replace(partitioner, subject=subject)
    return _scored(cut, partitioner), partitioner


def narrowed_untried(cut: CandidateCut, partitioner: ModelPartitioner) -> CandidateCut:
    """Narrow the borders of a cut to the forms that are fastest on their links, and rewrite its files if it has any.

    No stage is run, so the error of the outputs stays unknown.
    """
    subject = partitioner.subject
    if subject.borders is None:
        return cut
    wanted = _fastest(cut, partitioner, subject.borders)
    cut = replace(cut, borders=Narrowed(_named(subject, {name: first for name, (first, *_) in wanted.items()})))
    if cut.files:
        cut = _rewritten(cut, subject.graph)
        _forget_full_files(cut)
    return _scored(cut, partitioner)


def _scored(cut: CandidateCut, partitioner: ModelPartitioner) -> CandidateCut:
    """The cut with its figures for the forms that were chosen."""
    problem = as_chosen(cut, partitioner.subject).problem(cut.op_ns, partitioner.target)
    return replace(cut, score=score(problem, cut.result.partition))


def as_chosen(cut: CandidateCut, subject: Subject) -> Subject:
    """The model with the forms that were chosen for the borders of a cut."""
    if cut.borders is None or subject.borders is None:
        return subject
    return replace(subject, borders=subject.borders.only(cut.borders.chosen))


def without_conversions(cut: CandidateCut, subject: Subject, measured_ns: Sequence[int]) -> tuple[int, ...]:
    """Measured times of the stages without the conversions in them, which the costs of transfers already hold."""
    times = list(measured_ns)
    for narrow in cut.borders.tensors if cut.borders is not None else ():
        spent = convert_ns(narrow.form, subject.shapes.bytes(narrow.tensor))
        for index, part in enumerate(cut.parts):
            if narrow.tensor in (*part.inputs, *part.outputs):
                times[index] = max(1, times[index] - spent)
    return tuple(times)


def rounding_of_borders(cut: CandidateCut, subject: Subject) -> float:
    """How far optimisation may move the answers because a last bit decides over a step of a narrow border."""
    if cut.borders is None or not cut.borders.tensors or subject.borders is None:
        return 0.0
    return max(subject.borders.tolerance, cut.borders.error or 0.0)


def _fastest(cut: CandidateCut, partitioner: ModelPartitioner, forms: BorderForms) -> dict[str, list[Form]]:
    """For each tensor that crosses, the narrower forms that are faster on its links than the full one, fastest first.

    A form that the user named counts as faster.
    """
    problem = partitioner.subject.problem(cut.op_ns, partitioner.target)
    devices = cut.result.partition.devices
    found = {}
    for index, part in enumerate(cut.parts):
        for name in part.outputs:
            links = [
                problem.link_between(devices[index], devices[other])
                for other, reader in enumerate(cut.parts)
                if name in reader.inputs
            ]
            ways = {form: forms.way(name, form) for form in forms.forms.get(name, ())} if links else {}
            times = {
                form: sum(link.transfer_ns(way.size_bytes) + way.convert_ns for link in links)
                for form, way in ways.items()
            }
            limit = times.pop("float32", None)
            ordered = [form for form in sorted(times, key=times.__getitem__) if limit is None or times[form] < limit]
            if ordered:
                found[name] = ordered
    return found


def _narrowed_by_error(
    cut: CandidateCut, subject: Subject, forms: BorderForms, wanted: Mapping[str, Sequence[Form]], trials: BorderTrials
) -> CandidateCut:
    """Choose forms by the error of the outputs, rewrite the stages, and compare their outputs."""
    auto, limit = forms.asked == "auto", forms.tolerance
    for _ in range(_TRIES):
        chosen = trials.chosen(wanted, limit) if auto else {name: first for name, (first, *_) in wanted.items()}
        alone = {name: trials.error({name: form}) for name, form in chosen.items()}
        made = _rewritten(replace(cut, borders=Narrowed(_named(subject, chosen), alone)), subject.graph)
        error = trials.error_of(made.inputs, made.outputs)
        if not auto or error <= forms.tolerance:
            made = replace(made, borders=Narrowed(_named(subject, chosen), alone, error, trials.count))
            break
        _restore(made)
        limit /= 2
    else:
        made = replace(cut, borders=Narrowed(error=0.0, inputs=trials.count))
    _forget_full_files(made)
    return made


def _named(subject: Subject, chosen: Mapping[str, Form]) -> tuple[NarrowTensor, ...]:
    """The tensors with their forms, and new names for what crosses."""
    assert subject.borders is not None
    taken = names_in(subject.graph.source.proto.graph)
    made = []
    for name, form in chosen.items():
        wire = wire_names(name, form, taken)
        taken.update(wire)
        made.append(NarrowTensor(name, form, wire, subject.shapes.specs[name], subject.borders.rows[name]))
    return tuple(made)


def _rewritten(cut: CandidateCut, graph: OpGraph) -> CandidateCut:
    """Write the stages again with their narrow borders; their former files are kept beside them."""
    assert cut.borders is not None
    taken = names_in(graph.source.proto.graph)
    files = list(cut.files)
    for index, part in enumerate(cut.parts):
        written = [narrow for narrow in cut.borders.tensors if narrow.tensor in part.outputs]
        read = [narrow for narrow in cut.borders.tensors if narrow.tensor in part.inputs]
        if not written and not read:
            continue
        path, full = cut.folder / stage_file(index), _full_file(cut, index)
        model = open_model(path).proto
        narrow_stage(model, written, read, taken)
        try:
            path.rename(full)
            path.write_bytes(serialized(model))
        except OSError as error:
            raise PartitionError(f"cannot write {path}: {error.strerror}") from error
        files[index] = (file_entry(path), *files[index][1:])
    return replace(cut, files=tuple(files))


def _restore(cut: CandidateCut) -> None:
    """Put the files of stages with full borders back."""
    for index in range(len(cut.parts)):
        full = _full_file(cut, index)
        if full.exists():
            full.replace(cut.folder / stage_file(index))


def _forget_full_files(cut: CandidateCut) -> None:
    """Remove the files of stages with full borders."""
    for index in range(len(cut.parts)):
        _full_file(cut, index).unlink(missing_ok=True)


def _full_file(cut: CandidateCut, index: int) -> Path:
    """The file of a stage before its borders were narrowed."""
    return cut.folder / f"full{index}.onnx"
