"""A worker process of a service: it reads the user's file, makes the object, and executes calls.

``python -P -m runtime.services.worker DESCRIPTOR FILE [NAME]``, where the descriptor is that of the socket to the
gateway. The process ends when the gateway closes the socket, or is gone.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from starlette.requests import Request

from onnxsplit.errors import InputError, OnnxsplitError, one_line
from onnxsplit.tensors import Array
from runtime.errors import PipelineClosed, PipelineError
from runtime.services.declare import declaration_of
from runtime.services.endpoints import ServiceEndpoint, check_name, described, endpoints, make, methods
from runtime.services.messages import (
    PART_BYTES,
    Ask,
    AskFailed,
    AskOutputs,
    Begin,
    CallEnded,
    CallEndpoint,
    CancelCall,
    Channel,
    Described,
    Drop,
    More,
    ResponseHead,
    ResponsePart,
    ServiceDescription,
    ToWorker,
    Unusable,
    Up,
    error_of,
    kind_of,
    short,
)
from runtime.services.models import GatewayModel
from runtime.services.threads import in_thread
from runtime.wire.codec import decode_tensors, encode_tensors

_GRACE_S = 5.0
_STATUSES = range(200, 600)
_BREAKS = re.compile(rb"[\r\n\0]")


def load_service(file: Path, name: str | None) -> type:
    """Execute a user's file; returns the service of a name, or its only one.

    Raises:
        InputError: the file has no such service.
        BaseException: whatever the file raises.
    """
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is not a file of Python code")
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and declaration_of(value) is not None
    }
    return check_name(name, found, file)


class _Worker:
    """The worker, within its event loop."""

    def __init__(
        self, channel: Channel, declared: type, description: ServiceDescription, found: Sequence[ServiceEndpoint]
    ) -> None:
        self._channel = channel
        self._declared = declared
        self._description = description
        self._endpoints: dict[str, ServiceEndpoint] = {each.name: each for each in found}
        self._made: Any = None
        self._methods: Mapping[str, Callable[..., Any]] = {}
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._taken: dict[int, asyncio.Event] = {}  # the client has taken the last part of a response
        self._asks: dict[int, asyncio.Future[dict[str, Array]]] = {}
        self._numbers = itertools.count()

    async def run(self) -> None:
        """Work until the gateway closes the socket."""
        calls = self._description.calls
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(calls, thread_name_prefix="call"))
        limiter = current_default_thread_limiter()  # of the threads of streams
        limiter.total_tokens = max(limiter.total_tokens, calls)
        self._channel.send(Described(self._description))
        making: asyncio.Task[None] | None = None
        while (received := await self._channel.receive()) is not None:
            message, frames = received
            if isinstance(message, Begin):
                making = asyncio.ensure_future(self._make(message.models))
            elif isinstance(message, CallEndpoint):
                task = self._calls[message.call] = asyncio.ensure_future(self._respond(message, frames[0]))
                task.add_done_callback(partial(self._end, message))
            else:
                self._told(message, frames)
        if making is not None:
            making.cancel()
        if callable(close := getattr(self._made, "close", None)):
            await in_thread(close)

    def _told(self, message: More | CancelCall | AskOutputs | AskFailed, frames: list[bytes]) -> None:
        if isinstance(message, More):
            if (taken := self._taken.get(message.call)) is not None:
                taken.set()
        elif isinstance(message, CancelCall):
            if (task := self._calls.get(message.call)) is not None:
                task.cancel()
        elif (answer := self._asks.pop(message.ask, None)) is not None and not answer.done():
            if isinstance(message, AskFailed):
                answer.set_exception(error_of(message.kind, message.message))
            else:
                answer.set_result(decode_tensors(message.heads, frames, _nowhere))

    async def _make(self, folders: Mapping[str, str]) -> None:
        """Make the user's object."""
        loop = asyncio.get_running_loop()
        try:
            models = {name: GatewayModel(name, Path(folder), self._ask, loop) for name, folder in folders.items()}
            self._made = await in_thread(make, self._declared, models)
            self._methods = methods(self._made, models)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self._channel.send(Unusable(short(f"{self._description.name} cannot be made: {_named(error)}")))
            return
        self._channel.send(Up())

    def _end(self, call: CallEndpoint, task: asyncio.Task[None]) -> None:
        """Tell the gateway that a call is over, so that another one can have its place."""
        self._calls.pop(call.call, None)
        self._taken.pop(call.call, None)
        if task.cancelled():
            ended = CallEnded(call.call, "Cancelled", "the call was cancelled")
        elif (error := task.exception()) is None:
            ended = CallEnded(call.call)
        elif isinstance(error, OnnxsplitError):
            ended = CallEnded(call.call, kind_of(error), short(str(error)))
        else:  # of a stream, whose head was sent
            traceback.print_exception(error)
            title = self._endpoints[call.endpoint].title
            ended = CallEnded(call.call, "PipelineError", f"{title} failed with {type(error).__name__}")
        self._channel.send(ended)

    async def _respond(self, call: CallEndpoint, body: bytes) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            await self._forward(call.call, message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": call.path,
            "raw_path": call.path.encode(),
            "query_string": call.query,
            "headers": call.headers,
        }
        request = Request(scope, receive)
        response = await self._endpoints[call.endpoint].respond(self._methods[call.endpoint], request)
        await response(scope, receive, send)

    async def _forward(self, number: int, message: Any) -> None:
        """Send a part of a response to the gateway. The next part waits until the client has taken this one."""
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            if message["status"] not in _STATUSES or any(_BREAKS.search(part) for pair in headers for part in pair):
                raise PipelineError(
                    f"a response with the status {message['status']}, or with a header of several lines; HTTP has "
                    "neither here"
                )
            self._channel.send(ResponseHead(number, message["status"], headers))
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        for start in range(0, max(1, len(body)), PART_BYTES):
            part = body[start : start + PART_BYTES]
            goes_on = more or start + PART_BYTES < len(body)
            taken = self._taken[number] = asyncio.Event()
            self._channel.send(ResponsePart(number, goes_on), [part])
            if goes_on:
                await taken.wait()

    async def _ask(
        self, model: str, inputs: dict[str, Array], outputs: tuple[str, ...] | None, timeout_ns: int | None
    ) -> dict[str, Array]:
        """Ask the gateway for a model's outputs."""
        number = next(self._numbers)
        heads, frames = encode_tensors(inputs)
        answer = self._asks[number] = asyncio.get_running_loop().create_future()
        self._channel.send(Ask(number, model, outputs, timeout_ns, heads), frames)
        try:
            found: dict[str, Array] = await answer
            return found
        except asyncio.CancelledError:
            self._channel.send(Drop(number))
            raise
        finally:
            self._asks.pop(number, None)


def _nowhere(*_: Any) -> Array:
    raise PipelineClosed("a worker has no shared memory")


def _named(error: BaseException) -> str:
    if isinstance(error, OnnxsplitError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] in ("runtime", "onnxsplit"):
        return f"{one_line(error)}: packages of these names are those of onnxsplit; rename yours"
    return f"{type(error).__name__}: {one_line(error)}"


def _end_with_gateway(connection: socket.socket) -> None:
    """End the process and all that it has started when the gateway is gone, even if the event loop is blocked."""
    poll = select.poll()
    poll.register(connection, 0)  # only that the other end was closed
    poll.poll()
    time.sleep(_GRACE_S)
    os.killpg(0, signal.SIGKILL)


async def _main(connection: socket.socket, file: Path, loaded: type | BaseException) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    channel = Channel(reader, writer, ToWorker)
    try:
        if isinstance(loaded, BaseException):
            raise loaded
        declaration = declaration_of(loaded)
        assert declaration is not None
        found = endpoints(loaded)
        worker = _Worker(channel, loaded, described(loaded, declaration, file.parent, found), found)
        await worker.run()
    except (Exception, SystemExit) as error:
        if not isinstance(error, OnnxsplitError):
            traceback.print_exception(error)
        channel.send(Unusable(short(f"{file} cannot be served: {_named(error)}")))
        await channel.receive()


def main() -> None:
    """Run the process."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)  # the gateway takes an open socket for a running worker
    file, name = Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None
    # The gateway gets SIGTERM too where it is sent to all processes of the server, and ends this one.
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    os.dup2(2, 1)  # what the user's code prints is not the server's result
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    threading.Thread(target=_end_with_gateway, args=(connection.dup(),), daemon=True).start()
    loaded: type | BaseException
    try:
        loaded = load_service(file, name)
    except (Exception, SystemExit) as error:
        loaded = error
    with suppress(KeyboardInterrupt):
        asyncio.run(_main(connection, file, loaded))


if __name__ == "__main__":
    main()
