"""Safe reading of files that users name, and atomic writing of files and folders."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from onnxsplit.errors import InputError, PlanError
from onnxsplit.numbers import MOST_FILE_BYTES

MOST_TEXT_BYTES = 1 << 20
"""The largest size in bytes of a file of settings, keys or tokens."""

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a folder",
}


def is_text(path: Path) -> bool:
    """Whether a path is UTF-8 text, which ONNX Runtime, JSON and messages require."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_regular(path: Path, *, most_bytes: int = MOST_FILE_BYTES) -> None:
    """Refuse a path that is not a regular file of at most ``most_bytes``. Nothing is opened, so nothing can block.

    Raises:
        OSError: the file is missing, is not a regular file, or is too large; ``strerror`` says which.
    """
    check_name(path)
    _check_regular(path, path.stat(), most_bytes)


def open_regular(path: Path, *, most_bytes: int = MOST_FILE_BYTES) -> BufferedReader:
    """Open a regular file for reading. Nothing blocks, even if a FIFO or a device replaces the file.

    Raises:
        OSError: as for :func:`check_regular`, or the file may not be read.
    """
    check_regular(path, most_bytes=most_bytes)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _check_regular(path, os.fstat(descriptor), most_bytes)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, *, most_bytes: int) -> bytes:
    """Read a regular file of at most ``most_bytes``.

    Raises:
        OSError: as for :func:`open_regular`.
    """
    with open_regular(path, most_bytes=most_bytes) as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:  # the file has grown, or it lies in /proc, where sizes are not real
        raise _too_large(path, len(content), most_bytes)
    return content


def _check_regular(path: Path, status: os.stat_result, most_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(number, f"it is {_kind(status.st_mode)}; only a regular file can be read", str(path))
    if status.st_size > most_bytes:
        raise _too_large(path, status.st_size, most_bytes)


def check_name(path: Path) -> None:
    """Refuse a path that no file can have.

    Raises:
        OSError: the path holds a NUL byte.
    """
    if "\0" in str(path):  # Python would raise a ValueError
        raise OSError(errno.EINVAL, "its name holds a NUL byte, which is not allowed", str(path))


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def _too_large(path: Path, size_bytes: int, most_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"it has {size_bytes} bytes or more; at most {most_bytes} are allowed", str(path))


def written_file(target: Path) -> Path:
    """The file that writing to a path changes: the path itself, or the target of its link. The file need not exist yet.

    Raises:
        OSError: the file exists and is not a regular file, so replacing it would destroy a device, a FIFO or a folder.
    """
    check_name(target)
    real = Path(os.path.realpath(target))
    try:
        mode = real.stat().st_mode
    except FileNotFoundError:
        return real
    if not stat.S_ISREG(mode):
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, f"it is {_kind(mode)}; only a regular file can be replaced", str(target))
    return real


def check_outputs(*targets: Path | None) -> None:
    """Refuse output files that cannot be written, before the work for them starts. None is skipped.

    Raises:
        InputError: names the first such file.
    """
    for target in targets:
        if target is not None:
            try:
                written_file(target)
            except OSError as error:
                raise InputError(f"cannot write {target}: {error.strerror}. Choose another file") from error


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path that replaces the target at the end of the ``with`` block, or is removed on failure.

    If the target is a link, it stays a link, and the file that it leads to is replaced.

    Raises:
        OSError: as for :func:`written_file`, or the target cannot be written.
    """
    target = written_file(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        written_file(target)  # another file may have replaced it meanwhile
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_parent(target: Path, option: str = "-o") -> None:
    """Refuse a plan directory whose parent folder does not exist.

    Args:
        target: the plan directory.
        option: the command's option that names it, for the message.

    Raises:
        PlanError: names the parent folder.
    """
    if not target.absolute().parent.is_dir():
        raise PlanError(
            f"the folder {target.absolute().parent} does not exist; create it or choose another with {option} DIR"
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder that replaces the target at the end of the ``with`` block, or is removed on failure.

    Raises:
        PlanError: the folder cannot be written.
    """
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
