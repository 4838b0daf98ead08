"""A reader who follows a page of the documentation: runs its blocks, in their order, in a clean folder."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pages
import ports
import stand_ins
from served import Served
from waiting import wait_until

ONNXSPLIT = [sys.executable, "-P", "-m", "onnxsplit"]
STAYS = (["onnxsplit", "node"], ["onnxsplit", "cluster", "agent"], ["systemctl"], ["sbatch"])
"""How commands begin that run until the reader is done."""


class Reader:
    """A reader who follows a page in a folder: runs its blocks, and keeps what it starts until the end.

    Another host is a folder in this one. Addresses of other hosts, and of servers, become ports of the loopback.

    Args:
        folder: where files are written and commands run.
        environment: of the commands.
        opened: ends servers and other processes in the background.
        says: what the reader types into a command that asks.
        moved: texts of the page, such as folders, and what they become.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        opened: ExitStack,
        *,
        says: str = "",
        moved: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        path = stand_ins.write(folder / ".commands")
        self.environment = {**environment, "PATH": path, "PLACE": str(folder)}
        self.opened = opened
        self.says = says
        self.moved = dict(moved or {})
        self.addresses: dict[str, str] = {}
        self.said = ""
        self.server: Served | None = None
        self._to_serve: list[list[str]] = []

    def follow(self, kind: str, block: str) -> None:
        """Run a block as its kind says; a drawing has nothing to run."""
        if kind == "console":
            self.said = ""
            for host, command in pages.commands(block):
                self.type(command, host)
            self._serve_waiting()
        elif kind == "python":
            self.run([sys.executable, "-c", self.here(block)])
        elif kind == "output":
            assert re.search(pages.pattern(block), self.said), (
                f"the page shows\n{block}\nand the commands said\n{self.said}"
            )
        elif named := re.fullmatch(r'\w+ title="(\S+)"', kind):
            (self.folder / named[1]).write_text(block)
        else:
            assert kind == "text", f"a block of a kind that nobody runs: {kind!r}"

    def type(self, command: str, host: str = "") -> None:
        """Run a command on a host, or check it where running it would install something."""
        text = self.here(command)
        words = shlex.split(text, comments=True)
        match words:
            case ["make", target]:
                self.run(recipe(target))
            case ["pip", *rest]:
                check_installation(rest)
            case ["python3", "-m", "venv", folder]:
                assert folder == makefile_variable("VENV")
            case [".", file]:
                assert file == f"{makefile_variable('VENV')}/bin/activate"
            case ["export", setting]:
                name, _, value = setting.partition("=")
                self.environment[name] = value
            case ["onnxsplit", "serve", *rest] if "none" in rest:
                self._to_serve.append(rest)  # its nodes are started by the commands that follow
            case ["onnxsplit", "serve", *rest]:
                self.serve(rest)
            case [*_, "&"]:
                self.start(text.partition(" #")[0].removesuffix("&"), host)
            case _ if any(words[: len(beginning)] == beginning for beginning in STAYS) or "systemctl" in words:
                self.start(text, host)
            case _:
                self.run(["bash", "-euc", text], host)

    def here(self, text: str) -> str:
        """A text of the page with what stands for it here."""
        for found in re.findall(r"\b10\.0\.0\.\d:\d+", text):
            self.addresses.setdefault(found, f"127.0.0.1:{ports.free_port()}")
        for written, address in {**self.moved, **self.addresses}.items():
            text = text.replace(written, address)
        return text

    def run(self, command: list[str], host: str = "") -> None:
        """Run a command to its end; it must succeed."""
        done = subprocess.run(
            command, cwd=self._of(host), env=self.environment, input=self.says, capture_output=True, text=True,
            check=False, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        self.said += done.stdout

    def start(self, command: str, host: str = "") -> None:
        """Start a command in the background, in a process group of its own, which ends with the reader."""
        log = self._of(host) / f"background-{len(self.addresses)}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                ["bash", "-euc", command], cwd=self._of(host), env=self.environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            )  # fmt: skip
        self.opened.callback(end_group, process)

    def serve(self, words: list[str]) -> None:
        """Start the server, on free ports; it is stopped, and must exit with 0, when the reader is done."""
        described = subprocess.run(
            [*ONNXSPLIT, "serve", "--help"], env=self.environment, capture_output=True, text=True, check=True
        )
        assert re.search(r"default:\s+8000\b", described.stdout)
        assert re.search(r"default:\s+8001\b", described.stdout)
        self.server = self.opened.enter_context(Served(*words, environment=self.environment, folder=self.folder))
        for host in ("localhost", "127.0.0.1"):
            self.addresses |= {f"{host}:8000": self.server.host, f"{host}:8001": self.server.grpc}

    def _serve_waiting(self) -> None:
        waiting, self._to_serve = self._to_serve, []
        for words in waiting:
            self.serve(words)

    def _of(self, host: str) -> Path:
        folder = self.folder / host
        folder.mkdir(exist_ok=True)
        return folder


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started, like Ctrl-C in its terminal."""

    def ended() -> bool:
        process.poll()
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    try:
        os.killpg(process.pid, signal.SIGTERM)
        wait_until(ended, "the end of a command in the background")
    except ProcessLookupError:
        pass
    except AssertionError:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        process.wait(60)


def makefile_variable(name: str) -> str:
    """A variable's default value in the Makefile."""
    return re.search(rf"^{name} \?= (.+)$", (pages.ROOT / "Makefile").read_text(), re.MULTILINE)[1]


def recipe(target: str) -> list[str]:
    """The one command of a target in the Makefile, with this Python, and less work."""
    line = re.search(rf"^{target}:.*\n\t(.+)$", (pages.ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    program, script = line.split()
    assert program == "$(BIN)/python"
    less_work = {"demo": ["--slices", "3"], "chat": ["--max-tokens", "60"]}
    return [sys.executable, str(pages.ROOT / script), *less_work[target]]


def check_installation(words: list[str]) -> None:
    """A ``pip install`` of this project names extras that exist; others name a package."""
    assert words[0] == "install"
    if own := re.fullmatch(r"(?:\.|onnxsplit)\[(.+)\]", next(word for word in words[1:] if word != "-e")):
        project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
        assert set(own[1].split(",")) <= project["optional-dependencies"].keys()
