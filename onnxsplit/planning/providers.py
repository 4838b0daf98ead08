"""What unlike providers mean for a cut: which ops each of them takes, and how fast it runs the model."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from onnxsplit.cost.assignment import ask_provider
from onnxsplit.errors import ModelError
from onnxsplit.model.graph import build_graph
from onnxsplit.model.in_memory import ModelFile, runnable
from onnxsplit.model.source import open_model
from onnxsplit.npz import save_npz
from onnxsplit.plan import Plan, ProviderUse, Stage
from onnxsplit.planning.subject import Subject
from onnxsplit.planning.target import ProviderFacts, Target
from onnxsplit.progress import Say
from onnxsplit.providers import CPU, parse_provider, provider_here
from onnxsplit.timed import TimedModel

_TURNS, _TURN_SECONDS = 4, 0.15  # how often the model runs on each of two providers in turn, and how long


def reference_provider(providers: Sequence[str], *, in_cluster: bool) -> str:
    """The provider that costs are measured on.

    Args:
        providers: the provider of each device.
        in_cluster: True for the devices of a cluster: their speeds are relative to the first one.
    """
    return "cpu" if "cpu" in providers and not in_cluster else provider_here(providers[0])


def with_providers(subject: Subject, target: Target, say: Say) -> Target:
    """Ask the providers of the devices about a model: which ops they take, and how fast they run it as a whole.

    Only providers of this host are asked, and only for a model whose costs are measured. Devices without a cluster get
    the measured speeds; those of a cluster keep theirs.

    Args:
        subject: the model; its costs are those of the :func:`reference_provider`.
        target: the devices.
        say: called with each step.
    """
    if subject.costs.source != "measured":
        return target
    providers = [device.provider for device in target.devices]
    first = reference_provider(providers, in_cluster=target.cluster is not None)
    texts = dict.fromkeys((first, *providers))
    here = [text for text in texts if provider_here(text) == text]
    if not any(_asked(text) for text in here):
        return target
    threads = target.devices[0].threads
    facts: dict[str, ProviderFacts] = {}
    with (
        runnable(subject.graph.source, as_in_stages=True) as file,
        tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder,
    ):
        inputs = Path(folder) / "inputs.npz"
        save_npz(inputs, subject.inputs)
        for text in here:
            known = ProviderFacts()
            if _asked(text):
                say(f"asking {text} which ops it takes")
                found = ask_provider(
                    file, text, threads=threads, custom_ops=subject.custom_ops, tensors=subject.shapes.specs
                )
                known = ProviderFacts(left=frozenset(found.left), refused=found.refused)
            if text != first and known.refused is None:
                say(f"timing the model on {text} and {first} in turn")
                whole_ns, first_ns = _in_turn(subject, file, inputs, (text, first), threads)
                known = replace(known, whole_ns=whole_ns, speed=first_ns / whole_ns)
            elif text == first:
                known = replace(known, whole_ns=subject.costs.whole_ns)
            facts[text] = known
    if target.cluster is None:
        devices = tuple(replace(d, speed=facts[d.provider].speed) for d in target.devices if d.provider in facts)
        target = replace(target, devices=devices if len(devices) == len(target.devices) else target.devices)
    return replace(target, facts=facts)


def _asked(text: str) -> bool:
    """Whether a provider may leave ops to another one: all may but the CPU."""
    return parse_provider(text).name != CPU


def _in_turn(
    subject: Subject, file: ModelFile, inputs: Path, providers: tuple[str, str], threads: int
) -> tuple[int, int]:
    """Time of one run of the model on each of two providers, in nanoseconds, measured in turn."""

    def opened(provider: str) -> TimedModel:
        return TimedModel(
            file.path,
            inputs,
            threads=threads,
            level=subject.costs.level,
            provider=provider,
            data_folder=file.data_folder,
            custom_ops=subject.custom_ops,
        )

    times: tuple[list[int], list[int]] = ([], [])
    with opened(providers[0]) as one, opened(providers[1]) as other:
        for model in (one, other):
            model.run(_TURN_SECONDS / 2)
        for _ in range(_TURNS):
            for model, taken in zip((one, other), times, strict=True):
                taken.append(model.run(_TURN_SECONDS).cost_ns)
    return min(times[0]), min(times[1])


def with_assignment(plan: Plan, folder: Path, subject: Subject, target: Target, say: Say) -> Plan:
    """Add to a plan what its providers leave to the CPU: of the whole model, and of each stage.

    Args:
        plan: the plan.
        folder: the folder of its stage files.
        subject: the model that the plan was made from.
        target: the devices, after :func:`with_providers`.
        say: called with each step.

    Raises:
        ModelError: a provider does not take a stage.
    """
    used = dict.fromkeys(stage.provider for stage in plan.stages)
    facts = {text: target.facts[text] for text in used if text in target.facts}
    if not any(map(_asked, facts)):
        return plan
    ops = subject.graph.ops
    stages = []
    for stage in plan.stages:
        if stage.provider in facts and _asked(stage.provider):
            say(f"asking {stage.provider} which ops of stage {stage.index} it takes")
            stage = msgspec.structs.replace(stage, left_to_cpu=_left_of_stage(stage, folder, subject))
        stages.append(stage)
    uses = tuple(
        ProviderUse(
            provider=text,
            whole_time_ns=known.whole_ns,
            left_to_cpu=_counted(ops[index].op_type for index in known.left),
            refused=known.refused,
        )
        for text, known in facts.items()
    )
    return msgspec.structs.replace(plan, stages=tuple(stages), providers=uses)


def _left_of_stage(stage: Stage, folder: Path, subject: Subject) -> dict[str, int]:
    graph = build_graph(open_model(folder / stage.file))
    libraries = tuple(library for library in subject.custom_ops if library.name in stage.custom_ops)
    found = ask_provider(ModelFile(folder / stage.file), stage.provider, threads=stage.threads, custom_ops=libraries)
    if found.refused is not None:
        raise ModelError(f"stage {stage.index} does not run on {stage.provider}: {found.refused}")
    return _counted(graph.ops[index].op_type for index in found.left)


def _counted(op_types: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(op_types).items()))


def types_left(subject: Subject, left: Iterable[int]) -> tuple[str, ...]:
    """The op types of which a provider leaves every op to the CPU, sorted.

    A cluster file names op types only. A type of which the provider takes some ops is not among them.
    """
    left = frozenset(left)
    taken = {op.op_type for op in subject.graph.ops if op.index not in left}
    return tuple(sorted({subject.graph.ops[index].op_type for index in left} - taken))
