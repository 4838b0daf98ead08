"""The private folders of coordinators and nodes on this host."""

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
"""File name of a pipeline's status socket, in the pipeline's folder."""

_HELD = "held"


def running() -> list[Path]:
    """The status sockets of this user's pipelines on this host, sorted by folder."""
    return _user_files(STATUS_SOCKET)


def _user_files(name: str) -> list[Path]:
    """The files of this name in this user's private folders, which other processes may remove meanwhile."""
    files = []
    for place in {tempfile.gettempdir(), "/tmp"}:  # noqa: S108  where private_folder puts them
        with suppress(OSError), os.scandir(place) as entries:
            folders = [Path(entry.path) for entry in entries if entry.name.startswith("onnxsplit-")]
            files += [folder / name for folder in folders if _belongs_to_user(folder) and (folder / name).exists()]
    return sorted(files)


def _belongs_to_user(folder: Path) -> bool:
    try:
        return folder.stat().st_uid == os.getuid()
    except OSError:  # it was removed meanwhile
        return False


def hold(home: Path) -> int:
    """Mark a folder as in use while this process lives; returns the descriptor that holds the mark."""
    draft = home / f".{_HELD}"
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    draft.rename(home / _HELD)  # only once it is locked: other processes remove folders whose mark no process holds
    return descriptor


def sweep() -> None:
    """Remove the folders that killed pipelines, and killed nodes that were started by hand, have left behind.

    A folder is removed when it is marked (:func:`hold`) and no process holds the mark. Others stay.
    """
    for held in _user_files(_HELD):
        with suppress(OSError), held.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(held.parent, ignore_errors=True)
