"""Starting the servers, serving, and ending: what was accepted is answered first."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import uvicorn

from onnxsplit.errors import InputError, OnnxsplitError
from runtime.descriptors import raise_limit
from runtime.errors import LaunchFailed
from runtime.gateway.access import LOOPBACK, AccessControl, read_tokens
from runtime.gateway.budget import Budget
from runtime.gateway.grpc.servicer import GrpcServicer
from runtime.gateway.http.app import HttpApp
from runtime.gateway.http.bodies import Bodies
from runtime.gateway.http.connections import Connection
from runtime.gateway.queue import Limits
from runtime.gateway.repository import Repository, StartPipeline, find_versions
from runtime.gateway.service import Service
from runtime.gateway.shared_memory import SharedMemoryRegions
from runtime.gateway.telemetry.sampler import Sampler
from runtime.gateway.telemetry.spans import Spans
from runtime.logs import log_event

_log = logging.getLogger("runtime.gateway")

_CONNECTIONS = 4096
_KEEP_ALIVE_S = 75
_DESCRIPTORS = 65536
_WORKERS = 2  # threads beside the event loop
_GRPC_METADATA_BYTES = 64 << 10
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How to serve.

    Attributes:
        host: to listen at; a name or an address.
        http_port: of HTTP; 0 takes any that is free.
        grpc_port: of gRPC; 0 takes any that is free; None serves none.
        max_batch: rows that requests are joined to at most; 1 joins none.
        max_delay_ms: a request waits so long for others to join.
        max_queue: requests that may wait before a pipeline.
        max_queue_bytes: bytes of their inputs.
        max_body: bytes a request may have.
        newest: so many of the newest versions of each model are loaded.
        tls_cert: file with the certificate chain, PEM.
        tls_key: file with its key, PEM.
        token_file: file with the tokens that clients may show; None asks for none.
        shared_memory: clients may register shared memory whose name begins so, any with an empty text, none with None.
        drain_s: seconds for accepted requests when it is to end.
        spans: send spans to OpenTelemetry.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int | None = 8001
    max_batch: int = 1
    max_delay_ms: float = 0.0
    max_queue: int = 256
    max_queue_bytes: int = 1 << 30
    max_body: int = 256 << 20
    newest: int = 1
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    shared_memory: str | None = None
    drain_s: float = 30.0
    spans: bool = False

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            InputError: naming the option.
        """
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert and --tls-key belong together; give both or none")
        for file in (self.tls_cert, self.tls_key):
            if file is not None and not file.is_file():
                raise InputError(f"no such file: {file}")


@dataclass(frozen=True)
class Serving:
    """Where a server can be reached.

    Attributes:
        http: its URL.
        grpc: host and port; None when it serves none.
        models: name -> the versions that are loaded.
    """

    http: str
    grpc: str | None
    models: dict[str, list[str]] = field(default_factory=dict)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us."""

    def capture_signals(self) -> Any:
        return nullcontext()


def serve(
    places: Sequence[Path],
    options: ServeOptions,
    start: StartPipeline,
    *,
    told: Callable[[Serving], None] = lambda _: None,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve plans until SIGTERM or SIGINT; then what was accepted is answered, and everything ends.

    Args:
        places: plan directories, or folders of versions.
        options: how.
        start: starts a pipeline of a plan.
        told: hears once when all is ready.
        progress: hears of each step.

    Raises:
        OnnxsplitError: it cannot serve; says why.
    """
    options.check()
    versions = find_versions(places)
    access = AccessControl(
        read_tokens(options.token_file) if options.token_file is not None else (), loopback=options.host in LOOPBACK
    )
    connections = min(_CONNECTIONS, raise_limit(_DESCRIPTORS) // 2)  # the others are for the nodes
    with listen(options.host, options.http_port) as listener:
        serving = _serve(options, connections, access, listener, versions, start, told, progress)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serving)


async def _serve(
    options: ServeOptions,
    connections: int,
    access: AccessControl,
    listener: socket.socket,
    versions: list[Any],
    start: StartPipeline,
    told: Callable[[Serving], None],
    progress: Callable[[str], None],
) -> None:
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    limits = Limits(
        requests=options.max_queue,
        size_bytes=options.max_queue_bytes,
        max_batch=options.max_batch,
        max_delay_ns=int(options.max_delay_ms * 1e6),
    )
    repository = Repository(versions, start, limits, newest=options.newest)

    def end() -> None:
        repository.ending = True
        ending.set()

    _end_on_signals(loop, end)
    regions = SharedMemoryRegions(options.shared_memory, allowed=options.host in LOOPBACK, most_bytes=options.max_body)
    spans = Spans.exporting() if options.spans else None
    workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="gateway")
    service = Service(repository, regions, workers, spans)
    budget = Budget(options.max_queue_bytes, options.max_body)
    sampler = Sampler(service, budget)
    web = _http(HttpApp(service, Bodies(options.max_body, budget, workers), access, sampler), options, connections)
    serving_http = asyncio.ensure_future(web.serve(sockets=[listener]))
    rpc: Any = None
    watching: asyncio.Future[None] | None = None
    try:
        rpc, grpc_port = await _grpc(GrpcServicer(service, budget, access, sampler), options)
        sampler.start()
        watching = asyncio.ensure_future(repository.watch())
        for model in repository.models:
            progress(f"starting the nodes of {model}")
            await _unless(ending, repository.load(model))
        _end_on_signals(loop, end)  # again: Ray, as it starts, takes SIGTERM, and aborts the process 3 s after one
        if not ending.is_set():
            scheme = "https" if options.tls_cert is not None else "http"
            host = f"[{options.host}]" if ":" in options.host else options.host
            told(
                Serving(
                    http=f"{scheme}://{host}:{listener.getsockname()[1]}",
                    grpc=None if grpc_port is None else f"{host}:{grpc_port}",
                    models={
                        model: [v.number for v in repository.versions(model) if v.batcher is not None]
                        for model in repository.models
                    },
                )
            )
        await ending.wait()
    finally:
        log_event(_log, logging.INFO, "ending", patience_s=options.drain_s)
        if watching is not None:
            watching.cancel()
        await repository.close(options.drain_s)
        await sampler.stop()
        if rpc is not None:
            await rpc.stop(1.0)
        web.should_exit = True
        await serving_http
        regions.close()
        workers.shutdown(wait=False, cancel_futures=True)
        if spans is not None:
            spans.close()


def _end_on_signals(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> None:
    """Let SIGTERM and SIGINT begin the end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)


async def _unless(ending: asyncio.Event, work: Any) -> None:
    """Do something that is left alone when the end comes first."""
    doing = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(ending.wait())
    await asyncio.wait((doing, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        await doing  # a launch ends in order, or its nodes would be left to themselves
    except OnnxsplitError:
        if not ending.is_set():  # else Ctrl-C may have ended the nodes that it waited for
            raise


def _http(web: HttpApp, options: ServeOptions, connections: int) -> uvicorn.Server:
    return _Uvicorn(
        uvicorn.Config(
            web.app(),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=connections,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=2,
            ssl_certfile=options.tls_cert,
            ssl_keyfile=options.tls_key,
        )
    )


async def _grpc(rpc: GrpcServicer, options: ServeOptions) -> tuple[Any, int | None]:
    """The gRPC server and its port."""
    if options.grpc_port is None:
        return None, None
    limit = min(options.max_body, _INT32_MAX)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", _GRPC_METADATA_BYTES),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=_CONNECTIONS,
    )
    rpc.add_to(server)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.grpc_port}"
    try:
        if options.tls_cert is not None and options.tls_key is not None:
            pair = (options.tls_key.read_bytes(), options.tls_cert.read_bytes())
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(address)
    except (RuntimeError, OSError) as error:
        raise LaunchFailed(f"cannot serve gRPC at {address}: {error}. Choose another --grpc-port, or 'off'") from error
    await server.start()
    return server, port


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        LaunchFailed: the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen(2048)
        except BaseException:
            opened.close()
            raise
    except (OSError, UnicodeError) as error:  # the latter of a name that has a label of over 63 characters, or none
        what = getattr(error, "strerror", None) or error
        raise LaunchFailed(
            f"cannot listen at {host[:80]}:{port}: {what}. Choose another --host or --http-port"
        ) from error
    return opened


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    import uvloop

    return uvloop.new_event_loop
