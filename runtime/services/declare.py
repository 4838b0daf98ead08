"""How a user declares a service: a class with endpoints, and the models that it asks. Imports nothing heavy.

@service(models={"reader": "reader.plan"}, workers=2)
class TextReader:
    def __init__(self, models: Models) -> None:
        self.reader = models["reader"]

    @endpoint
    def read(self, image: bytes) -> dict[str, str]:
        outputs = self.reader.run(preprocess(image))
        return {"text": decode(outputs["y"])}
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

from onnxsplit.errors import InputError, shown
from onnxsplit.numbers import MOST_SECONDS, whole_problem
from onnxsplit.tensors import Array

MOST_WORKERS = 256
"""The most worker processes of a service."""

MOST_CALLS = 1024
"""The most calls that a worker executes at once."""

_PATH = re.compile(r"/[A-Za-z0-9._~-]+(?:/[A-Za-z0-9._~-]+)*")
_NAME = re.compile(r"[A-Za-z0-9._~-]+")
_RESERVED = ("v1", "v2", "metrics", "events", "example", "slowest", "openapi.json", "tokenize", "detokenize")
_DECLARATION = "__onnxsplit_service__"
_ENDPOINT = "__onnxsplit_endpoint__"
_STEPS = ("preprocess", "postprocess")

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


class ServiceModel(Protocol):
    """A model as a service sees it."""

    def run(self, inputs: Any, *, outputs: Any = None, timeout: float | None = None) -> dict[str, Array]:
        """Run one request and wait for its outputs; as :meth:`runtime.pipeline.Pipeline.run`."""

    async def arun(self, inputs: Any, *, outputs: Any = None, timeout: float | None = None) -> dict[str, Array]:
        """Run one request from an ``async def`` endpoint."""


Models = Mapping[str, ServiceModel]
"""The models of a service, by the names that it gives them."""


@dataclass(frozen=True, kw_only=True)
class ServiceDeclaration:
    """What a class declares of itself as a service; the attributes are the arguments of :func:`service`."""

    path: str
    models: Mapping[str, Path]
    workers: int
    calls: int
    attempts: int
    timeout: float | None


def service(
    _bare: None = None,
    /,
    *,
    models: Mapping[str, str | Path] | None = None,
    path: str | None = None,
    workers: int = 1,
    calls: int = 8,
    attempts: int = 2,
    timeout: float | None = None,
) -> Callable[[C], C]:
    """Declare a class as a service, for ``onnxsplit serve FILE.py:NAME``.

    Each worker process makes one object of the class. The constructor gets the models if it has a parameter ``models``,
    or a first one without a default. A method ``close`` is called when the worker ends.

    A class without endpoints, but with a method ``preprocess`` or ``postprocess`` and one model, has one endpoint at
    its path: ``preprocess`` makes the model's inputs of the fields of a request, and ``postprocess`` makes the result
    of its outputs.

    Args:
        models: the plans that it asks, by the names that it uses; paths are relative to the folder of the class's file.
            The server also serves them below /v2.
        path: the path of its endpoints; None for the class's name in lower case: ``/text-reader`` for ``TextReader``.
        workers: number of worker processes.
        calls: the most calls that a worker executes at once, each in a thread or in the worker's event loop.
        attempts: a call is given up once it has been in this many workers that died; 1 repeats nothing, for endpoints
            that must not run twice.
        timeout: seconds after which a call that has not begun to answer is given up; None for no limit. A worker that
            does not stop executing the call is ended.

    Raises:
        InputError: an argument is invalid, or the class has no endpoint.
    """
    if _bare is not None:
        raise InputError("@service is a call: write @service(), or @service(models={...})")

    def declare(declared: C) -> C:
        if not isinstance(declared, type):
            raise InputError(f"@service is for classes, not for {shown(declared)}")
        given = ServiceDeclaration(
            path=path if path is not None else "/" + _dashed(declared.__name__),
            models={name: Path(plan) for name, plan in (models or {}).items()},
            workers=workers,
            calls=calls,
            attempts=attempts,
            timeout=timeout,
        )
        _check(declared, given)
        setattr(declared, _DECLARATION, given)
        return declared

    return declare


@overload
def endpoint(function: F) -> F: ...


@overload
def endpoint(*, name: str | None = None) -> Callable[[F], F]: ...


def endpoint(function: Any = None, *, name: str | None = None) -> Any:
    """Declare a method of a service as an endpoint: ``POST PATH/NAME``.

    Its parameters, which need types, are the fields of a request: of a JSON object (``bytes`` in base64), of a form
    with files, or of the query; a single parameter of type ``bytes`` can be the whole body. The result becomes JSON, or
    the body itself for ``bytes``, ``str``, pictures, and responses of Starlette. An iterator becomes a stream of
    server-sent events, or of bytes if the method returns ``Iterator[bytes]``.

    Args:
        function: the method; a plain one runs in a thread, an ``async def`` in the worker's event loop.
        name: the last part of its path; None for the method's name.

    Raises:
        InputError: the name cannot be part of a path.
    """

    def declare(method: F) -> F:
        if isinstance(method, staticmethod | classmethod | property):
            raise InputError(f"@endpoint is for methods of objects, not for a {type(method).__name__}")
        given = method.__name__ if name is None else name
        if not _NAME.fullmatch(given):
            raise InputError(f"the endpoint's name {shown(given)} may have letters, digits, '-', '.', '_' and '~' only")
        setattr(method, _ENDPOINT, given)
        return method

    return declare if function is None else declare(function)


def declaration_of(declared: type) -> ServiceDeclaration | None:
    """What a class declares; None if it is not a service. What a base class declares does not count."""
    found: ServiceDeclaration | None = vars(declared).get(_DECLARATION)
    return found


def endpoints_of(declared: type) -> dict[str, str]:
    """The names of the methods that are endpoints of a class, by the last part of their paths.

    Raises:
        InputError: two have the same name, or one has no object.
    """
    found: dict[str, str] = {}
    for attribute in dir(declared):
        method = inspect.getattr_static(declared, attribute)
        inner = getattr(method, "__func__", method)  # of a static or class method
        name = getattr(inner, _ENDPOINT, None) if callable(inner) else None
        if name is None:
            continue
        if inner is not method:
            raise InputError(f"{declared.__name__}.{attribute} is a {type(method).__name__}; an endpoint is a method")
        if found.setdefault(name, attribute) != attribute:
            raise InputError(f"{declared.__name__} has two endpoints {name!r}: {found[name]} and {attribute}")
    return found


def steps_of(declared: type) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """The methods ``preprocess`` and ``postprocess`` of a class without endpoints; None where it has none."""
    before, after = (getattr(declared, name, None) for name in _STEPS)
    return before, after


def _dashed(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


def _check(declared: type, given: ServiceDeclaration) -> None:
    problems = [
        whole_problem("workers", given.workers, 1, MOST_WORKERS),
        whole_problem("calls", given.calls, 1, MOST_CALLS),
        whole_problem("attempts", given.attempts, 1, MOST_CALLS),
    ]
    if given.timeout is not None and not (isinstance(given.timeout, int | float) and 0 < given.timeout <= MOST_SECONDS):
        problems.append(f"timeout must be seconds above 0 and at most {MOST_SECONDS:g}, not {shown(given.timeout)}")
    if not _PATH.fullmatch(given.path) or given.path.split("/")[1] in _RESERVED:
        problems.append(
            f"the path {shown(given.path)} is not one that a service can have: a / and letters, digits, '-', '.', '_' "
            f"or '~', and not below /{', /'.join(_RESERVED)}"
        )
    if not endpoints_of(declared):
        if not any(steps_of(declared)):
            problems.append("it has no endpoint; mark a method with @endpoint, or write preprocess and postprocess")
        elif len(given.models) != 1:
            problems.append(
                f"preprocess and postprocess are steps around one model, and it has {len(given.models)}; mark a method "
                "with @endpoint that asks them"
            )
    found = [problem for problem in problems if problem]
    if found:
        raise InputError(f"the service {declared.__name__} cannot be declared: {'; '.join(found)}")
