"""Stage files that came from elsewhere, kept by what is in them: one copy a host, whoever asked for it.

    FOLDER/KEY/            the files of a stage, whole and checked; KEY is a hash of their names and hashes
    FOLDER/KEY.partial/    on their way; the next try goes on from here
    FOLDER/KEY.lock        held by all who run the stage or wait for it, together: who would remove it wants it alone
    FOLDER/KEY.making      held by who fetches it, alone

When the cache would outgrow its bound, stages that nobody runs go, the longest unused first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from onnxsplit.plan import FileEntry, Stage
from runtime.errors import PipelineError

DEFAULT_CACHE_BYTES = 64 << 30

FetchFile = Callable[[FileEntry, Path], None]
"""Brings one file to a path, where some of it may be already."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/onnxsplit/stages``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxsplit" / "stages"


class StageCache:
    """The cache of this host's user.

    Args:
        folder: where it is.
        limit_bytes: that its files may take; a stage that is needed is kept all the same.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._held: dict[str, int] = {}  # locks of the stages that this process runs

    def close(self) -> None:
        """Let the stages go that this process ran."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    def discard(self, folder: Path) -> None:
        """Have a stage fetched anew by whoever obtains it next: what is here is damaged. Others who run it go on."""
        with (self._folder / f"{folder.name}.making").open("wb") as making:
            fcntl.flock(making, fcntl.LOCK_EX)
            shutil.rmtree(folder, ignore_errors=True)

    def holds(self, folder: Path) -> bool:
        """Whether a folder is the cache's."""
        return folder.parent == self._folder

    def obtain(self, stage: Stage, fetch: FetchFile) -> Path:
        """A folder with the stage's files; they stay until :meth:`close`.

        Waits while another process fetches the same stage.

        Raises:
            PipelineError: they cannot be had or kept.
        """
        key = _key(stage)
        target = self._folder / key
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if key not in self._held:
                self._held[key] = os.open(self._folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._held[key], fcntl.LOCK_SH)
            if not target.is_dir():
                with (self._folder / f"{key}.making").open("wb") as making:
                    fcntl.flock(making, fcntl.LOCK_EX)
                    if not target.is_dir():
                        self._bring(stage, target, fetch)
            os.utime(target)
            return target
        except OSError as error:
            raise PipelineError(f"cannot keep stage files in {self._folder}: {error.strerror or error}") from error

    def _bring(self, stage: Stage, target: Path, fetch: FetchFile) -> None:
        self._make_room(sum(entry.size_bytes for entry in stage.files), target.name)
        partial = target.with_suffix(".partial")
        partial.mkdir(mode=0o700, exist_ok=True)
        for entry in stage.files:
            fetch(entry, partial / entry.name)
            _to_disk(partial / entry.name)
        _to_disk(partial)
        partial.rename(target)

    def _make_room(self, wanted_bytes: int, key: str) -> None:
        """Remove what nobody runs, the longest unused first, until there is room within the bound."""
        folders = [entry for entry in self._folder.iterdir() if entry.is_dir() and entry.stem != key]
        known = {folder: _size_and_age(folder) for folder in folders}
        total = sum(size for size, _ in known.values()) + wanted_bytes
        for folder, (size, _) in sorted(known.items(), key=lambda one: one[1][1]):
            if total <= self._limit_bytes:
                return
            lock = os.open(self._folder / f"{folder.stem}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                with suppress(BlockingIOError):  # somebody runs it
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                    total -= size
            finally:
                os.close(lock)


def _size_and_age(folder: Path) -> tuple[int, float]:
    """Bytes, and when it was last used; other processes may be renaming or removing it."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir()), folder.stat().st_mtime
    except FileNotFoundError:
        return 0, 0.0


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key(stage: Stage) -> str:
    lines = sorted(f"{entry.sha256} {entry.name}" for entry in stage.files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
