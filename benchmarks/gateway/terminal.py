"""What do serve and status show on a terminal of 80 columns? Draws docs/terminal-serve.svg and terminal-status.svg.

Both run on a pseudo-terminal, and four callers send requests to the server while ``status`` looks.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from waiting import wait_until

from benchmarks import harness

TAKES = "30 s"

DOCS = harness.ROOT / "docs"
COLUMNS = 80
ANSWERS = 100  # before status looks
ONNXSPLIT = [sys.executable, "-P", "-m", "onnxsplit"]


class Screen:
    """What a program has written to its terminal so far."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self.written = b""
        self._terminal = terminal
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self._terminal, 65536):
                self.written += piece
        except OSError:  # Linux reports the end of a terminal as an error
            pass
        os.close(self._terminal)

    def end(self) -> None:
        """Wait for the program's end."""
        self.process.wait(60)
        self._reader.join(60)


@contextmanager
def on_terminal(words: list[str], folder: Path) -> Iterator[Screen]:
    """Run a command on a terminal of its own, and end it with SIGTERM."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [*ONNXSPLIT, *words], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder,
        env={**environment, "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    screen = Screen(process, ours)
    try:
        yield screen
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        screen.end()


def draw(name: str, words: list[str], written: bytes) -> Path:
    """Draw a command and what a terminal shows of its output, without fonts of other hosts."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    console.print(Text(f"$ onnxsplit {' '.join(words)}", style="bold"))
    for line in written.decode().rstrip().split("\r\n"):
        shown = re.split(r"\r|\x1b\[[0-9]*K", line)[-1]  # what was overwritten is gone
        text = Text.from_ansi(shown)
        for part in text.divide(range(COLUMNS, len(text), COLUMNS)) if len(text) > COLUMNS else [text]:
            console.print(part, no_wrap=True, overflow="ignore")
    path = DOCS / f"terminal-{name}.svg"
    drawing = console.export_svg(title="", unique_id=f"terminal-{name}")
    path.write_text(re.sub(r"\s*@font-face \{.*?\}", "", drawing, flags=re.DOTALL))
    return path


def served(screen: Screen) -> str:
    """Wait until the server says that it serves, and return its address."""
    wait_until(lambda: b"Stop" in screen.written, "the server's start")
    found = re.search(rb"HTTP +(http://\S+)", screen.written)
    assert found is not None
    return found[1].decode()


@contextmanager
def load(ask: Callable[[], Any]) -> Iterator[None]:
    """Ask again and again in four threads."""
    ending = threading.Event()

    def go_on() -> None:
        while not ending.is_set():
            ask()

    callers = [threading.Thread(target=go_on) for _ in range(4)]
    for caller in callers:
        caller.start()
    yield
    ending.set()
    for caller in callers:
        caller.join()


def main() -> None:
    """Draw both."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("plan", type=Path, metavar="MODEL.plan")
    given = parser.parse_args()
    report = harness.Report(given)
    folder = Path(tempfile.mkdtemp())
    plan = given.plan.name
    shutil.copytree(given.plan, folder / plan)
    try:
        serve = ["serve", plan, "--replicas", "1=2"]
        with on_terminal(serve, folder) as screen:
            address = served(screen)
            started = screen.written
            example = urllib.request.urlopen(f"{address}/example/{plan.removesuffix('.plan')}", timeout=60)
            headers, body = dict(example.headers), example.read()
            length = {"Inference-Header-Content-Length": headers["inference-header-content-length"]}

            answers: list[int] = []

            def ask() -> None:
                path = f"{address}/v2/models/{plan.removesuffix('.plan')}/infer"
                with urllib.request.urlopen(urllib.request.Request(path, body, length), timeout=60) as answer:
                    answers.append(len(answer.read()))

            with load(ask):
                wait_until(lambda: len(answers) > ANSWERS, "a load that goes on")
                status = ["status", "--once", "--pid", str(screen.process.pid)]  # not those of others
                with on_terminal(status, folder) as shown:
                    shown.end()
        seen = shown.written.replace(str(folder).encode(), b"/srv/models")  # the real folder is a temporary one
        paths = [draw("serve", serve, started), draw("status", status, seen)]
    finally:
        shutil.rmtree(folder)
    written = [str(path.relative_to(harness.ROOT)) for path in paths]
    report.row({"written": written}, f"Wrote {', '.join(written)}")


if __name__ == "__main__":
    main()
