"""Which ops of a model a provider takes, by asking it: ONNX Runtime tells which op it assigned to which provider.

A provider may also take every op and then fail to prepare the model. In this case, one op of each type is tried in a
model of its own, and the ops of the types that fail count as left to the CPU. A provider that leaves a single op to the
CPU may still take it beside others, so such types count only if none fails.

The question is asked in a process of its own, because providers run code of their makers. That process is this module
itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import onnx

from onnxsplit.cost.named_ops import named_op, renamed
from onnxsplit.custom_ops import Library
from onnxsplit.errors import ModelError, ModelRefused, ProviderError, in_one_line
from onnxsplit.model.external_data import point_from_one_folder
from onnxsplit.model.graph import Op, OpGraph, build_graph
from onnxsplit.model.in_memory import ModelFile
from onnxsplit.model.protobuf import graph_tensors
from onnxsplit.model.source import open_model
from onnxsplit.plan import TensorSpec
from onnxsplit.session import Session, open_session, quiet_environment
from onnxsplit.tensors import ONNX_TYPE_NUMBER


class Assignment(msgspec.Struct, frozen=True):
    """What a provider takes of a model.

    Attributes:
        left: the ops that it leaves to the CPU, by index.
        refused: why it does not run the model as a whole; None if it does.
        error: why it could not be asked; None if it was.
    """

    left: tuple[int, ...] = ()
    refused: str | None = None
    error: str | None = None


class _Question(msgspec.Struct, frozen=True):
    model: str
    data_folder: str | None
    provider: str
    threads: int
    custom_ops: tuple[Library, ...]
    tensors: dict[str, TensorSpec]


def ask_provider(
    file: ModelFile,
    provider: str,
    *,
    threads: int,
    custom_ops: Sequence[Library] = (),
    tensors: Mapping[str, TensorSpec] = {},
) -> Assignment:
    """Ask a provider which ops of a model it takes. The model is loaded, not run.

    Args:
        file: the model file.
        provider: the provider, as ``--provider`` names it.
        threads: threads of the session.
        custom_ops: libraries of custom ops that the session loads.
        tensors: types and shapes of the model's tensors, as far as they are known, for models of one op.

    Raises:
        ModelError: the provider could not be asked.
    """
    folder = None if file.data_folder is None else str(file.data_folder)
    question = _Question(str(file.path), folder, provider, threads, tuple(custom_ops), dict(tensors))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "onnxsplit.cost.assignment"],
        input=msgspec.json.encode(question),
        capture_output=True,
        env=quiet_environment(),
        check=False,
    )
    try:
        answer = msgspec.json.decode(done.stdout, type=Assignment)
    except msgspec.DecodeError as error:
        tail = done.stderr[-500:].decode(errors="replace").strip()
        raise ModelError(
            f"asking the provider {provider!r} about {file.path}: the process ended with {done.returncode}: {tail}"
        ) from error
    if answer.error is not None:
        raise ModelError(f"asking the provider {provider!r} about {file.path}: {answer.error}")
    return answer


def _answer(question: _Question) -> Assignment:
    data_folder = None if question.data_folder is None else Path(question.data_folder)
    graph = build_graph(open_model(question.model, data_folder=data_folder))
    try:
        session = _open(graph, renamed(graph), question)
    except (ModelRefused, ProviderError) as error:
        _open(graph, renamed(graph), msgspec.structs.replace(question, provider="cpu"))  # the model itself is good
        return Assignment(left=_of_failing_types(graph, question), refused=str(error))
    left = session.left_to_cpu or ()
    return Assignment(left=tuple(sorted(op for name, _ in left if (op := named_op(name)) is not None)))


def _of_failing_types(graph: OpGraph, question: _Question) -> tuple[int, ...]:
    """The ops of the types of which one op alone fails, or else is declined; all ops if neither happens to any."""
    kinds: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
    tried: set[tuple[str, str]] = set()
    for op in graph.ops:
        kind = (op.domain, op.op_type)
        alone = _alone(graph, op, question.tensors) if kind not in tried else None
        if alone is None or op.index in graph.constant_ops:
            continue
        tried.add(kind)
        try:
            _open(graph, alone, question)
        except (ModelRefused, ProviderError) as error:
            with suppress(ModelRefused):  # if the CPU refuses it too, the model of one op is at fault
                _open(graph, alone, msgspec.structs.replace(question, provider="cpu"))
                kinds[isinstance(error, ModelRefused)].add(kind)
    named = kinds[True] or kinds[False] or {(op.domain, op.op_type) for op in graph.ops}
    return tuple(op.index for op in graph.ops if (op.domain, op.op_type) in named)


def _alone(graph: OpGraph, op: Op, tensors: Mapping[str, TensorSpec]) -> onnx.ModelProto | None:
    """A model of one op and the constants that it reads; None if the type of an input is not known."""
    source = graph.source.proto
    model = onnx.ModelProto()
    model.CopyFrom(source)
    for part in (model.graph.node, model.graph.input, model.graph.output, model.graph.initializer):
        del part[:]
    del model.graph.value_info[:]
    needed = list(_with_constants(graph, op))
    model.graph.node.extend(one.node for one in needed)
    written = {name for one in needed for name in one.outputs}
    read = {name for one in needed for name in one.reads} - written
    model.graph.initializer.extend(tensor for tensor in source.graph.initializer if tensor.name in read)
    for name in sorted(read - graph.constants.keys()):
        spec = tensors.get(name)
        if spec is None or spec.dtype not in ONNX_TYPE_NUMBER:
            return None
        shape = None if spec.shape is None else [None if dim == "?" else dim for dim in spec.shape]
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, ONNX_TYPE_NUMBER[spec.dtype], shape))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in op.outputs)
    model.ir_version = max(model.ir_version, 4)  # below, every initializer is an input
    return model


def _with_constants(graph: OpGraph, op: Op) -> Iterator[Op]:
    """The op, after the ops that compute the constants that it reads, each once."""
    needed, pending = {op.index}, [op]
    while pending:
        for name in pending.pop().reads:
            writer = graph.producer.get(name)
            if writer is not None and writer in graph.constant_ops and writer not in needed:
                needed.add(writer)
                pending.append(graph.ops[writer])
    return (graph.ops[index] for index in sorted(needed))


def _open(graph: OpGraph, model: onnx.ModelProto, question: _Question) -> Session:
    data_folder = point_from_one_folder(graph.source.place, graph_tensors(model.graph))
    return open_session(
        model.SerializeToString(),
        threads=question.threads,
        level="basic",  # it keeps the names of the ops
        provider=question.provider,
        external_data_folder=data_folder,
        custom_ops=question.custom_ops,
    )


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # other output must not mix with the answer
    try:
        answer = _answer(msgspec.json.decode(sys.stdin.buffer.read(), type=_Question))
    except Exception as error:  # such as no memory left; the parent reports it in one line
        answer = Assignment(error=in_one_line(error))
    answers.write(msgspec.json.encode(answer))
    answers.flush()


if __name__ == "__main__":
    _main()
