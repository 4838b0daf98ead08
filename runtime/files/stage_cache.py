"""The cache of stages that were fetched from a coordinator, one for all nodes of a user on a host.

The key of a stage is a hash of the names and SHA-256 of its files, so plans that have a stage in common share it. When
the cache would exceed its limit, stages that no node runs are evicted, the longest unused first.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from onnxsplit.file_cache import LockedCache
from onnxsplit.plan_base import FileEntry
from runtime.errors import PipelineError

DEFAULT_CACHE_BYTES = 64 << 30

FetchFile = Callable[[FileEntry, Path], None]
"""Fetches one file to a path, where an interrupted transfer may have left the first part of it."""


class StageCache:
    """The cache in a folder.

    Args:
        folder: the folder.
        limit_bytes: bytes that its files may take; a stage that is needed is kept even when it exceeds this.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._cache = LockedCache(folder)
        self._limit_bytes = limit_bytes

    def close(self) -> None:
        """Release the stages that this process ran; they may be evicted from now on."""
        self._cache.close()

    def discard(self, folder: Path) -> None:
        """Remove a damaged stage, so that it is fetched again; nodes that run it keep their files."""
        self._cache.discard(folder)

    def holds(self, folder: Path) -> bool:
        """Whether a folder belongs to the cache."""
        return folder.parent == self._cache.folder

    def obtain(self, files: Sequence[FileEntry], fetch: FetchFile) -> Path:
        """The folder with a stage's files, which are fetched if they are missing. They stay until :meth:`close`.

        Waits while another process fetches the same stage.

        Raises:
            PipelineError: the files cannot be fetched or kept.
        """
        key = _key(files)

        def fetch_all(folder: Path) -> None:
            wanted_bytes = sum(entry.size_bytes for entry in files)
            self._cache.evict(limit_bytes=self._limit_bytes - wanted_bytes, keep=key)
            for entry in files:
                fetch(entry, folder / entry.name)
                _sync(folder / entry.name)
            _sync(folder)

        try:
            return self._cache.obtain(key, fetch_all, resume=True)
        except OSError as error:
            problem = error.strerror or error
            raise PipelineError(f"cannot keep stage files in {self._cache.folder}: {problem}") from error


def _sync(path: Path) -> None:
    """Write a file or a folder to disk, so that a crash of the host does not leave a damaged entry."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key(files: Sequence[FileEntry]) -> str:
    lines = sorted(f"{entry.sha256} {entry.name}" for entry in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
