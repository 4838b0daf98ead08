"""How long does it take from a checkout to the first served answer, following the README alone?

The commands of the README run in their order, in a copy of the checkout with an environment of its own, until a client
has got an answer. Words are counted up to there. ``--only-needed`` leaves out what the answer does not need: the chat,
and cutting again, checking, running and measuring the demo's model.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import pages
import ports

from benchmarks import harness

TAKES = "4 min"

NEEDED = ("make demo", ". .venv", "pip install", "onnxsplit serve", "curl", "import numpy as np, tritonclient")
LAST = "tritonclient"  # in the block that asks the server


def steps() -> tuple[list[str], int]:
    """The README's commands and programs until a client has its answer, and the number of words up to there."""
    text = (harness.ROOT / "README.md").read_text()
    found: list[str] = []
    for kind, block in pages.blocks_of("README.md"):
        if kind == "console":
            found += [command for _, command in pages.commands(block)]
        elif kind == "python":
            found.append(block)
            if LAST in block:
                return found, len(text[: text.index(block) + len(block)].split())
    raise AssertionError("the README asks no server")


def checkout(folder: Path) -> None:
    """Copy the files that Git knows."""
    listed = subprocess.run(["git", "ls-files"], cwd=harness.ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(harness.ROOT / name, folder / name)


class Reader:
    """Runs the steps in a checkout, in the environment that the README makes there, with free ports."""

    def __init__(self, folder: Path, caches: Path | None) -> None:
        self._folder = folder
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        kept["PATH"] = f"{folder / '.venv' / 'bin'}:{kept['PATH']}"
        if caches is not None:
            kept |= {"PIP_CACHE_DIR": str(caches / "pip"), "XDG_CACHE_HOME": str(caches)}
        self._ports = {"8000": str(ports.free_port()), "8001": str(ports.free_port())}
        kept |= dict(zip(("ONNXSPLIT_SERVE_HTTP_PORT", "ONNXSPLIT_SERVE_GRPC_PORT"), self._ports.values(), strict=True))
        self._environment = kept
        self._server: subprocess.Popen[str] | None = None

    def run(self, step: str) -> float:
        """Run a step; return its seconds. A server takes those until it serves."""
        for written, port in self._ports.items():
            step = step.replace(f"localhost:{written}", f"localhost:{port}")
        begun = time.monotonic()
        if step.startswith("onnxsplit serve"):
            self._serve(step)
        else:
            command = ["bash", "-euc", step] if "\n" not in step else ["python", "-c", step]
            done = subprocess.run(
                command, cwd=self._folder, env=self._environment, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                sys.exit(f"{step}\n{done.stderr}")
        return time.monotonic() - begun

    def _serve(self, step: str) -> None:
        """Start the server, and wait until it says that it serves."""
        self._server = subprocess.Popen(
            shlex.split(step), cwd=self._folder, env=self._environment, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._server.stdout is not None
        if not self._server.stdout.readline().startswith("Serving"):
            sys.exit(f"{step} does not serve")

    def end(self) -> None:
        """Stop the server."""
        if self._server is not None:
            self._server.send_signal(signal.SIGTERM)
            self._server.wait(60)


def main() -> None:
    """Print the seconds of each step, and the words."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--cold", action="store_true", help="begin with empty caches of pip and of onnxsplit")
    parser.add_argument("--only-needed", action="store_true", help="leave out what the answer does not need")
    given = parser.parse_args()
    report = harness.Report(given, seconds="8.1f", step="s")
    found, words = steps()
    if given.only_needed:
        found = [step for step in found if step.startswith(NEEDED)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkout"
        folder.mkdir()
        checkout(folder)
        reader = Reader(folder, Path(name) / "caches" if given.cold else None)
        total = 0.0
        try:
            for step in found:
                seconds = reader.run(step)
                total += seconds
                report.row({"seconds": seconds, "step": step.splitlines()[0]})
        finally:
            reader.end()
    report.row({"seconds": total, "step": f"all {len(found)} steps; {words} words of the README"})


if __name__ == "__main__":
    main()
