"""`onnxsplit serve` in a separate process, for the peers that call it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from peer import Plan


@contextmanager
def served(plan: Plan) -> Iterator[dict[str, str]]:
    """A server with one thread per stage on free ports: its address, and the model's name."""
    command = [sys.executable, "-P", "-m", "onnxsplit", "serve", str(plan.folder), "--json", "--threads", "1"]
    server = subprocess.Popen(
        [*command, "--http-port", "0", "--grpc-port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        said = json.loads(server.stdout.readline())
        yield {"http": said["http"].partition("//")[2], "grpc": said["grpc"], "model": next(iter(said["models"]))}
    finally:
        server.terminate()
        server.wait()
