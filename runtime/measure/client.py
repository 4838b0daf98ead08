"""Asks measuring agents on other hosts, and describes the links that they have measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from onnxsplit.cluster import LOCAL, Device, Link
from runtime.errors import PipelineError
from runtime.wire import codec
from runtime.wire.client import Client
from runtime.wire.keys import Keys
from runtime.wire.messages.control import Trust
from runtime.wire.messages.measure import (
    AgentAnswer,
    AgentRequest,
    CannotMeasure,
    FilePiece,
    LinkFigures,
    MeasureLink,
    MeasureModel,
    ModelTime,
    Ping,
)
from runtime.wire.security import Security

_PIECE_BYTES = 512 << 10
_ROUND_TRIPS = 30
_MESSAGES = 300
_BULK_S = 2.0  # duration of the bandwidth measurement, about
_BULK_AHEAD = 16  # messages that are sent before the first answer
_MOST_PIECES = 1 << 13  # messages of the bandwidth measurement, at most
_PATIENCE_S = 30.0  # longest wait for an answer
_MODEL_PATIENCE_S = 600.0  # longest wait for the result of a measurement
_FAREWELL_S = 2.0  # longest wait for the answer to the last request


class AgentClient(Client):
    """A link to an agent; a context manager."""

    def ask(self, question: AgentRequest, piece: bytes = b"", *, patience_s: float = _PATIENCE_S) -> AgentAnswer:
        """Send a request, and wait for the answer.

        Args:
            question: the request.
            piece: bytes to send after it.
            patience_s: seconds to wait.

        Raises:
            PipelineError: no agent answers, or it refuses this process or cannot do what it was asked.
        """
        self._link.send(codec.encode(question), [piece] if piece else [])
        return self._answer(patience_s)

    def put(self, name: str, file: Path, told: Callable[[int], None] = lambda _: None) -> None:
        """Send a file to the agent; ``told`` is called after each piece with the number of bytes sent.

        Raises:
            PipelineError: the agent does not answer or cannot store the file.
        """
        offset = 0
        with file.open("rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                self.ask(FilePiece(name, offset), piece)
                told(offset := offset + len(piece))

    def measure(self) -> LinkFigures:
        """Measure the link from this process to the agent.

        Raises:
            PipelineError: the agent does not answer.
        """
        self.ask(Ping(0))  # establishes the connection
        trips = [self._timed(lambda: self.ask(Ping(1))) for _ in range(_ROUND_TRIPS)]
        together = self._timed(lambda: self._many(_MESSAGES, b""))
        count, bulk = _BULK_AHEAD, 0.0
        while bulk < _BULK_S * 1e9 / 4 and count < _MOST_PIECES:
            count *= 4 if bulk else 1
            bulk = self._timed(partial(self._many, count, bytes(_PIECE_BYTES)))
        return LinkFigures(
            round_trip_ns=round(statistics.median(trips)),
            message_ns=round(together / _MESSAGES),
            bytes_per_s=max(1, round(count * _PIECE_BYTES / bulk * 1e9)),
        )

    def _many(self, count: int, piece: bytes) -> None:
        """Send ``count`` messages, up to ``_BULK_AHEAD`` before their answers."""
        frames = [piece] if piece else []
        for number in range(count + _BULK_AHEAD):
            if number < count:
                self._link.send(codec.encode(Ping(number)), frames)
            if number >= _BULK_AHEAD:
                self._answer(_PATIENCE_S)

    def _timed(self, what: Callable[[], object]) -> float:
        begun = time.perf_counter_ns()
        what()
        return float(time.perf_counter_ns() - begun)

    def _answer(self, patience_s: float) -> AgentAnswer:
        deadline = time.monotonic() + patience_s
        while (header := self._link.receive()) is None:
            if (reason := self._link.refused()) is not None:
                raise PipelineError(f"the agent at {self._address} refuses this process: {reason}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise PipelineError(
                    f"no agent answers at {self._address}; start one there with: onnxsplit cluster agent --bind ADDR"
                )
            self._sockets.wait(min(left, 0.2))
        answer = codec.decode_agent_answer(header)
        if isinstance(answer, CannotMeasure):
            raise PipelineError(f"the agent at {self._address}: {answer.reason}")
        return answer


def link_of(figures: LinkFigures) -> Link:
    """The cluster description of a measured link: ``overlapped``, as tensors are transferred while its ends compute."""
    way_ns = figures.round_trip_ns // 2
    return Link(
        latency_ns=min(figures.message_ns, way_ns),
        bytes_per_s=figures.bytes_per_s,
        overlapped=True,
        delay_ns=max(0, way_ns - figures.message_ns),
    )


class Agents:
    """The agents of several hosts; a context manager.

    Args:
        addresses: the address of each host's agent.
        keys: the keys that protect links; each host's public key is allowed under the host's name. None leaves links
            plain.
        insecure: whether plain links may leave this host.

    Raises:
        PipelineError: an agent cannot be reached.
        InputError: a host's key is missing.
    """

    def __init__(self, addresses: Mapping[str, str], *, keys: Keys | None, insecure: bool) -> None:
        self._addresses = addresses
        self._keys = {host: keys.of(host) if keys else "" for host in addresses}
        security = Security(pair=keys.pair if keys else None, insecure=insecure)
        self._without: set[str] = set()  # hosts that could not store the files
        self._stack = ExitStack()
        with ExitStack() as undo:
            self._clients = {
                host: undo.enter_context(AgentClient(address, security=security, key=self._keys[host]))
                for host, address in addresses.items()
            }
            for client in self._clients.values():
                client.ask(Trust(tuple(self._keys.values()) if keys else ()))
            self._stack = undo.pop_all()

    def __enter__(self) -> Agents:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients.values():
            with suppress(PipelineError):  # it may have ended
                client.ask(Trust(()), patience_s=_FAREWELL_S)
        self._stack.close()

    def links(self, say: Callable[[str], None] = lambda _: None) -> dict[tuple[str, str], Link]:
        """Measure the links between all hosts, and between this host and each of these.

        Args:
            say: called with a description of each step.

        Returns:
            The links, by pairs of host names in sorted order.

        Raises:
            PipelineError: an agent does not answer or cannot measure a link.
        """
        links = {}
        hosts = sorted(self._clients)
        for number, host in enumerate(hosts):
            say(f"measuring the link to {host}")
            links[min(LOCAL, host), max(LOCAL, host)] = link_of(self._clients[host].measure())
            for other in hosts[number + 1 :]:
                say(f"measuring the link from {host} to {other}")
                question = MeasureLink(self._addresses[other], self._keys[other])
                figures = self._clients[host].ask(question, patience_s=_MODEL_PATIENCE_S)
                assert isinstance(figures, LinkFigures)
                links[host, other] = link_of(figures)
        return links

    def send(self, files: Sequence[Path], say: Callable[[str], None] = lambda _: None) -> None:
        """Send files to all hosts, for :meth:`time_ns`. A host that cannot store them runs no model.

        Args:
            files: the files.
            say: called with a description of each step.
        """
        for host, client in self._clients.items():
            try:
                for file in files:
                    say(f"sending {file.name} to {host}")
                    client.put(file.name, file)
            except PipelineError as error:
                say(f"{host} cannot store the model: {error}")
                self._without.add(host)

    def time_ns(self, model: Path, inputs: Path, device: Device) -> int | None:
        """Time of a model on a device of one of the hosts, in ns; None when it cannot run there.

        Args:
            model: the model, which was sent.
            inputs: its inputs, which were sent.
            device: the device.

        Raises:
            PipelineError: the agent does not answer.
        """
        if device.host in self._without:
            return None
        question = MeasureModel(model.name, inputs.name, device.provider, device.threads)
        answer = self._clients[device.host].ask(question, patience_s=_MODEL_PATIENCE_S)
        assert isinstance(answer, ModelTime)
        return answer.time_ns or None
