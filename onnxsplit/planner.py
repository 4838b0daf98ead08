"""From a model to a plan directory: the offline half, end to end.

    examine -> partition -> stage files -> measure -> correct, and cut again -> plan

A plan directory appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from onnxsplit.cut_at import assignment_at
from onnxsplit.draft import Chooser, Draft
from onnxsplit.errors import PartitionError, PlanError
from onnxsplit.examine import Say, Subject, examine, silent
from onnxsplit.partitioner import Infeasible, fewest_stages, slice_orders
from onnxsplit.plan import (
    PLAN_FILE,
    Plan,
)
from onnxsplit.providers import gpu_count, providers_by_stage
from onnxsplit.session import threads_per_node
from onnxsplit.tensors import Array

DEFAULT_ROUNDS = 3


def partition(
    model: str | Path,
    *,
    stages: int | Literal["auto"] | None = None,
    out: str | Path | None = None,
    cut_at: Sequence[str] = (),
    max_memory: int | None = None,
    costs: str | None = None,
    dims: Mapping[str, int] | None = None,
    inputs: str | Path | Mapping[str, Array] | None = None,
    provider: str = "auto",
    rounds: int = DEFAULT_ROUNDS,
    say: Say = silent,
) -> Plan:
    """Cut a model into cost-balanced stages and write the plan directory.

    Args:
        model: the model file.
        stages: number of stages; ``auto`` for the fewest that fit ``max_memory``; the GPUs found, else 2, when None.
        out: the plan directory; ``MODEL.plan`` in the current folder when None. A plan there is replaced whole.
        cut_at: tensors to cut exactly at, instead of choosing.
        max_memory: bytes that no stage may exceed, by estimate: its weights and its largest sum of live activations.
        costs: ``measured`` or ``analytic``; None measures where the model runs here.
        dims: sizes of free dimensions that costs are taken at; the plan runs at any.
        inputs: example inputs, or an ``.npz`` with them.
        provider: as ``--provider``: one for all, ``auto``, or by stage.
        rounds: how often, at most, the real stages are run and the cut is corrected; 0 for never.
        say: told what is being done.

    Raises:
        PartitionError: the model cannot be cut as asked.
        PlanError: ``out`` is something other than a plan.
        ModelError, InputError, MissingDependency, ProviderError: as :func:`~onnxsplit.examine.examine`.
    """
    target = Path(out) if out is not None else default_target(Path(model))
    check_target(target)
    _check_request(stages, cut_at, max_memory)
    guess = stages if isinstance(stages, int) else gpu_count() or 2
    first = providers_by_stage(provider, guess)[0]
    threads = threads_per_node(guess)
    subject = examine(model, costs=costs, dims=dims, inputs=inputs, threads=threads, provider=first, say=say)
    return write_plan(
        subject, target, stages=stages, cut_at=cut_at, max_memory=max_memory, provider=provider, rounds=rounds, say=say
    )


def write_plan(
    subject: Subject,
    target: Path,
    *,
    stages: int | Literal["auto"] | None = None,
    cut_at: Sequence[str] = (),
    max_memory: int | None = None,
    provider: str = "auto",
    rounds: int = DEFAULT_ROUNDS,
    say: Say = silent,
) -> Plan:
    """Cut a model that was examined. The arguments are those of :func:`partition`."""
    check_target(target)
    _check_request(stages, cut_at, max_memory)
    choose, count = _chooser(subject, stages, cut_at, max_memory)
    providers = providers_by_stage(provider, count)
    with _new_folder(target) as folder:
        plan = Draft(subject, choose, providers, threads_per_node(count), folder, say).plan(rounds)
        (folder / PLAN_FILE).write_bytes(plan.to_json())
    return plan


def _check_request(stages: int | str | None, cut_at: Sequence[str], max_memory: int | None) -> None:
    if isinstance(stages, int) and stages < 1:
        raise PartitionError(f"{stages} stages were asked for; at least 1 is needed")
    if stages == "auto" and max_memory is None:
        raise PartitionError("the fewest stages that fit need a limit: give --max-memory SIZE with --stages auto")
    if cut_at and (stages is not None or max_memory is not None):
        raise PartitionError("--cut-at decides the stages; leave out --stages and --max-memory")


def _chooser(
    subject: Subject, stages: int | str | None, cut_at: Sequence[str], max_memory: int | None
) -> tuple[Chooser, int]:
    """How to assign atoms, and the number of stages that comes out."""
    if cut_at:
        fixed = assignment_at(subject, cut_at)
        return (lambda _: fixed), max(fixed) + 1
    largest = len(subject.atoms.ops)
    try:
        count = (
            fewest_stages(subject.problem(subject.costs.time_ns, max_memory))
            if stages == "auto"
            else int(stages)
            if stages is not None
            else min(gpu_count() or 2, largest)
        )
        if count > largest:
            raise PartitionError(
                f"{subject.graph.source.path} cannot be cut into {count} stages: its {len(subject.graph.ops)} ops form "
                f"{largest} parts that can be separated. Ask for {largest} stages or fewer"
            )
        slice_orders(subject.problem(subject.costs.time_ns, max_memory), count)
    except Infeasible:
        raise PartitionError(_too_little_memory(subject, max_memory or 0)) from None
    return (lambda op_ns: slice_orders(subject.problem(op_ns, max_memory), count)), count


def _too_little_memory(subject: Subject, max_memory: int) -> str:
    graph = subject.graph
    problem = subject.problem(subject.costs.time_ns)
    alone = [
        sum(weight.size_bytes for weight in problem.weights if atom in weight.readers)
        for atom in range(len(problem.time_ns))
    ]
    atom = max(range(len(alone)), key=alone.__getitem__)
    name = graph.ops[subject.atoms.ops[atom][0]].name
    try:
        fits = f"The fewest stages that fit are {fewest_stages(subject.problem(subject.costs.time_ns, max_memory))}"
    except Infeasible:
        fits = f"Allow more: op {name!r} alone holds {alone[atom]} bytes of weights, besides its tensors"
    return f"no cut keeps every stage within {max_memory} bytes. {fits}"


def default_target(model: Path) -> Path:
    """Where the plan of a model goes when nothing is said: ``MODEL.plan`` in the current folder."""
    return Path(f"{model.name.removesuffix('.onnx')}.plan")


def check_target(target: Path) -> None:
    """Refuse to write a plan over anything but a plan or an empty folder.

    Raises:
        PlanError: naming what is there.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise PlanError(f"{target} is there and is no folder; choose another place with -o DIR")
    if target.is_dir() and any(target.iterdir()) and not (target / PLAN_FILE).is_file():
        raise PlanError(f"{target} is there and holds no plan; nothing was touched. Choose another place with -o DIR")
    if not target.absolute().parent.is_dir():
        raise PlanError(
            f"the folder {target.absolute().parent} does not exist; create it or choose another with -o DIR"
        )


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that takes the target's place when all went well, and leaves no trace when not."""
    target = target.absolute()
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise PlanError(f"cannot write into {target.parent}: {error.strerror}") from error
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)
        old = folder.with_suffix(".old")
        if target.is_dir():
            target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise PlanError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
