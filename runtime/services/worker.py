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
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.requests import Request

from onnxsplit.errors import InputError, OnnxsplitError, one_line
from onnxsplit.tensors import Array
from runtime.errors import PipelineClosed, PipelineError
from runtime.services.declare import declaration_of
from runtime.services.endpoints import ServiceEndpoint, check_name, described, endpoints, make
from runtime.services.messages import (
    MOST_BODY_BYTES,
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
)
from runtime.services.models import GatewayModel
from runtime.services.threads import in_thread
from runtime.wire.codec import decode_tensors, encode_tensors

_GRACE_S = 5.0


def load_service(file: Path, name: str | None) -> type:
    """Execute a user's file; returns the service of a name, or its only one.

    Raises:
        InputError: the file has no such service.
        Exception: whatever the file raises.
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

    def __init__(self, channel: Channel, declared: type, description: ServiceDescription) -> None:
        self._channel = channel
        self._declared = declared
        self._description = description
        self._endpoints: dict[str, ServiceEndpoint] = {each.name: each for each in endpoints(declared)}
        self._methods: Mapping[str, Callable[..., Any]] = {}
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._taken: dict[int, asyncio.Event] = {}  # the client has taken the last part of a response
        self._asks: dict[int, asyncio.Future[dict[str, Array]]] = {}
        self._numbers = itertools.count()

    async def run(self) -> None:
        """Work until the gateway closes the socket."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(self._description.calls, thread_name_prefix="call"))
        self._channel.send(Described(self._description))
        making: asyncio.Task[None] | None = None
        while (received := await self._channel.receive()) is not None:
            message, frames = received
            if isinstance(message, Begin):
                making = asyncio.ensure_future(self._make(message.models))
            elif isinstance(message, CallEndpoint):
                task = self._calls[message.call] = asyncio.ensure_future(self._execute(message, frames[0]))
                task.add_done_callback(lambda _, number=message.call: self._calls.pop(number, None))  # type: ignore[misc]
            else:
                self._told(message, frames)
        if making is not None:
            making.cancel()

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
            self._methods = await in_thread(make, self._declared, models)
        except Exception as error:
            traceback.print_exc()
            self._channel.send(Unusable(f"{self._description.name} cannot be made: {_named(error)}"))
            return
        self._channel.send(Up())

    async def _execute(self, call: CallEndpoint, body: bytes) -> None:
        """Execute a call. Its end is always told, so that another one can have its place."""
        ended = CallEnded(call.call)
        try:
            await self._respond(call, body)
        except OnnxsplitError as error:
            ended = CallEnded(call.call, kind_of(error), str(error))
        except asyncio.CancelledError:
            ended = CallEnded(call.call, "Cancelled", "the call was cancelled")
        except Exception as error:  # of a stream, whose head was sent
            traceback.print_exc()
            message = f"{self._endpoints[call.endpoint].title} failed: {type(error).__name__}"
            ended = CallEnded(call.call, "PipelineError", message)
        finally:
            self._taken.pop(call.call, None)
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
            self._channel.send(ResponseHead(number, message["status"], list(message.get("headers", []))))
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if len(body) > MOST_BODY_BYTES:
            raise PipelineError(
                f"a response of {len(body)} bytes; at most {MOST_BODY_BYTES} can be sent at once: return an iterator"
            )
        if more:
            taken = self._taken[number] = asyncio.Event()
            self._channel.send(ResponsePart(number, more=True), [body])
            await taken.wait()
        else:
            self._channel.send(ResponsePart(number, more=False), [body])

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
    return str(error) if isinstance(error, OnnxsplitError) else f"{type(error).__name__}: {one_line(error)}"


def _end_with_gateway(connection: socket.socket) -> None:
    """End the process when the gateway is gone, even if the user's code blocks the event loop."""
    poll = select.poll()
    poll.register(connection, 0)  # only that the other end was closed
    poll.poll()
    time.sleep(_GRACE_S)
    os._exit(1)


async def _main(connection: socket.socket, file: Path, name: str | None) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    channel = Channel(reader, writer, ToWorker)
    try:
        declared = load_service(file, name)
        declaration = declaration_of(declared)
        assert declaration is not None
        description = described(declared, declaration, file.parent)
        worker = _Worker(channel, declared, description)
    except Exception as error:
        if not isinstance(error, OnnxsplitError):
            traceback.print_exc()
        channel.send(Unusable(f"{file} cannot be served: {_named(error)}"))
        await channel.receive()
        return
    await worker.run()


def main() -> None:
    """Run the process."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    file, name = Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None
    signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # a signal for all processes of the server: the gateway ends this one
    os.dup2(2, 1)  # what the user's code prints is not the server's result
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    threading.Thread(target=_end_with_gateway, args=(connection.dup(),), daemon=True).start()
    with suppress(KeyboardInterrupt):
        asyncio.run(_main(connection, file, name))


if __name__ == "__main__":
    main()
