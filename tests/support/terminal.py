"""A program on a terminal of its own, and what that terminal shows in the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

_PIECES = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n])|([^\r\n\x1b]+)")


def on_terminal(code: str, environment, folder, *, columns: int = 80, arguments=()) -> str:
    """Run Python code whose standard streams are one terminal, until it ends; return all that it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm"}, cwd=folder,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:  # Linux reports the end of a terminal as an error
        pass
    os.close(ours)
    assert process.wait(60) == 0, written.decode(errors="replace")
    return written.decode()


def screen(written: str) -> list[str]:
    """Return the lines that a terminal shows, without colours; the last one has no line break."""
    lines, place = [""], 0
    for _, letter, control, text in _PIECES.findall(written):
        if control == "\n":
            lines.append("")
        elif control == "\r":
            place = 0
        elif letter == "K":
            lines[-1] = ""
        elif text:
            lines[-1] = lines[-1][:place].ljust(place) + text + lines[-1][place + len(text) :]
            place += len(text)
    return lines
