"""A server in a separate process, as a user starts it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from email.message import Message
from pathlib import Path
from typing import Any

PENDING = "nv_inference_pending_request_count"


class Served:
    """``onnxsplit serve`` on free ports; a context manager that ends it with SIGTERM.

    Args:
        words: further words of the command.
        environment: its environment.
        folder: the folder in which it runs.
        program: the words that stand for ``onnxsplit``.
    """

    def __init__(
        self,
        *words: object,
        environment: dict[str, str],
        folder: Path | None = None,
        program: Sequence[str] = ("-m", "onnxsplit"),
    ) -> None:
        command = [sys.executable, "-P", *program, "serve", "--json", "--http-port", "0", "--grpc-port", "0"]
        self.process = subprocess.Popen(
            [*command, *map(str, words)], env=environment, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        line = self.process.stdout.readline()
        if not line or "error" in json.loads(line):
            self.process.wait(timeout=60)
            self._reader.join()
            raise AssertionError(f"the server did not start: {line}{''.join(self.log)}")
        said = json.loads(line)
        self.http: str = said["http"]
        self.grpc: str = said["grpc"]
        self.host = self.http.partition("//")[2]

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.end() == 0, "".join(self.log[-20:])

    def end(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end and return the exit status."""
        status = self.process.wait(timeout=90)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status

    def ask(
        self, path: str, body: bytes | None = None, *, method: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one HTTP request; return status, headers and body."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"{self.http}{path}", body, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, _named(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _named(error.headers), error.read()

    def metric(self, name: str, labels: str = "") -> float:
        """Return the sum of a metric over all series with these labels."""
        text = self.ask("/metrics")[2].decode()
        return sum(map(float, re.findall(rf"^{name}\{{.*{labels}.*\}} (\S+)$", text, re.MULTILINE)))

    def json(self, path: str, body: Any = None) -> Any:
        """Return the JSON of a path; an object is posted as JSON."""
        status, _, found = self.ask(path, None if body is None else json.dumps(body).encode())
        assert status == 200, found
        return json.loads(found)


def _named(headers: Message) -> dict[str, str]:
    """Headers by their names in lower case; several of one name are joined, as HTTP allows."""
    return {name.lower(): ", ".join(headers.get_all(name) or ()) for name in headers}
