"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxsplit.errors import PlanError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside the target, which takes its place at the end; nothing is left when that fails."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_parent(target: Path) -> None:
    """Refuse a plan whose folder would have to be made first.

    Raises:
        PlanError: naming it.
    """
    if not target.absolute().parent.is_dir():
        raise PlanError(
            f"the folder {target.absolute().parent} does not exist; create it or choose another with -o DIR"
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that takes the target's place when all went well, and leaves no trace when not."""
    target = target.absolute()
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise PlanError(f"cannot write into {target.parent}: {error.strerror}") from error
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)
        old = folder.with_suffix(".old")
        if target.is_dir():
            target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise PlanError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
