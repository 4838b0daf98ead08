"""The private folders of running coordinators on this host."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path


def private_folder() -> Path:
    """A new folder that only the user can open, whose socket paths fit the 107 bytes that Linux allows."""
    short = "/tmp" if len(tempfile.gettempdir()) > 60 else None  # noqa: S108  mkdtemp makes a private folder in it
    return Path(tempfile.mkdtemp(prefix="onnxsplit-", dir=short))


STATUS_SOCKET = "status"
"""Name, in a pipeline's folder, of the socket that answers how the pipeline is."""

_HELD = "held"


def running() -> list[Path]:
    """The status sockets of all pipelines of this user on this host, in the order of their folders."""
    return _mine(STATUS_SOCKET)


def _mine(name: str) -> list[Path]:
    """The files of a name in private folders of this user. Other processes make and remove folders meanwhile."""
    files = []
    for place in {tempfile.gettempdir(), "/tmp"}:  # noqa: S108  where private_folder puts them
        with suppress(OSError), os.scandir(place) as entries:
            folders = [Path(entry.path) for entry in entries if entry.name.startswith("onnxsplit-")]
            files += [folder / name for folder in folders if _is_mine(folder) and (folder / name).exists()]
    return sorted(files)


def _is_mine(folder: Path) -> bool:
    try:
        return folder.stat().st_uid == os.getuid()
    except OSError:  # it is gone
        return False


def hold(home: Path) -> int:
    """Mark a folder as in use while this process lives; returns the descriptor that does, for the caller to close."""
    draft = home / f".{_HELD}"
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    draft.rename(home / _HELD)  # only once it is locked: others remove folders whose mark nobody holds
    return descriptor


def sweep() -> None:
    """Remove the folders of pipelines, and of nodes started by hand, whose process was killed and could not do so.

    A folder is removed when it is marked (:func:`hold`) and no process holds the mark. Others stay.
    """
    for held in _mine(_HELD):
        with suppress(OSError), held.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(held.parent, ignore_errors=True)
