"""Folders for plans that are made while a pipeline serves. They belong to the process, and go with it."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from onnxsplit.file_cache import LockedCache, cache_folder
from runtime.errors import RecutFailed

_SUFFIXES = (".lock", ".making")
_YOUNG_S = 60.0  # a lock may be younger than its plan


class PlanFolder:
    """A plan that was made here, in ``$XDG_CACHE_HOME/onnxsplit/recuts`` (``~/.cache`` without this variable).

    Args:
        make: writes the plan at the path that it is given, or nothing.

    Attributes:
        plan: the plan directory; None if nothing was written.

    Raises:
        RecutFailed: the plan cannot be kept there.
    """

    def __init__(self, make: Callable[[Path], None]) -> None:
        self._cache = LockedCache(cache_folder("recuts"))
        self._key = secrets.token_hex(8)
        try:
            self._entry = self._cache.obtain(self._key, lambda draft: make(draft / "new.plan"))
            _remove_left(self._cache, keep=self._key)
        except OSError as error:
            self._end()
            raise RecutFailed(
                f"the new plan cannot be kept in {self._cache.folder}: {error}. Free some space, or set XDG_CACHE_HOME "
                "to another folder"
            ) from error
        except BaseException:
            self._end()
            raise
        plan = self._entry / "new.plan"
        self.plan = plan if plan.is_dir() else None
        self._finalizer = weakref.finalize(self, _remove, self._cache, self._key, self._entry)

    def close(self) -> None:
        """Remove it. Closing twice has the same effect as once; it is also closed when this process ends."""
        self._finalizer()

    def _end(self) -> None:
        _remove(self._cache, self._key, None)


def remove_left_plans() -> None:
    """Remove the plans that killed processes have left."""
    cache = LockedCache(cache_folder("recuts"))
    if cache.folder.is_dir():
        with suppress(OSError):
            _remove_left(cache)


def _remove_left(cache: LockedCache, keep: str = "") -> None:
    cache.evict(unused_s=0.0, keep=keep)
    _remove_locks(cache.folder)


def _remove(cache: LockedCache, key: str, entry: Path | None) -> None:
    if entry is not None:
        with suppress(OSError):
            cache.discard(entry)
    cache.close()
    for suffix in _SUFFIXES:
        with suppress(OSError):
            (cache.folder / f"{key}{suffix}").unlink()


def _remove_locks(folder: Path) -> None:
    """Remove the locks of plans that are gone; those that a process holds stay."""
    for lock in folder.glob("*.lock"):
        with suppress(OSError):
            if (folder / lock.stem).exists() or time.time() - lock.stat().st_mtime < _YOUNG_S:
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for suffix in _SUFFIXES:
                    (folder / f"{lock.stem}{suffix}").unlink(missing_ok=True)
            finally:
                os.close(descriptor)
