"""The measuring agent of a host, which ``onnxsplit cluster agent`` runs.

An agent answers one request after the other: it measures links to other agents, and times models. It runs models that
it is sent, so it accepts connections from other hosts only with keys, unless ``insecure`` is set.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from onnxsplit.custom_ops import Library
from onnxsplit.errors import ModelError, OnnxsplitError
from onnxsplit.providers import provider_here
from onnxsplit.timed import typical_ns
from runtime.errors import ProtocolError
from runtime.measure.client import AgentClient
from runtime.wire import codec
from runtime.wire.keys import Keys
from runtime.wire.messages.control import Trust
from runtime.wire.messages.measure import (
    AgentAnswer,
    AgentRequest,
    CannotMeasure,
    FilePiece,
    FileStored,
    MeasureLink,
    MeasureModel,
    ModelTime,
    Ping,
    Pong,
)
from runtime.wire.security import Security
from runtime.wire.sockets import Sockets


def serve(
    bind: str,
    *,
    keys: Keys | None,
    insecure: bool,
    custom_ops: tuple[Library, ...] = (),
    told: Callable[[str], None] = lambda _: None,
) -> None:
    """Run an agent until it is interrupted.

    Args:
        bind: the address to bind.
        keys: the keys that protect links; None leaves them plain.
        insecure: whether plain links may leave this host.
        custom_ops: the only libraries of custom ops that the models it is sent may load.
        told: called with the address once it is bound.

    Raises:
        PipelineError: the address cannot be used.
    """
    vouched: set[str] = set()
    security = Security(
        pair=keys.pair if keys else None,
        allows=lambda key: keys is not None and (key in keys.allowed or key in vouched),
        insecure=insecure,
    )
    folder = Path(tempfile.mkdtemp(prefix="onnxsplit-agent-"))
    try:
        with Sockets(security=security) as sockets:
            inlet = sockets.answering(bind)
            told(inlet.address)
            agent = _Agent(folder, security, vouched, custom_ops)
            while True:
                sockets.wait(60.0)
                while (message := inlet.receive_all()) is not None:
                    identity, header, frames, _ = message
                    try:
                        inlet.send(identity, codec.encode(agent.answer(codec.decode_agent_request(header), frames)))
                    except ProtocolError:
                        continue  # a malformed request gets no answer
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Agent:
    """Carries out the requests of :mod:`runtime.wire.messages.measure`."""

    def __init__(self, folder: Path, security: Security, vouched: set[str], custom_ops: tuple[Library, ...]) -> None:
        self._folder = folder
        self._custom_ops = custom_ops
        self._security = security
        self._vouched = vouched

    def answer(self, asked: AgentRequest, frames: list[codec.Buffer]) -> AgentAnswer:
        """Carry out a request; returns the answer.

        Raises:
            ProtocolError: the name of a file is not a plain name.
        """
        try:
            match asked:
                case Ping(number):
                    return Pong(number)
                case Trust(keys):  # a measurement begins or ends: the files of an earlier one are removed
                    self._vouched.clear()
                    self._vouched.update(keys)
                    for file in self._folder.iterdir():
                        file.unlink()
                    return Pong(0)
                case MeasureLink(address, key):
                    with AgentClient(address, security=self._security, key=key) as other:
                        return other.measure()
                case FilePiece(name, offset):
                    return self._take(name, offset, frames)
                case MeasureModel():
                    return ModelTime(self._time_ns(asked))
        except (OnnxsplitError, OSError) as error:
            return CannotMeasure(str(error))

    def _file(self, name: str) -> Path:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ProtocolError(f"{name!r} is not a plain file name")
        return self._folder / name

    def _take(self, name: str, offset: int, frames: list[codec.Buffer]) -> AgentAnswer:
        file = self._file(name)
        with file.open("r+b" if offset else "wb") as stream:
            if stream.seek(0, 2) != offset:
                return CannotMeasure(f"{name} has {stream.tell()} bytes, but the piece received begins at {offset}")
            for piece in frames:
                stream.write(piece)
            return FileStored(name, stream.tell())

    def _time_ns(self, asked: MeasureModel) -> int:
        if provider_here(asked.provider) != asked.provider:
            return 0
        model, inputs = self._file(asked.model), self._file(asked.inputs)
        try:
            return typical_ns(
                model, inputs, threads=asked.threads, provider=asked.provider, custom_ops=self._custom_ops
            )
        except ModelError:
            return 0
