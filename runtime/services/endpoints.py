"""The endpoints of a user's class: what the gateway is told of them, and how the worker executes them."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from onnxsplit.errors import InputError, OnnxsplitError
from runtime.errors import PipelineError
from runtime.services.declare import ServiceDeclaration, ServiceModel, endpoints_of, steps_of
from runtime.services.messages import EndpointDescription, ServiceDescription
from runtime.services.parameters import Parameters, type_hints
from runtime.services.results import JSON, media_type, response_of
from runtime.services.threads import in_thread

_log = logging.getLogger("runtime.services")


class ServiceEndpoint:
    """An endpoint of a class.

    Args:
        name: the last part of its path; empty for the path of the service.
        title: its name in messages.
        method: the method that makes the arguments of a request's fields into a result.
        result: the method whose result that is, if another one.

    Raises:
        InputError: the method's parameters cannot be given by a request.
    """

    def __init__(
        self, name: str, title: str, method: Callable[..., Any], result: Callable[..., Any] | None = None
    ) -> None:
        self.name = name
        self.title = title
        self.parameters = Parameters(method, title)
        self._method = method
        self.summary = (inspect.getdoc(result or method) or "").partition("\n")[0]
        self._returns = type_hints(result or method, title).get("return", Any)

    async def respond(self, call: Callable[..., Any], request: Request) -> Response:
        """The response to a request.

        Args:
            call: the method of the service.
            request: the request.

        Raises:
            OnnxsplitError: the request is refused, or fails. Anything else that the user's code raises is logged.
            asyncio.CancelledError: the call was cancelled.
        """
        arguments = await self.parameters.arguments(request)
        try:
            return await response_of(await _result(call, arguments), self._returns)
        except OnnxsplitError:
            raise
        except HTTPException as error:
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        except BaseException as error:  # also what would end the process, such as sys.exit()
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            _log.exception("%s failed", self.title)
            name = type(error).__name__
            raise PipelineError(f"{self.title} failed with {name}; the server's log says more") from error

    def described(self, by_struct: Mapping[Any, dict[str, Any]]) -> EndpointDescription:
        """What the gateway is told; ``by_struct`` holds the JSON schemas of the types of requests and results."""
        kind = media_type(self._returns)
        schema = by_struct.get(self.result_type, {}) if kind == JSON else {}
        return EndpointDescription(self.name, self.summary, by_struct[self.parameters.struct], (kind, schema))

    @property
    def result_type(self) -> Any:
        """The type of the results, if msgspec has a JSON schema for it; None otherwise."""
        if media_type(self._returns) != JSON or self._returns is Any:
            return None
        try:
            msgspec.json.schema(self._returns)
            hash(self._returns)
        except (TypeError, ValueError):
            return None
        return self._returns


class Steps:
    """The only endpoint of a class with ``preprocess`` or ``postprocess``: both steps around its model.

    Args:
        made: the object of the class.
        model: its model.
    """

    def __init__(self, made: Any, model: ServiceModel) -> None:
        self._before, self._after = steps_of(made)
        self._model = model

    async def run(self, **arguments: Any) -> Any:
        """The result for the fields of a request."""
        inputs = await _result(self._before, arguments) if self._before is not None else arguments
        outputs = await self._model.arun(inputs)
        return outputs if self._after is None else await _result(partial(self._after, outputs), {})


async def _result(call: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What a method returns. A plain one runs in a thread."""
    if inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call):
        result = call(**arguments)
    else:
        result = await in_thread(call, **arguments)
    return await result if inspect.isawaitable(result) else result


def endpoints(declared: type) -> list[ServiceEndpoint]:
    """The endpoints of a class.

    Raises:
        InputError: a method's parameters cannot be given by a request.
    """
    found = endpoints_of(declared)
    if found:
        return [
            ServiceEndpoint(name, f"{declared.__name__}.{attribute}", getattr(declared, attribute))
            for name, attribute in sorted(found.items())
        ]
    before, after = steps_of(declared)
    return [ServiceEndpoint("", declared.__name__, before or _raw, after or before)]


def _raw(self: Any, inputs: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001  a method, as others are
    return inputs


def described(
    declared: type, declaration: ServiceDeclaration, folder: Path, found: Sequence[ServiceEndpoint]
) -> ServiceDescription:
    """What the gateway is told of a service.

    Args:
        declared: the class.
        declaration: what it declares.
        folder: the folder of its file, from which paths of models begin.
        found: its endpoints.
    """
    types = {one: None for each in found for one in (each.parameters.struct, each.result_type) if one is not None}
    template = f"#/components/schemas/{declared.__name__}.{{name}}"
    references, schemas = msgspec.json.schema_components(types, ref_template=template)
    by_struct = dict(zip(types, references, strict=True))
    return ServiceDescription(
        name=declared.__name__,
        path=declaration.path,
        models={name: str(folder / plan) for name, plan in declaration.models.items()},
        workers=declaration.workers,
        calls=declaration.calls,
        attempts=declaration.attempts,
        timeout=declaration.timeout,
        endpoints=[each.described(by_struct) for each in found],
        schemas={f"{declared.__name__}.{name}": schema for name, schema in schemas.items()},
    )


def make(declared: type, models: Mapping[str, ServiceModel]) -> Any:
    """Make the object of a service. Blocks as long as the user's constructor does."""
    parameters = list(inspect.signature(declared).parameters.values())
    if "models" in [parameter.name for parameter in parameters]:
        return declared(models=models)
    return declared(models) if parameters and parameters[0].default is inspect.Parameter.empty else declared()


def methods(made: Any, models: Mapping[str, ServiceModel]) -> dict[str, Callable[..., Any]]:
    """The endpoints of an object by name."""
    found = {name: getattr(made, attribute) for name, attribute in endpoints_of(type(made)).items()}
    return found or {"": Steps(made, next(iter(models.values()))).run}


def check_name(name: str | None, services: Mapping[str, type], file: Path) -> type:
    """The service of a name in a file; without a name, its only one.

    Raises:
        InputError: there is no such service, or there are several.
    """
    if name is not None and name in services:
        return services[name]
    unique = list(dict.fromkeys(services.values()))
    if name is None and len(unique) == 1:
        return unique[0]
    if not services:
        raise InputError(f"{file} has no service; mark a class with @service(...) from onnxsplit")
    have = ", ".join(services)
    raise InputError(
        f"{file} has no service {name!r}; it has {have}" if name else f"{file} has several services; add :NAME ({have})"
    )
