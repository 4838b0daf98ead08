"""The server under attack, in a separate process, and ways to talk to it that no client library offers."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from served import Served

LONG_BYTES = 64 << 10
"""No error's text may be longer."""


class Target:
    """``onnxsplit serve`` on free ports, and a process that keeps requesting its /v2/health/live.

    Args:
        plans: folders of the plans; one of them is ``chain.plan``.
        words: further arguments of the command line.
        chain: the reference for the model ``chain``: a function of its input.
        token: the token that it requires.

    Attributes:
        shown: the headers of a plain request.
    """

    def __init__(
        self, plans: Sequence[Path], words: Sequence[str], chain: Callable[[Any], Any], token: str = ""
    ) -> None:
        self.shown = {"Authorization": f"Bearer {token}"} if token else {}
        self._chain = chain
        self._served = Served(*plans, *words, environment=dict(os.environ))
        self.process, self.grpc = self._served.process, self._served.grpc
        self.host, self.port = "127.0.0.1", int(self._served.host.rpartition(":")[2])
        self.answers: list[tuple[float, float, str]] = []
        self._live = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "live.py"), self.host, str(self.port), token],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._live.stdout is not None
        for line in self._live.stdout:
            begun, took, status = line.split()
            self.answers.append((float(begun), float(took), status))

    def slowest_s(self, since: float, until: float) -> float:
        """Return the longest time of the answers that were pending in an interval, or its length if there were none."""
        found = [took for begun, took, _ in list(self.answers) if begun + took >= since and begun <= until]
        return max(found, default=until - since)

    def rss(self) -> int:
        """Return the resident memory of the gateway's process in bytes."""
        try:
            return int(psutil.Process(self.process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def nodes_rss(self) -> int:
        """Return the resident memory of its nodes together, in bytes."""
        total = 0
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    total += child.memory_info().rss
        return total

    def works(self, timeout: float = 10.0) -> str:
        """Send an ordinary request; return an empty text if the answer is right, else the failure."""
        x = np.random.default_rng().standard_normal((2, 32)).astype(np.float32)
        body = {"inputs": [{"name": "x", "shape": [2, 32], "datatype": "FP32", "data": x.ravel().tolist()}]}
        try:
            status, said = self.ask(
                "POST", "/v2/models/chain/infer", json.dumps(body).encode(), timeout=timeout, **self.shown
            )
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        if status != 200:
            return f"{status} {said[:200].decode(errors='replace')}"
        found = np.array(json.loads(said)["outputs"][0]["data"], np.float32).reshape(2, 32)
        return "" if np.allclose(found, self._chain(x), atol=1e-4) else "a wrong answer"

    def ask(
        self, method: str, path: str, body: bytes | None = None, *, timeout: float = 60.0, **headers: str
    ) -> tuple[int, bytes]:
        """Send one valid request; ``_`` in names of headers stands for ``-``."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def connect(self, *, grpc: bool = False, timeout: float = 60.0) -> socket.socket:
        """Open a bare connection."""
        host, _, port = self.grpc.rpartition(":") if grpc else (self.host, "", str(self.port))
        return socket.create_connection((host, int(port)), timeout=timeout)

    def talk(self, sent: bytes | Iterable[bytes], *, timeout: float = 60.0) -> str:
        """Send bytes unchanged, and wait for the end of one answer; return its status, or the end of the connection."""
        with self.connect(timeout=timeout) as connection:
            try:
                for piece in (sent,) if isinstance(sent, bytes) else sent:
                    connection.sendall(piece)
            except OSError:
                pass  # the server may have answered already
            answer = http.client.HTTPResponse(connection)
            try:
                answer.begin()
                body = answer.read()
            except TimeoutError:
                return "unanswered"
            except (OSError, http.client.HTTPException):
                return "closed"
            return status_text(answer.status, body)

    def end(self) -> str:
        """End the server with SIGTERM; return an empty text if it exits with 0 in time, else the failure."""
        if self._live.stdin is not None:
            self._live.stdin.close()
        self._live.wait(70)
        try:
            status = self._served.end()
            return f"ended with {status}: {''.join(self._served.log)[-4000:]}" if status else ""
        except subprocess.TimeoutExpired:
            children = psutil.Process(self.process.pid).children(recursive=True)
            for one in (*children, psutil.Process(self.process.pid)):
                with suppress(psutil.Error):
                    one.kill()
            self._served.wait()
            return "did not end within 90 s of SIGTERM"


def status_text(status: int, body: bytes) -> str:
    """Return a status, and what is wrong with its message."""
    if status < 400:
        return str(status)
    if len(body) > LONG_BYTES:
        return f"{status} in {len(body)} bytes"
    try:
        said = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"{status} without a reason"
    return str(status) if said else f"{status} without a reason"


def together(count: int, work: Callable[[int], str]) -> list[str]:
    """Run the same work in several threads at once."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@dataclass(frozen=True)
class Case:
    """One hostile request, or several.

    Attributes:
        name: a short description.
        send: sends it, and returns the status of each answer.
        expected: the statuses that are right.
        slow: whether it waits for a timeout of the server; slow cases run concurrently.
        most_mib: MiB by which the server's memory may grow; None for the run's own bound.
    """

    name: str
    send: Callable[[Target], str | list[str]]
    expected: frozenset[str]
    slow: bool = False
    most_mib: int | None = None


def case(
    name: str,
    expected: str,
    send: Callable[[Target], str | list[str]],
    *,
    slow: bool = False,
    most_mib: int | None = None,
) -> Case:
    """Make a case; ``expected`` names statuses, separated by blanks."""
    return Case(name, send, frozenset(expected.split()), slow, most_mib)


@dataclass
class Row:
    """The outcome of a case."""

    name: str
    said: str
    right: bool
    seconds: float
    grown_bytes: int
    live_s: float
    problems: list[str] = field(default_factory=list)


def run_case(target: Target, one: Case, bound_bytes: int) -> Row:
    """Run a case, and check the server during and after it."""
    before, ending, peak = target.rss(), threading.Event(), [0]

    def sample() -> None:
        while not ending.wait(0.01):
            peak[0] = max(peak[0], target.rss())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    begun = time.monotonic()
    try:
        found = one.send(target)
    except Exception as error:  # an error of the client: the server may be gone
        found = f"{type(error).__name__}: {str(error)[:100]}"
    took = time.monotonic() - begun
    ending.set()
    sampler.join()
    statuses = [found] if isinstance(found, str) else found
    grown = max(peak[0], target.rss()) - before
    row = Row(
        name=one.name,
        said=counted(statuses),
        right=bool(statuses) and set(statuses) <= one.expected,
        seconds=took,
        grown_bytes=grown,
        live_s=target.slowest_s(begun, time.monotonic()),
    )
    if not row.right:
        row.problems.append(f"said {row.said}, expected {' or '.join(sorted(one.expected))}")
    most = bound_bytes if one.most_mib is None else min(bound_bytes, one.most_mib << 20)
    if grown > most:
        row.problems.append(f"memory grew by {grown >> 20} MiB, at most {most >> 20} are allowed")
    return row


def counted(statuses: Sequence[str]) -> str:
    """Summarise statuses."""
    found = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    return ", ".join(status if count == 1 else f"{count} x {status}" for status, count in found.items()) or "nothing"


def later(send: Callable[[Target], str | list[str]], seconds: float = 40.0) -> Callable[[Target], str]:
    """Send a case that later checks whether ordinary requests are still answered correctly."""

    def sent(target: Target) -> str:
        send(target)
        time.sleep(seconds)
        return target.works() or "works"

    return sent


def own_region(size: int) -> tuple[str, Path]:
    """Open a shared memory object of this user; yield its key and its file."""
    handle, name = tempfile.mkstemp(prefix="hostile-", dir="/dev/shm")
    os.ftruncate(handle, size)
    os.close(handle)
    return "/" + Path(name).name, Path(name)


def metric(target: Target, pattern: str) -> str:
    """Return a value of /metrics."""
    found = re.search(pattern, target.ask("GET", "/metrics")[1].decode())
    return found[1] if found else ""
