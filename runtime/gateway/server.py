"""The gateway process: it starts the HTTP and gRPC servers, serves, and stops after accepted requests are answered."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import uvicorn

from onnxsplit.errors import OnnxsplitError
from runtime.descriptors import raise_limit
from runtime.errors import LaunchFailed
from runtime.gateway.access import LOOPBACK, AccessControl, read_tokens
from runtime.gateway.budget import Budget
from runtime.gateway.grpc.servicer import GrpcServicer
from runtime.gateway.http.app import HttpApp
from runtime.gateway.http.bodies import Bodies
from runtime.gateway.http.connections import Connection
from runtime.gateway.models.loader import Loader, StartPipeline
from runtime.gateway.models.polling import Poller
from runtime.gateway.models.repository import Repository
from runtime.gateway.models.version import Version, find_versions, is_empty
from runtime.gateway.openai.catalogue import Catalogue
from runtime.gateway.openai.routes import OpenAIEndpoint
from runtime.gateway.openai.starting import TextStarter
from runtime.gateway.response_cache import ResponseCache
from runtime.gateway.serve_options import ServeOptions
from runtime.gateway.service import Service
from runtime.gateway.services.served import ServedService, make_pools
from runtime.gateway.shared_memory import SharedMemoryRegions
from runtime.gateway.spans import Spans
from runtime.gateway.telemetry.sampler import Sampler
from runtime.gateway.texts import Texts
from runtime.gateway.threads import Workers
from runtime.logs import log_event

_log = logging.getLogger("runtime.gateway")

_CONNECTIONS = 4096
_KEEP_ALIVE_S = 75
_DESCRIPTORS = 65536
_WORKERS = 2
_GRPC_METADATA_BYTES = 64 << 10
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Serving:
    """Where clients reach a server.

    Attributes:
        http: URL of HTTP.
        grpc: Host and port of gRPC; None when gRPC is not served.
        models: The loaded versions of each model.
        texts: Names of the models that complete texts.
        services: Paths of the endpoints of services.
    """

    http: str
    grpc: str | None
    models: dict[str, list[str]] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    services: tuple[str, ...] = ()


class _Uvicorn(uvicorn.Server):
    """Uvicorn without signal handlers; the gateway has its own."""

    def capture_signals(self) -> Any:
        return nullcontext()


def serve(
    folders: Sequence[Path],
    options: ServeOptions,
    start: StartPipeline,
    *,
    services: Sequence[ServedService] = (),
    on_ready: Callable[[Serving], None] = lambda _: None,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve plans until SIGTERM or SIGINT. Then accepted requests are answered, and everything ends.

    Args:
        folders: Plan directories, or folders of versions.
        options: How to serve.
        start: Starts the pipeline of a plan.
        services: Services in Python; their models are among the plans.
        on_ready: Called once, when all models are loaded.
        progress: Called with the name of each step.

    Raises:
        OnnxsplitError: The server cannot start. The message says why.
    """
    options.check()
    versions = [] if options.poll_s and is_empty(folders) else find_versions(folders)
    if not options.poll_s:  # otherwise a model that comes later may have such inputs
        options.warmup.check({version.model: version.plan for version in versions})
    tokens = read_tokens(options.token_file) if options.token_file is not None else ()
    access = AccessControl(tokens, loopback=options.host in LOOPBACK)
    with listen(options.host, options.http_port) as listener:

        async def run() -> None:
            await _Gateway(options, versions, start, access, folders, services).run(listener, on_ready, progress)

        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(run())


class _Gateway:
    """All parts of a running gateway. It is made within the event loop that runs it."""

    def __init__(
        self,
        options: ServeOptions,
        versions: list[Version],
        start: StartPipeline,
        access: AccessControl,
        folders: Sequence[Path] = (),
        services: Sequence[ServedService] = (),
    ) -> None:
        self._options = options
        self._folders = folders
        self._ending = asyncio.Event()
        sequences = options.sequences(list(dict.fromkeys(version.model for version in versions)))
        loader = Loader(start, options.limits, options.warmup, sequences, options.ready_grace_s)
        self._repository = Repository(versions, loader, newest=options.newest)
        self._regions = SharedMemoryRegions(
            options.shared_memory, allowed=options.host in LOOPBACK, most_bytes=options.max_body
        )
        self._spans = Spans.exporting() if options.spans else None
        self._workers = Workers(_WORKERS)
        cache = ResponseCache(options.response_cache) if options.response_cache else None
        service = Service(self._repository, self._regions, self._workers, self._spans, cache)
        self._pools = service.pools = make_pools(services, folders, service, options.max_queue)
        self._repository.requirements += [pool.why_not for pool in self._pools]
        budget = Budget(options.max_queue_bytes, options.max_body)
        self._sampler = Sampler(service, budget)
        bodies = Bodies(options.max_body, budget, self._workers)
        starter = TextStarter(self._workers, most_waiting=options.max_queue, tools=options.tool_parser)
        self._catalogue = Catalogue(self._repository, options.served_names)
        openai, texts = OpenAIEndpoint(self._catalogue, bodies, self._workers, starter), Texts(service, starter)
        http_app = HttpApp(service, bodies, access, self._sampler, openai, texts, self._pools)
        self._http_server = _http_server(http_app, options)
        self._servicer = GrpcServicer(service, budget, access, self._sampler, texts)

    async def run(
        self, listener: socket.socket, on_ready: Callable[[Serving], None], progress: Callable[[str], None]
    ) -> None:
        """Serve until a signal asks to stop."""
        self._stop_on_signals()
        serving_http = asyncio.ensure_future(self._http_server.serve(sockets=[listener]))
        grpc_server: Any = None
        watching: list[asyncio.Future[None]] = []
        try:
            grpc_server, grpc_port = await _grpc_server(self._servicer, self._options)
            self._sampler.start()
            watching.append(asyncio.ensure_future(self._repository.watch()))
            for model in self._repository.models:
                progress(f"starting the nodes of {model}")
                await _unless(self._ending, self._repository.load(model))
            for pool in self._pools:
                progress(f"starting the workers of {pool.description.name}")
                await _unless(self._ending, pool.start())
            self._stop_on_signals()  # again, because Ray installs a handler that aborts the process
            if not self._ending.is_set():
                on_ready(self._serving(listener.getsockname()[1], grpc_port))
            if self._options.poll_s:
                poller = Poller(self._repository, self._folders)
                watching.append(asyncio.ensure_future(poller.run(self._options.poll_s)))
            await self._ending.wait()
        finally:
            log_event(_log, logging.INFO, "stopping", patience_s=self._options.drain_s)
            for task in watching:
                task.cancel()
            begun = time.monotonic()
            await asyncio.gather(*(pool.close(self._options.drain_s) for pool in self._pools))
            await self._repository.close(max(0.0, self._options.drain_s - (time.monotonic() - begun)))
            await self._sampler.stop()
            if grpc_server is not None:
                await grpc_server.stop(1.0)
            self._http_server.should_exit = True
            await serving_http
            self._regions.close()
            self._workers.close()
            if self._spans is not None:
                self._spans.close()

    def _stop_on_signals(self) -> None:
        """Let SIGTERM and SIGINT stop the server."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)

    def _stop(self) -> None:
        self._repository.stop()
        for pool in self._pools:
            pool.stop()
        self._ending.set()

    def _serving(self, http_port: int, grpc_port: int | None) -> Serving:
        scheme = "https" if self._options.tls_cert is not None else "http"
        host = self._options.url_host
        return Serving(
            http=f"{scheme}://{host}:{http_port}",
            grpc=None if grpc_port is None else f"{host}:{grpc_port}",
            models={model: self._repository.loaded_numbers(model) for model in self._repository.models},
            texts=tuple(model.id for model in self._catalogue.models()),
            services=tuple(path for pool in self._pools for path in pool.description.paths),
        )


async def _unless(ending: asyncio.Event, work: Any) -> None:
    """Do some work. Its errors do not count when the server is asked to stop first."""
    doing = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(ending.wait())
    await asyncio.wait((doing, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        await doing  # a launch must end properly, or its nodes would be orphans
    except OnnxsplitError:
        if not ending.is_set():  # otherwise Ctrl-C may have ended the nodes that it waited for
            raise


def _http_server(http_app: HttpApp, options: ServeOptions) -> uvicorn.Server:
    connections = min(_CONNECTIONS, raise_limit(_DESCRIPTORS) // 2)  # the other descriptors are for the nodes
    return _Uvicorn(
        uvicorn.Config(
            http_app.app(),
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


async def _grpc_server(servicer: GrpcServicer, options: ServeOptions) -> tuple[Any, int | None]:
    """A running gRPC server, and its port; None twice when gRPC is not served."""
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
    servicer.add_to(server)
    address = f"{options.url_host}:{options.grpc_port}"
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
    """A listening TCP socket.

    Raises:
        LaunchFailed: The address cannot be used.
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
    except (OSError, UnicodeError) as error:  # UnicodeError for a name with an empty or overlong label
        what = getattr(error, "strerror", None) or error
        raise LaunchFailed(
            f"cannot listen at {host[:80]}:{port}: {what}. Choose another --host or --http-port"
        ) from error
    return opened


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    import uvloop

    return uvloop.new_event_loop
