"""The errors that narrow borders cause in the outputs of a model, seen by running its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from onnxsplit.distance import distance
from onnxsplit.plan_borders import UNUSABLE, Form
from onnxsplit.planning.subject import Subject
from onnxsplit.stages.borders import round_trip
from onnxsplit.stages.chain import RunStage, StageFile, StageProcesses, run_chain
from onnxsplit.tensors import Array

_AUTO_SHARE = 0.5  # the share of the budget that examples may use: other inputs have larger errors than a few examples

Forms = Mapping[str, Form]
"""The narrower form of each narrowed tensor, by name."""


class BorderTrials:
    """Runs the stages of a cut on the example inputs, with tensors that went through a narrower form and back.

    Args:
        subject: the model, and the forms of its tensors.
        stages: the stages as they run without optimisation.
        run_stage: runs one of these stages.
    """

    def __init__(self, subject: Subject, stages: Sequence[StageFile], run_stage: RunStage) -> None:
        assert subject.borders is not None
        self._stages, self._run, self._forms = stages, run_stage, subject.borders
        self._examples = (subject.inputs, *subject.more_inputs)
        self._outputs = [name for name in subject.graph.outputs if name in subject.graph.producer]
        seen = {name for stage in stages for name in stage.inputs}.union(self._outputs)
        self._full = [{**one, **run_chain(stages, one, seen, run_stage)} for one in self._examples]
        self._errors: dict[frozenset[tuple[str, Form]], float] = {}

    @property
    def count(self) -> int:
        """The number of example inputs."""
        return len(self._examples)

    def chosen(self, wanted: Mapping[str, Sequence[Form]], limit: float) -> dict[str, Form]:
        """Choose a form for as many tensors as the error allows.

        Args:
            wanted: the narrower forms of each tensor, best first.
            limit: the budget of error for all inputs. The examples may use a part of it.
        """
        limit *= _AUTO_SHARE
        first = {name: forms[0] for name, forms in wanted.items()}
        if self.error(first) <= limit:
            return first
        chosen: dict[str, Form] = {}
        for name in sorted(wanted, key=lambda name: self._saved(name, wanted[name][0]), reverse=True):
            for form in wanted[name]:
                if self.error({name: form}) <= limit and self.error({**chosen, name: form}) <= limit:
                    chosen[name] = form
                    break
        return chosen

    def refused(self, limit: float) -> frozenset[tuple[str, Form]]:
        """The tensors and forms that break the budget by themselves, among those that were tried alone."""
        limit *= _AUTO_SHARE
        return frozenset(
            one for forms, error in self._errors.items() if len(forms) == 1 and error > limit for one in forms
        )

    def error(self, forms: Forms) -> float:
        """The error of the outputs with some tensors in narrower forms: the largest over all examples."""
        key = frozenset(forms.items())
        if key not in self._errors:
            answers = (self._answers(forms, full) for full in self._full)
            self._errors[key] = self._worst(answers)
        return self._errors[key]

    def error_of(self, inputs: Callable[[int], tuple[str, ...]], outputs: Callable[[int], tuple[str, ...]]) -> float:
        """The error of the outputs of the stages as they are now, with other inputs and outputs."""
        values = [dict(one) for one in self._examples]
        for index, stage in enumerate(self._stages):
            now = replace(stage, inputs=inputs(index), outputs=outputs(index))
            with StageProcesses(keep=True) as run_stage:  # one stage is loaded at a time
                for one in values:
                    one.update(run_stage(now, {name: one[name] for name in now.inputs}))
        return self._worst(values)

    def _worst(self, answers: Iterable[Mapping[str, Array]]) -> float:
        found = [
            distance(answer[name], full[name])
            for answer, full in zip(answers, self._full, strict=True)
            for name in self._outputs
        ]
        return min(UNUSABLE, max(found, default=0.0))

    def _answers(self, forms: Forms, full: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of one example; stages that read nothing changed do not run."""
        answers = {name: full[name] for name in self._outputs}
        read = dict(full)
        changed = set(forms)
        for name in forms:
            read[name] = self._narrow(forms, name, full[name])
        for stage in self._stages:
            if changed.isdisjoint(stage.inputs):
                continue
            written = self._run(stage, {name: read[name] for name in stage.inputs})
            for name, array in written.items():
                changed.add(name)
                read[name] = self._narrow(forms, name, array)
                if name in answers:
                    answers[name] = array
        return answers

    def _narrow(self, forms: Forms, name: str, array: Array) -> Array:
        return round_trip(forms[name], array, self._forms.rows[name]) if name in forms else array

    def _saved(self, name: str, form: Form) -> int:
        """The bytes that a form saves."""
        return self._forms.bytes(name, "float32") - self._forms.bytes(name, form)
