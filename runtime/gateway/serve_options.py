"""The options of a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnxsplit.errors import InputError
from runtime.gateway.models.states import bind_to_models
from runtime.gateway.models.warmup import Warmup
from runtime.gateway.queue import Limits
from runtime.gateway.sequence_states import Room
from runtime.gateway.sequences import SequenceOptions
from runtime.text.tools import ToolFormat


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How to serve.

    Attributes:
        host: Name or address at which to listen.
        http_port: Port of HTTP; 0 takes any free port.
        grpc_port: Port of gRPC; 0 takes any free port, None does not serve gRPC.
        max_batch: Most rows to which requests are joined; 1 joins nothing.
        max_delay_ms: Longest time for which a request waits for others to join, in milliseconds.
        priority_levels: Number of priority levels of waiting requests.
        max_queue: Most requests that wait before a pipeline; more are refused.
        max_queue_bytes: Most bytes of their inputs, and of all requests that are held.
        max_body: Most bytes of one request.
        poll_s: Seconds between two looks at the folders of the models; 0 never looks.
        newest: How many of the newest versions of each model are loaded.
        tls_cert: PEM file with the certificate chain; None serves without TLS.
        tls_key: PEM file with the certificate's key.
        token_file: File with the tokens, one of which every request must carry; None needs no token.
        shared_memory: Beginning of the names of shared memory that clients may register; empty for any name, None for
            no shared memory.
        served_names: What clients of OpenAI's API call the only model; empty for the models' own names.
        tool_parser: How the models write calls of tools; None where that is not known.
        drain_s: Seconds for which accepted requests are answered when the server stops.
        spans: True to send spans to OpenTelemetry.
        response_cache: Most bytes of outputs that are kept to answer the same requests again; 0 keeps none.
        warmup: Requests that each model answers before it is ready.
        ready_grace_s: Seconds for which a model stays ready after one of its stages has lost its last node.
        states: The states of models, each ``INPUT=OUTPUT`` or ``MODEL:INPUT=OUTPUT``.
        max_sequences: Most sequences that run.
        sequence_bytes: Most bytes of the states of all sequences.
        sequence_idle_s: Seconds after which a sequence without requests is dropped.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int | None = 8001
    max_batch: int = 1
    max_delay_ms: float = 0.0
    priority_levels: int = 1
    max_queue: int = 256
    max_queue_bytes: int = 1 << 30
    max_body: int = 256 << 20
    poll_s: float = 0.0
    newest: int = 1
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    shared_memory: str | None = None
    served_names: tuple[str, ...] = ()
    tool_parser: ToolFormat | None = None
    drain_s: float = 30.0
    spans: bool = False
    response_cache: int = 0
    warmup: Warmup = field(default_factory=Warmup)
    ready_grace_s: float = 0.0
    states: tuple[str, ...] = ()
    max_sequences: int = 1024
    sequence_bytes: int = 1 << 30
    sequence_idle_s: float = 60.0

    def check(self) -> None:
        """Refuse combinations that cannot be served.

        Raises:
            InputError: The message names the option.
        """
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert and --tls-key belong together; give both or none")
        for file in (self.tls_cert, self.tls_key):
            if file is not None and not file.is_file():
                raise InputError(f"no such file: {file}")

    @property
    def url_host(self) -> str:
        """The host as it stands in URLs."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def limits(self) -> Limits:
        """The limits of the queue before each pipeline."""
        return Limits(
            requests=self.max_queue,
            size_bytes=self.max_queue_bytes,
            max_batch=self.max_batch,
            max_delay_ns=int(self.max_delay_ms * 1e6),
            levels=self.priority_levels,
        )

    def sequences(self, models: Sequence[str]) -> SequenceOptions:
        """How the states of sequences are kept, for the models of the server.

        Raises:
            InputError: A declared state does not say whose it is.
        """
        return SequenceOptions(
            declared=bind_to_models(self.states, models),
            room=Room(self.max_sequences, self.sequence_bytes),
            idle_ns=int(self.sequence_idle_s * 1e9),
            most_waiting=self.max_queue,
        )
