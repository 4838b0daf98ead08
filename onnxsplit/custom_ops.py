"""Libraries of custom ops: which of them a process may load, and whether a file is unchanged since it was named.

Such a library is code that runs with the rights of the process, so a process loads only libraries that its user named.
A plan lists the libraries that its stages need by name and SHA-256, without paths.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec

from onnxsplit.errors import CustomOpsError, shown
from onnxsplit.files import is_text, open_regular
from onnxsplit.plan import CustomOps, Plan

EXTENSIONS = "onnxruntime-extensions"
"""The only library that is named by its package instead of its file."""

_PACKAGE, _MODULE = "onnxruntime_extensions", "_extensions_pydll"
_MOST_BYTES = 8 << 30


class Library(msgspec.Struct, frozen=True):
    """A library that the user of this process named.

    Attributes:
        name: its name in plans: the name of its file, or ``onnxruntime-extensions``.
        path: its file, absolute and without links, so that libraries beside it are found.
        sha256: the SHA-256 of the file, in hexadecimal.
    """

    name: str
    path: str
    sha256: str


def find_libraries(given: object) -> tuple[Library, ...]:
    """Find the libraries that a user names, each once, and hash them. Nothing is loaded.

    Args:
        given: a file, or ``onnxruntime-extensions`` for the library in the package of that name; or several of them.

    Raises:
        CustomOpsError: a file cannot be read, or the package is not installed.
    """
    libraries = [_library(name) for name in named(given)]
    return tuple({library.sha256: library for library in reversed(libraries)}.values())[::-1]


def named(given: object) -> tuple[str, ...]:
    """The names that a user gives: ``onnxruntime-extensions`` and absolute paths. Nothing is opened.

    Raises:
        CustomOpsError: the value is neither a name nor a list of names.
    """
    one = isinstance(given, str | os.PathLike) or not isinstance(given, Iterable)
    names: list[Any] = [given] if one else list(given)  # type: ignore[call-overload]
    if not all(isinstance(name, str | os.PathLike) for name in names):
        raise CustomOpsError(f"custom op libraries are named by their files, in a list; {shown(given)} is not one")
    texts = [os.fsdecode(name) for name in names]
    wrong = next((text for text in texts if not text or not is_text(Path(text))), None)
    if wrong is not None:
        raise CustomOpsError(f"the name of a custom op library, {wrong!r}, is empty or not UTF-8 text; name a file")
    return tuple(text if text == EXTENSIONS else str(Path(text).absolute()) for text in texts)


def check_names(given: Sequence[Library]) -> None:
    """Refuse different libraries of the same name, because a plan tells them apart by name.

    Raises:
        CustomOpsError: names both files.
    """
    files: dict[str, str] = {}
    for library in given:
        other = files.setdefault(library.name, library.path)
        if other != library.path:
            raise CustomOpsError(
                f"two custom op libraries are called {library.name!r}: {other} and {library.path}; rename one file"
            )


def _library(text: str) -> Library:
    path = _extensions() if text == EXTENSIONS else Path(text)
    with _opened(path) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    name = EXTENSIONS if text == EXTENSIONS else path.name
    return Library(name=name, path=os.path.realpath(path), sha256=digest)


def _extensions() -> Path:
    """The library that ``onnxruntime_extensions.get_library_path()`` names, found without loading it.

    Raises:
        CustomOpsError: the package is not installed, or holds no library.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CustomOpsError(
            f"the package {EXTENSIONS} is not installed here: pip install {EXTENSIONS}, or name a library by its file"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    files = [folder / f"{_MODULE}{end}" for folder in folders for end in importlib.machinery.EXTENSION_SUFFIXES]
    library = next((file for file in files if file.is_file()), None)
    if library is None:
        raise CustomOpsError(
            f"the package {EXTENSIONS} in {folders[0]} holds no library for this Python; name its file instead: "
            "--custom-ops FILE.so"
        )
    return library


def needed_libraries(given: Sequence[Library], plan: Plan, stage: int | None = None) -> tuple[Library, ...]:
    """Select the given libraries that a plan, or one stage of it, needs. Libraries are matched by their hashes.

    Raises:
        CustomOpsError: a needed library was not given, or another build of it was given.
    """
    names = None if stage is None else plan.stages[stage].custom_ops
    wanted = [one for one in plan.custom_ops if names is None or one.name in names]
    by_hash = {library.sha256: library for library in given}
    for one in wanted:
        if one.sha256 not in by_hash:
            raise CustomOpsError(_lacking(one, given, "the plan" if stage is None else f"stage {stage} of the plan"))
    return tuple(by_hash[one.sha256] for one in wanted)


def check_wanted(given: Sequence[Library], plans: Sequence[Plan]) -> None:
    """Refuse libraries that none of the plans lists, because they would not be loaded.

    Raises:
        CustomOpsError: names the first such library.
    """
    named = [one for plan in plans for one in plan.custom_ops]
    known = {one.sha256 for one in named} | {one.name for one in named}
    for library in given:
        if library.sha256 not in known and library.name not in known:
            wanted = ", ".join(dict.fromkeys(repr(one.name) for one in named)) or "none"
            raise CustomOpsError(
                f"the plan does not name the custom op library {_words(library)}; it names: {wanted}. If the model "
                "needs it, cut it again with --custom-ops; else leave it out"
            )


def _lacking(one: CustomOps, given: Sequence[Library], subject: str) -> str:
    option = f"--custom-ops {EXTENSIONS if one.name == EXTENSIONS else 'FILE.so'}"
    need = f"{subject} needs the custom op library {one.name!r} (SHA-256 {one.sha256[:12]})"
    other = next((library for library in given if library.name == one.name), None)
    if other is not None:
        return (
            f"{need}, and {other.path} is another build of it ({other.sha256[:12]}). Give the build that the plan was "
            f"made with, or cut the model again with this one: onnxsplit partition MODEL {option}"
        )
    listed = ", ".join(map(_words, given)) or "none"
    return f"{need}; given: {listed}. A library is code, so it is loaded only if you name it: add {option}"


def _words(library: Library) -> str:
    return f"{library.path} (SHA-256 {library.sha256[:12]})"


@contextmanager
def unchanged(library: Library) -> Iterator[str]:
    """Give the path to load a library from, and check before and after the ``with`` block that its file is unchanged.

    Raises:
        CustomOpsError: the file changed after it was named, or within the block.
    """
    path = Path(library.path)
    with _opened(path) as stream:
        before = _identity(os.fstat(stream.fileno()))
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != library.sha256:
            raise CustomOpsError(
                f"the custom op library {path} was changed after it was named: its SHA-256 was {library.sha256[:12]} "
                f"and is {digest[:12]}. It was not loaded; start again"
            )
        yield library.path
        try:
            after = _identity(path.stat())
        except OSError:
            after = None
        if after != before:
            raise CustomOpsError(
                f"the custom op library {path} was changed while it was loaded, so what was loaded is not known; "
                "start again"
            )


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Values of a file; one of them changes when it is replaced or written. No writer can set the last (ctime)."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open the file of a library.

    Raises:
        CustomOpsError: the file cannot be read.
    """
    try:
        stream = open_regular(path, most_bytes=_MOST_BYTES)
    except FileNotFoundError as error:
        raise CustomOpsError(f"no such custom op library: {path}") from error
    except OSError as error:
        raise CustomOpsError(f"cannot read the custom op library {path}: {error.strerror}") from error
    with stream:
        yield stream
