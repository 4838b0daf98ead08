"""A reader who follows a page of the documentation: runs its blocks, in their order, in a clean folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from pathlib import Path

import pages
from served import Served

ONNXSPLIT = [sys.executable, "-P", "-m", "onnxsplit"]


class Reader:
    """A reader who follows the README in a folder: runs its blocks, and keeps its server until the end."""

    def __init__(self, folder: Path, environment: dict[str, str], opened: ExitStack) -> None:
        self.folder = folder
        self.environment = environment
        self.opened = opened
        self.addresses: dict[str, str] = {}
        self.answers: list[str] = []  # what curl and Python have printed

    def follow(self, kind: str, block: str) -> None:
        """Run a block as its kind says."""
        if kind == "console":
            for command in pages.commands(block):
                self.type(command)
        elif kind == "python":
            self.answers.append(self.run([sys.executable, "-c", self.here(block)]))
        elif named := re.fullmatch(r'python title="(\S+)"', kind):
            (self.folder / named[1]).write_text(block)

    def type(self, command: str) -> None:
        """Run a command, or check it where running it would install something."""
        program, *words = shlex.split(self.here(command))
        if program == "make":
            self.run(recipe(*words))
        elif program == "pip":
            check_installation(words)
        elif program == "python3":
            assert words == ["-m", "venv", makefile_variable("VENV")]
        elif program == "python":
            self.run([sys.executable, *words])
        elif program == ".":
            assert words == [f"{makefile_variable('VENV')}/bin/activate"]
        elif program == "onnxsplit" and words[0] == "serve":
            self.serve(words[1:])
        elif program == "onnxsplit":
            self.run([*ONNXSPLIT, *words])
        else:
            assert program == "curl", f"the page has a command that this test cannot run: {command}"
            self.answers.append(self.run(["curl", "--fail", "--silent", *words]))

    def here(self, text: str) -> str:
        """A text with the README's addresses replaced by those of the server."""
        for written, address in self.addresses.items():
            text = text.replace(written, address)
        return text

    def run(self, command: list[str]) -> str:
        """Run a command to its end, which must be a success; return its output."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def serve(self, words: list[str]) -> None:
        """Start the server, on free ports; it is stopped, and must exit with 0, when the reader is done."""
        described = subprocess.run(
            [*ONNXSPLIT, "serve", "--help"], env=self.environment, capture_output=True, text=True, check=True
        )
        assert re.search(r"default:\s+8000\b", described.stdout)
        assert re.search(r"default:\s+8001\b", described.stdout)
        server = self.opened.enter_context(Served(*words, environment=self.environment, folder=self.folder))
        self.addresses = {"localhost:8000": server.host, "localhost:8001": server.grpc}


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
    """A ``pip install`` of this checkout names extras that exist."""
    assert words[:-1] == ["install", "-e"]
    extras = re.fullmatch(r"\.\[(.+)\]", words[-1])[1].split(",")
    project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) <= project["optional-dependencies"].keys()
