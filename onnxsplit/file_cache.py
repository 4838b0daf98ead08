"""A cache of files on disk that several processes share, such as fetched stages or packed weights.

    FOLDER/KEY/            one entry: a folder with its files, complete
    FOLDER/KEY.partial/    an entry in the making
    FOLDER/KEY.removed/    an entry that is being removed
    FOLDER/KEY.lock        locked shared by every process that uses the entry, exclusively by the one that removes it
    FOLDER/KEY.making      locked exclusively by the process that makes the entry

An entry appears and disappears by a rename, so a process finds it either complete or not at all.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder of a cache of this user: ``$XDG_CACHE_HOME/onnxsplit/KIND``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxsplit" / kind


class LockedCache:
    """A cache in a folder; a context manager that releases the entries it has obtained.

    Args:
        folder: where the cache is; made when an entry is first obtained.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._locks: dict[str, int] = {}  # descriptors of the shared locks that this process holds

    def __enter__(self) -> LockedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release all entries; other processes may remove them from now on."""
        for descriptor in self._locks.values():
            os.close(descriptor)
        self._locks.clear()

    def obtain(self, key: str, make: Callable[[Path], None], *, resume: bool = False) -> Path:
        """The folder of an entry, which is made if it is missing. It stays until :meth:`close`.

        Waits while another process makes the same entry.

        Args:
            key: the name of the entry, without a dot.
            make: writes the entry's files into a folder.
            resume: whether ``make`` continues from the files that an interrupted call has left in that folder.

        Raises:
            OSError: the entry cannot be kept, or ``make`` has raised it.
        """
        entry = self.folder / key
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if key not in self._locks:
            self._locks[key] = _open_lock(self.folder / f"{key}.lock")
        fcntl.flock(self._locks[key], fcntl.LOCK_SH)
        if not entry.is_dir():
            with (self.folder / f"{key}.making").open("wb") as making:
                fcntl.flock(making, fcntl.LOCK_EX)
                if not entry.is_dir():
                    self._make(entry, make, resume)
        os.utime(entry)
        return entry

    def _make(self, entry: Path, make: Callable[[Path], None], resume: bool) -> None:
        draft = entry.with_suffix(".partial")
        if not resume:
            shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700, exist_ok=True)
        try:
            make(draft)
            draft.rename(entry)
        finally:
            if not resume:
                shutil.rmtree(draft, ignore_errors=True)

    def discard(self, entry: Path) -> None:
        """Remove a damaged entry, which :meth:`obtain` then makes again; processes that use it keep their files."""
        with (self.folder / f"{entry.name}.making").open("wb") as making:
            fcntl.flock(making, fcntl.LOCK_EX)
            _remove(entry)

    def evict(self, *, limit_bytes: int = sys.maxsize, unused_s: float = math.inf, keep: str = "") -> None:
        """Remove entries that no process uses, the longest unused first.

        Args:
            limit_bytes: remove entries until those that are left take at most this.
            unused_s: also remove entries that were not obtained for this long.
            keep: the key of an entry that is neither removed nor counted.
        """
        folders = [entry for entry in self.folder.iterdir() if entry.is_dir() and entry.stem != keep]
        known = {folder: _size_and_time(folder) for folder in folders}
        total = sum(size for size, _ in known.values())
        oldest = time.time() - unused_s
        for folder, (size, used) in sorted(known.items(), key=lambda item: item[1][1]):
            if total <= limit_bytes and used >= oldest:
                return
            lock = _open_lock(self.folder / f"{folder.stem}.lock")
            try:
                with suppress(BlockingIOError):  # a process uses the entry
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(folder)
                    total -= size
            finally:
                os.close(lock)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _remove(folder: Path) -> None:
    removed = folder.with_suffix(".removed")
    if folder != removed:
        shutil.rmtree(removed, ignore_errors=True)
        with suppress(FileNotFoundError):  # another process has removed it
            folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _size_and_time(folder: Path) -> tuple[int, float]:
    """Bytes of an entry, and when it was last obtained; 0 when another process has just renamed or removed it."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir()), folder.stat().st_mtime
    except FileNotFoundError:
        return 0, 0.0
