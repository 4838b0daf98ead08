"""One worker process of a service, from its start to its end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from onnxsplit.errors import InputError
from onnxsplit.session import quiet_environment
from runtime.errors import LaunchFailed
from runtime.services.messages import Channel, Described, ServiceDescription, ToGateway, Unusable

_TARGET = re.compile(r"(?P<file>.+\.py)(?::(?P<name>[A-Za-z_]\w*))?")
_LAST_WORDS_S = 0.5  # for what a process has sent before it ended
_GRACE_S = 7.0  # longer than a worker gives its user's code once the socket is closed


class ServiceTarget(NamedTuple):
    """Where a service is found: a file of Python code, and the name of the class in it if there are several."""

    file: Path
    name: str | None

    def __str__(self) -> str:
        return str(self.file) if self.name is None else f"{self.file}:{self.name}"


def target_of(text: str) -> ServiceTarget | None:
    """The service that a word of the command line names, as ``app.py:Service``; None if it names none."""
    match = _TARGET.fullmatch(text)
    return ServiceTarget(Path(match["file"]).absolute(), match["name"]) if match is not None else None


class WorkerProcess:
    """A worker process. It is made within the event loop that uses it.

    Attributes:
        pid: its number, and that of its process group.
        channel: the socket to it.
    """

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self.pid = process.pid
        self.channel = channel
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._descriptor = os.pidfd_open(process.pid)
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._descriptor, self._has_ended)

    def _has_ended(self) -> None:
        """The process has ended: end what it has started, and after its last messages the socket."""
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # its number is not given to others before the wait
        self._ended.set_result(self._process.wait())
        self._loop.call_later(_LAST_WORDS_S, self.channel.close)

    @classmethod
    async def start(cls, target: ServiceTarget) -> WorkerProcess:
        """Start the process.

        Raises:
            LaunchFailed: the host cannot start it.
        """
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.get_running_loop().run_in_executor(None, _spawn, target, theirs)
        except OSError as error:
            ours.close()
            raise LaunchFailed(f"cannot start a worker for {target}: {error.strerror}") from error
        finally:
            theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, Channel(reader, writer, ToGateway))

    async def described(self) -> ServiceDescription:
        """What the worker says of its service.

        Raises:
            InputError: the file cannot be served.
            LaunchFailed: the worker has ended.
        """
        received = await self.channel.receive()
        if received is None:
            raise LaunchFailed(f"a worker {await self.story()} before it had read its file")
        message, _ = received
        if isinstance(message, Unusable):
            raise InputError(message.message)
        assert isinstance(message, Described)
        return message.service

    def kill(self) -> None:
        """Kill the process, and all that it has started."""
        if not self._ended.done():
            self._process.kill()

    async def story(self) -> str:
        """How the process has ended."""
        code = await asyncio.shield(self._ended)
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    async def end(self) -> None:
        """Close the socket, by which the process ends, and kill it if it does not."""
        self.channel.close()
        if not (await asyncio.wait((self._ended,), timeout=_GRACE_S))[0]:
            self.kill()
            await self._ended


def _spawn(target: ServiceTarget, theirs: socket.socket) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "runtime.services.worker", str(theirs.fileno()), str(target.file)]
    if target.name is not None:
        command.append(target.name)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=(theirs.fileno(),),
        env=quiet_environment(),
        process_group=0,  # Ctrl-C is not for it, and it is ended with all that it has started
    )


async def _describe(target: ServiceTarget) -> ServiceDescription:
    process = await WorkerProcess.start(target)
    try:
        return await process.described()
    finally:
        await process.end()


def describe(target: ServiceTarget) -> ServiceDescription:
    """What a service is, as a process says that reads its file.

    Raises:
        InputError: there is no such file or service, or it cannot be served.
        LaunchFailed: the process has ended.
    """
    if not target.file.is_file():
        raise InputError(f"no such file: {target.file}")
    return asyncio.run(_describe(target))
