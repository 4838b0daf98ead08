"""One version of a model: a plan, and the pipeline that runs it while it is loaded.

model.plan/                      model "model", version 1
models/resnet/1/, .../2/         given as ``models/resnet``: model "resnet", versions 1 and 2
models/                          a repository: the models "resnet" and others
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from onnxsplit import __version__
from onnxsplit.errors import InputError, shown
from onnxsplit.plan import PLAN_FILE, Plan
from onnxsplit.plan_files import load_plan, plan_id
from runtime.gateway.batcher import Batcher, Checked
from runtime.gateway.counters import Counters
from runtime.gateway.errors import NotLoaded, client_message
from runtime.gateway.models.grace import ReadyGrace
from runtime.gateway.models.states import ModelStates
from runtime.gateway.openai.figures import RequestFigures
from runtime.gateway.protocol.documents import VersionState
from runtime.gateway.protocol.inference import DATATYPES, InferRequest, RequestedOutput, SequencePlace
from runtime.gateway.sequences import SequenceOptions, Sequences, SequenceStep
from runtime.pipeline import Pipeline
from runtime.recut.running_plan import RunningPlan
from runtime.text.text import Text

_STAGE_DIGITS = 6
_PLAN_DIGITS = 12  # of the identity of a plan, in a fingerprint

_NUMBER = re.compile("0|[1-9][0-9]{0,17}")  # of a version, as clients of Triton can ask for it

TEXT: Literal["text"] = "text"

Part = int | Literal["text"] | None
"""What a name stands for: a stage, the text of a model, or the model itself."""


@dataclass(eq=False)
class Version:
    """One version of a model.

    Attributes:
        model: Name of the model.
        number: Number of the version, a text as in the protocol.
        folder: Folder of the plan.
        plan: The plan.
        state: Whether the version takes requests.
        reason: Why it does not.
        counters: Counters since it was loaded.
        pipeline: The running pipeline; None when it is not loaded.
        batcher: Sends requests into the pipeline; None when no requests are taken.
        states: The states of the model; none before it is loaded.
        sequences: Keeps the states of sequences; None when it is not loaded.
        text: Completes texts; None when it is not loaded, and where the plan has no decoder or no tokenizer.
        text_problem: Why a loaded plan with a tokenizer has no text; empty when it has.
        text_figures: Figures of the texts since the server started.
        fingerprint: Names what answers: this package's version and the identity of the plan that was loaded. It stays
            when the plan changes, because the model is the same; so do cached responses.
        grace: For how long probes are told that it is ready while a stage has no node.
    """

    model: str
    number: str
    folder: Path
    plan: Plan
    state: VersionState = VersionState.UNAVAILABLE
    reason: str = "it was not loaded"
    counters: Counters = field(default_factory=Counters)
    pipeline: Pipeline | None = None
    batcher: Batcher | None = None
    states: ModelStates = field(default_factory=ModelStates)
    sequences: Sequences | None = None
    text: Text | None = None
    text_problem: str = ""
    text_figures: RequestFigures = field(default_factory=RequestFigures)
    fingerprint: str = ""
    grace: ReadyGrace = field(default_factory=ReadyGrace)

    @property
    def running(self) -> RunningPlan | None:
        """The plan that takes requests, with its nodes; None when none is loaded."""
        return self.pipeline.entrance.current if self.pipeline is not None else None

    def open_text(self) -> None:
        """Open the text of the pipeline that has started. Where that fails, the model serves tensors without it."""
        assert self.pipeline is not None
        self.text, self.text_problem = None, ""
        self.fingerprint = f"onnxsplit-{__version__}-{plan_id(self.plan.to_json())[:_PLAN_DIGITS]}"
        try:
            self.text = self.pipeline.text
        except Exception as error:
            self.text_problem = client_message(error)

    def open_sequences(self, options: SequenceOptions) -> None:
        """Take requests of sequences. Those that run go on if the pipeline was started again with the same plan."""
        if self.sequences is not None and self.sequences.plan != self.plan:
            self.end_sequences()
        self.sequences = self.sequences or Sequences(self.model, self.plan, self.states, options)

    def end_sequences(self) -> None:
        """End all sequences."""
        if self.sequences is not None:
            self.sequences.close()
        self.sequences = None

    @property
    def has_text(self) -> bool:
        """Whether the plan has a decoder and a tokenizer."""
        return self.plan.decoder is not None and self.plan.decoder.tokenizer is not None

    @property
    def batched(self) -> bool:
        """True when the first axis of every input and output is proven to be the batch axis."""
        names = (*self.plan.inputs, *self.plan.outputs)
        return bool(self.plan.inputs) and all(self.plan.tensors[name].batch_axis == 0 for name in names)

    @property
    def ready(self) -> bool:
        """Whether probes are told that it is ready: a request would be executed now, or once a lost node is back."""
        if self._why_stopped() is not None:
            return False
        assert self.pipeline is not None
        down = self._stages_without_node()
        complete = not down
        if any(all(node.state == "circuit open" for node in self.pipeline.nodes if node.stage == one) for one in down):
            return False  # its requests are refused, not held
        held = self.grace.holds(complete=complete, now_s=time.monotonic())
        return held and (not complete or self.pipeline.unreachable is None)

    def why_not(self) -> str | None:
        """Why a request would not be executed now; None when it would.

        The pipeline is asked first whether the threads that monitor its nodes still run. If they do not, the last known
        states of the nodes mean nothing.
        """
        if (stopped := self._why_stopped()) is not None:
            return stopped
        assert self.pipeline is not None
        if down := self._stages_without_node():
            return f"stage {', '.join(map(str, down))} has no node that is ready"
        return self.pipeline.unreachable

    def _why_stopped(self) -> str | None:
        """Why no request would be executed even if every stage had a node."""
        if self.state is not VersionState.READY or self.pipeline is None:
            return self.reason or "it is not loaded"
        return self.pipeline.trouble

    def _stages_without_node(self) -> list[int]:
        running = self.running
        assert running is not None
        up = {node.stage for node in running.coordinator.nodes() if node.state == "ready"}
        return [stage.index for stage in running.plan.stages if stage.index not in up]

    def requested(self, request: InferRequest) -> tuple[RequestedOutput, ...]:
        """The outputs that a request asks for, in its order.

        If it names none, these are all outputs; for a request of a sequence, all but the states.

        Raises:
            InputError: The model has no such output, or one is named twice.
        """
        if not request.outputs:
            left_out = self.states.outputs if request.sequence is not None else ()
            names = [name for name in self.plan.outputs if name not in left_out]
            return tuple(RequestedOutput(name, request.all_binary) for name in names)
        names = [output.name for output in request.outputs]
        unknown = [name for name in names if name not in self.plan.outputs]
        if unknown or len(set(names)) < len(names):
            what = f"has no output {shown(unknown[0])}" if unknown else "is asked for an output twice"
            raise InputError(f"model {self.model!r} {what}; it has {', '.join(self.plan.outputs)}")
        return request.outputs

    def join(self, place: SequencePlace | None) -> SequenceStep | None:
        """Take a turn in the line of a sequence; None where there is no sequence.

        Raises:
            NotLoaded: The version takes no requests.
            InputError: The model has no states that are known.
            Busy: Too many requests wait for those before them.
        """
        if place is None:
            return None
        if self.sequences is None:
            raise self._not_loaded()
        return self.sequences.join(place)

    def _not_loaded(self) -> NotLoaded:
        return NotLoaded(f"model {self.model!r} version {self.number} is not loaded: {self.reason}")

    def check(self, request: InferRequest, requested: Sequence[RequestedOutput]) -> tuple[Batcher, Checked | None]:
        """Check a request. Stages that no requested output needs will not run.

        Returns:
            The batcher that executes it, and what the batcher knows of it: None for a request of a sequence, which is
            checked with the states that it gets in its turn.

        Raises:
            NotLoaded: The version takes no requests.
            InputError: The request does not fit the model.
        """
        if self.batcher is None:
            raise self._not_loaded()
        if request.sequence is not None:
            return self.batcher, None
        names = {output.name for output in requested}
        outputs = tuple(name for name in self.plan.outputs if name in names)
        return self.batcher, self.batcher.check(request.inputs, outputs)


def stage_name(model: str, stage: int) -> str:
    """The name under which clients see a stage."""
    return f"{model}.stage{stage}"


def text_name(model: str) -> str:
    """The name under which clients see a model's text."""
    return f"{model}.{TEXT}"


def split_name(name: str, models: Iterable[str]) -> tuple[str, Part]:
    """The model that a name stands for, and the part of it."""
    if name in models:
        return name, None
    model, _, rest = name.rpartition(".")
    if rest == TEXT and model in models:
        return model, TEXT
    model, _, stage = name.rpartition(".stage")
    if len(stage) <= _STAGE_DIGITS and stage.isascii() and stage.isdecimal() and model in models:
        return model, int(stage)
    return name, None


class PlanPlace(NamedTuple):
    """Where a version of a model is found: its model, its number, and its plan directory."""

    model: str
    number: str
    folder: Path


def find_plans(folders: Iterable[Path]) -> list[PlanPlace]:
    """The plans in some folders, in the order of their versions.

    Each folder is a plan, or holds numbered plans, or is a repository: a folder of such folders.

    Raises:
        InputError: Two models have the same name.
    """
    places: list[PlanPlace] = []
    for folder in folders:
        for found in _models_in(folder):
            if any(place.model == found[0].model for place in places):
                name = found[0].model
                raise InputError(f"two plans would be served as model {name!r}; rename a folder, or make them versions")
            places += found
    return places


def _models_in(folder: Path) -> list[list[PlanPlace]]:
    """The versions of each model in a folder. A folder in which nothing is found counts as a plan."""
    if model := _versions_in(folder):
        return [model]
    models = [_versions_in(inner) for inner in _folders(folder)]
    return [model for model in models if model] or [[PlanPlace(_model_name(folder), "1", folder)]]


def _versions_in(folder: Path) -> list[PlanPlace]:
    """The versions of the model that a folder is; empty if it is none."""
    name = _model_name(folder)
    if (folder / PLAN_FILE).exists():
        return [PlanPlace(name, "1", folder)]
    numbered = sorted((one for one in _folders(folder) if _NUMBER.fullmatch(one.name)), key=lambda one: int(one.name))
    if not any((inner / PLAN_FILE).exists() for inner in numbered):
        return []
    return [PlanPlace(name, inner.name, inner) for inner in numbered]


def _folders(folder: Path) -> list[Path]:
    return (
        sorted(inner for inner in folder.iterdir() if inner.is_dir() and not inner.name.startswith("."))
        if folder.is_dir()
        else []
    )


def _model_name(folder: Path) -> str:
    whole = os.path.abspath(folder)  # noqa: PTH100  a link has a name of its own
    return Path(whole).name.removesuffix(".plan") or "model"


def find_versions(folders: Iterable[Path]) -> list[Version]:
    """The versions in some folders, which are as for :func:`find_plans`.

    Raises:
        OnnxsplitError: A folder holds no plan, a plan cannot be served, or two models have the same name.
    """
    return [read_version(place) for place in find_plans(folders)]


def is_empty(folders: Iterable[Path]) -> bool:
    """Whether all folders are there, and none holds a plan yet."""
    places = find_plans(folders)
    return all(place.folder.is_dir() and not (place.folder / PLAN_FILE).exists() for place in places)


def read_version(place: PlanPlace) -> Version:
    """The version in a place, not loaded.

    Raises:
        OnnxsplitError: There is no plan, or it cannot be served.
    """
    plan = load_plan(place.folder)
    _check_types(place.model, plan)
    return Version(place.model, place.number, place.folder, plan)


def _check_types(name: str, plan: Plan) -> None:
    for tensor in (*plan.inputs, *plan.outputs):
        dtype = plan.tensors[tensor].dtype
        if dtype not in DATATYPES:
            raise InputError(
                f"model {name!r}: tensor {tensor!r} has type {dtype}, which the Open Inference Protocol lacks; "
                f"allowed: {', '.join(DATATYPES)}"
            )
