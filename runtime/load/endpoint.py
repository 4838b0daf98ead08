"""Where a load is sent: a server by its URL, or a plan that runs in this process; and what its stages did meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from onnxsplit.errors import InputError
from onnxsplit.npz import load_npz
from onnxsplit.plan import Plan
from onnxsplit.plan_base import PlanStruct
from onnxsplit.plan_files import example_file, load_plan
from runtime.gateway.models.metadata import dims
from runtime.gateway.protocol.documents import TensorMetadata
from runtime.gateway.protocol.inference import DATATYPES
from runtime.load.grpc import GrpcServer, GrpcTarget
from runtime.load.http import HttpServer, HttpTarget
from runtime.load.pipeline import PipelineTarget
from runtime.load.request_data import request_inputs
from runtime.load.served_model import ModelServer, ServedModel, Spent, choose_model, spent
from runtime.load.target import LoadTarget
from runtime.load.text import TextTarget, prompts, text_model
from runtime.pipeline import Pipeline


class Asked(PlanStruct, frozen=True, kw_only=True):
    """What each request of a load asks for.

    Attributes:
        model: the model's name; None for the only one.
        data: files of inputs, or ``random`` or ``zero``; empty for ``random``, and for a plan its example inputs.
        shapes: sizes of inputs with free dimensions, by name.
        batch: number of rows of a request; None for one, where the model has a batch axis.
        headers: headers of every request, by name.
        chat: for texts: whether to ask for an answer to a conversation, or for a continuation.
        prompt_words: for texts: number of words of a prompt that is made up.
        text_options: for texts: further fields of every request.
    """

    model: str | None = None
    data: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = msgspec.field(default_factory=dict)
    batch: int | None = None
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    chat: bool = True
    prompt_words: int = 64
    text_options: Mapping[str, Any] = msgspec.field(default_factory=dict)


class Endpoint(PlanStruct, frozen=True, kw_only=True):
    """Where a load is sent.

    Attributes:
        name: what it is, for people.
        target: what sends the requests.
        spent: says what the model and its stages have done so far; an empty list where nobody knows.
    """

    name: str
    target: LoadTarget
    spent: Callable[[], list[Spent]]


def is_url(where: str) -> bool:
    """Whether a text is a URL, and not a folder."""
    return "://" in where


def server_endpoint(url: str, asked: Asked) -> Endpoint:
    """A server.

    Args:
        url: ``http://HOST:PORT`` for the Open Inference Protocol over HTTP, ``grpc://HOST:PORT`` over gRPC,
            ``http://HOST:PORT/v1`` for OpenAI's API; ``https`` and ``grpcs`` use TLS.
        asked: what requests ask for.

    Raises:
        InputError: the URL is another one, there is no such model, or inputs do not fit it.
        PipelineError: the server does not answer.
        MissingDependency: a package is missing.
    """
    try:
        parts = urlsplit(url)
        secure, known = parts.scheme in ("https", "grpcs"), bool(parts.hostname)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname  # IPv6
        address = f"{host}:{parts.port or (443 if secure else 8001)}"
    except ValueError as error:
        raise InputError(f"{url} is not a URL: {error}") from None
    if parts.username is not None or parts.query or parts.fragment:
        raise InputError(
            f"the URL of a server is {parts.scheme}://{parts.hostname}:PORT, without a user, '?' or '#'; what it asks "
            "for is given with --header"
        )
    path = parts.path.rstrip("/")
    target: LoadTarget
    base = f"{parts.scheme}://{parts.netloc}"
    if known and parts.scheme in ("http", "https") and path in ("", "/v2"):
        server: ModelServer = HttpServer(base, asked.headers)
        model = choose_model(server, base, asked.model)
        inputs = request_inputs(model, asked.data, shapes=asked.shapes, batch=asked.batch)
        target = HttpTarget(base, model.name, inputs, asked.headers)
    elif known and parts.scheme in ("http", "https") and path == "/v1":
        name = text_model(f"{base}/v1", asked.model, asked.headers)
        bodies = prompts(asked.data, words=asked.prompt_words)
        target = TextTarget(base, name, bodies, chat=asked.chat, options=asked.text_options, headers=asked.headers)
        return Endpoint(name=f"{name} at {base}/v1", target=target, spent=list)
    elif known and parts.scheme in ("grpc", "grpcs") and not path:
        server = GrpcServer(address, secure=secure, headers=asked.headers)
        model = choose_model(server, url, asked.model)
        inputs = request_inputs(model, asked.data, shapes=asked.shapes, batch=asked.batch)
        target = GrpcTarget(address, model.name, inputs, secure=secure, headers=asked.headers)
    else:
        raise InputError(
            f"{url} is not the address of a server; give http://HOST:PORT, grpc://HOST:PORT, or http://HOST:PORT/v1 "
            "for texts"
        )
    return Endpoint(name=f"{model.name} at {url}", target=target, spent=lambda: spent(server, model))


@contextmanager
def plan_endpoint(
    folder: Path, asked: Asked, *, closed: Callable[[Pipeline], None] = lambda _: None, **options: Any
) -> Iterator[Endpoint]:
    """A plan, whose nodes are started and which is driven without a network between.

    Args:
        folder: the plan directory.
        asked: what requests ask for.
        closed: called with the pipeline after it was closed.
        options: how to run the plan; the attributes of :class:`~runtime.options.RunOptions`.

    Raises:
        InputError: the plan has a decoder, or inputs do not fit it.
        PlanError, LaunchFailed: as for :meth:`~runtime.pipeline.Pipeline.launch`.
    """
    plan = load_plan(folder)
    if plan.decoder is not None:
        raise InputError(
            f"{folder} has a decoder, whose texts are asked for through a server: run 'onnxsplit serve {folder}' and "
            "send load to http://127.0.0.1:8000/v1"
        )
    inputs = plan_inputs(folder, plan, asked)
    with Pipeline.launch(folder, **options) as pipeline:
        yield Endpoint(
            name=f"{folder} in this process",
            target=PipelineTarget(pipeline, inputs),
            spent=lambda: _spent_by_stages(pipeline),
        )
    closed(pipeline)


def plan_inputs(folder: Path, plan: Plan, asked: Asked) -> Sequence[Mapping[str, Any]]:
    """The inputs of requests for a plan: its example inputs where no others are asked for."""
    if not (asked.data or asked.shapes or asked.batch):
        return [load_npz(example_file(folder, plan))]
    needed = [name for name in plan.inputs if name not in plan.defaults]
    specs = tuple(
        TensorMetadata(name, DATATYPES.get(plan.tensors[name].dtype, "INVALID"), dims(plan, name)) for name in needed
    )
    model = ServedModel(name=plan.model.name, inputs=specs, batched=False, stages=())
    return request_inputs(model, asked.data, shapes=asked.shapes, batch=asked.batch)


def _spent_by_stages(pipeline: Pipeline) -> list[Spent]:
    """What each stage has done so far, all its nodes together."""
    stats = pipeline.stats()
    found = []
    for stage in sorted({node.stage for node in stats}):
        nodes = [node for node in stats if node.stage == stage]
        queue, run = sum(node.waited_ns for node in nodes), sum(node.ran_ns for node in nodes)
        found.append(
            Spent(
                name=f"stage {stage}",
                count=sum(node.requests for node in nodes),
                queue_ns=queue,
                compute_ns=run,
                total_ns=queue + run,
                failed=sum(node.failures for node in nodes),
            )
        )
    return found
