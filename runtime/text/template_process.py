"""Runs :mod:`runtime.text.template_child`: a process that renders chat templates, with limits."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnxsplit.errors import InputError, MissingDependency, one_line
from runtime.errors import PipelineClosed, PipelineError

LIMIT_S = 5.0
"""The most seconds for one rendering."""

_START_S = 60.0  # for Python and Jinja to start, on a busy host
_MEMORY_BYTES = 512 << 20
_MOST_REQUEST_BYTES = 32 << 20
_MOST_CHARACTERS = 8 << 20  # of a text
_CHILD = Path(__file__).with_name("template_child.py")
_KEPT = ("PATH", "TZ", "LD_LIBRARY_PATH")  # of the environment


class TemplateProcess:
    """A process that renders templates. It starts with the first one, and again after one that broke its limits.

    Any number of threads may call it; one at a time is served.

    Args:
        limit_s: the most seconds for one rendering. Then the process is killed.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._closed = False

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """The text of a template.

        Args:
            source: the template.
            variables: what it may use, by name: data that JSON can hold.

        Raises:
            InputError: the template is invalid, refuses the variables, or breaks a limit; or they are not JSON.
            MissingDependency: Jinja is not installed.
            PipelineClosed: :meth:`close` was called.
        """
        request = _request(source, variables)
        with self._lock:
            if self._closed:
                raise PipelineClosed("the pipeline was closed")
            try:
                running = self._running or self._start()
                kind, text = running.ask(request, self._limit_s)
            except TimeoutError as error:
                self._end()
                raise InputError(
                    f"the chat template takes more than {self._limit_s:g} s for these messages; shorten them, or give "
                    "the plan another template"
                ) from error
            except (OSError, EOFError, struct.error) as error:
                self._end()
                if self._closed:
                    raise PipelineClosed("the pipeline was closed") from error
                raise InputError("the chat template has ended the process that renders it") from error
            except BaseException:  # an interrupt: the answer may still come, and nobody would read it
                self._end()
                raise
            if kind == "m":
                self._end()
        if kind != "t":
            raise InputError(f"the chat template refuses the messages: {one_line(Exception(text), 600)}")
        return text

    def _start(self) -> _Running:
        try:
            self._running = _Running()
            self._running.receive(_START_S)
        except (OSError, EOFError) as error:
            self._end()
            if self._closed:
                raise PipelineClosed("the pipeline was closed") from error
            raise PipelineError(
                f"the process for chat templates did not start: {one_line(error) or 'it has ended'}; try again when "
                "the host has processes, memory and file descriptors to spare"
            ) from error
        return self._running

    def _end(self) -> None:
        if self._running is not None:
            self._running.end()
            self._running = None

    def close(self) -> None:
        """End the process now. A rendering that it is at fails."""
        self._closed = True
        if (running := self._running) is not None:
            running.kill()
        with self._lock:
            self._end()


class _Running:
    """The process, and this end of its socket."""

    def __init__(self) -> None:
        settings = {
            "paths": _paths("jinja2", "markupsafe"),
            "memory_bytes": _MEMORY_BYTES,
            "seconds": 2 * LIMIT_S,  # the parent is gone
            "characters": _MOST_CHARACTERS,
        }
        self._socket, other = socket.socketpair()
        self.end: Callable[[], object] = self._socket.close
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CHILD), json.dumps(settings)],
                stdin=other.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in _KEPT if name in os.environ},
                process_group=0,  # Ctrl-C is not for it
            )
        self.end = weakref.finalize(self, _end, self._process, self._socket)

    def kill(self) -> None:
        """Kill it; whoever waits for its answer gets an error."""
        self._process.kill()

    def ask(self, request: bytes, limit_s: float) -> tuple[str, str]:
        """Send a request; returns the kind of the answer, and its text."""
        until = time.monotonic() + limit_s
        self._socket.settimeout(limit_s)
        self._socket.sendall(struct.pack("!I", len(request)) + request)
        answer = self.receive(until - time.monotonic())
        return answer[:1].decode(errors="replace"), answer[1:].decode(errors="surrogatepass")

    def receive(self, limit_s: float) -> bytes:
        """The next message."""
        until = time.monotonic() + limit_s
        (size,) = struct.unpack("!I", self._exactly(4, until))
        if size > 4 * _MOST_CHARACTERS + 1:
            raise OSError("the answer is too long")
        return self._exactly(size, until)

    def _exactly(self, size: int, until: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(max(1e-3, until - time.monotonic()))
            part = self._socket.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    with suppress(OSError):
        process.kill()
    process.wait()


def _request(source: str, variables: dict[str, Any]) -> bytes:
    try:
        request = json.dumps({"source": source, "variables": variables}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"messages and variables of a chat template must be data of JSON, but: {one_line(error, 200)}"
        ) from error
    if len(request) > _MOST_REQUEST_BYTES:
        raise InputError(
            f"the messages and the chat template have {len(request)} bytes as JSON; at most {_MOST_REQUEST_BYTES} are "
            "allowed; shorten them"
        )
    return request


def _paths(*modules: str) -> list[str]:
    """The folders that hold some modules, which are not imported here."""
    folders = []
    for module in modules:
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise MissingDependency("chat templates need more packages: pip install 'onnxsplit[text]'")
        folders.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(folders))
