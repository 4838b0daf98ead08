"""Key pairs and allow-lists, as files.

A keys folder is one process's:

    keys/                   for the user alone (mode 700)
      secret.key            the key pair's secret half (mode 600); never leaves the folder
      public.key            the other half, to be given to those who are to speak with this process
      allowed/NAME.key      the public keys of those it speaks with

A coordinator allows its nodes; a node allows its coordinator, who vouches for the other nodes.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from onnxsplit.errors import InputError
from onnxsplit.files import MOST_TEXT_BYTES, read_regular, replacing
from runtime.wire.security import KeyPair, new_key_pair

_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # Z85, https://rfc.zeromq.org/spec/32/
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}")


def default_folder() -> Path | None:
    """``$XDG_CONFIG_HOME/onnxsplit/keys``, when it is there."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "onnxsplit" / "keys"
    return folder if (folder / "secret.key").exists() else None


class Keys:
    """A keys folder that was checked.

    Attributes:
        pair: the own keys.

    Raises:
        InputError: it is no keys folder, or others can read the secret.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        secret = self._folder / "secret.key"
        for path in (self._folder, secret):
            if not path.exists():
                raise InputError(f"{path} is missing; make keys with: onnxsplit keys new {folder}")
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                allowed = "600" if path == secret else "700"
                raise InputError(
                    f"{path} has mode {mode:o}, so others on this host may read keys; run: chmod {allowed} {path}"
                )
        self.pair = KeyPair(public=_read(self._folder / "public.key"), secret=_read(secret))
        self._seen: tuple[tuple[str, int], ...] = ()
        self._allowed: frozenset[str] = frozenset()

    @property
    def allowed(self) -> frozenset[str]:
        """The public keys of those this process speaks with, as the folder says now."""
        files = sorted((self._folder / "allowed").glob("*.key"))
        seen = tuple((file.name, file.stat().st_mtime_ns) for file in files)
        if seen != self._seen:
            self._seen, self._allowed = seen, frozenset(_read(file) for file in files)
        return self._allowed

    def of(self, name: str) -> str:
        """The public key of ``name``.

        Raises:
            InputError: it is not allowed.
        """
        file = self._folder / "allowed" / f"{name}.key"
        if not file.exists():
            raise InputError(f"{file} is missing; run: onnxsplit keys allow {self._folder} PUBLIC.key --name {name}")
        return _read(file)


def is_occupied(folder: Path) -> bool:
    """Whether something is there: a file, or a folder that is not empty."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def create(folder: Path) -> None:
    """Make a keys folder with a new pair and an empty allow-list.

    Raises:
        InputError: there is something at ``folder``.
    """
    if is_occupied(folder):
        raise InputError(f"{folder} exists; keys are never overwritten. Choose another folder, or remove it first")
    pair = new_key_pair()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    (folder / "allowed").mkdir(mode=0o700)
    _write(folder / "secret.key", pair.secret, 0o600)
    _write(folder / "public.key", pair.public, 0o644)


def create_for(folder: Path, nodes: tuple[str, ...]) -> list[Path]:
    """Make a keys folder for a coordinator and for each node, with allow-lists that fit; returns them.

    Raises:
        InputError: as :func:`create`; or a name is none for a file.
    """
    for name in nodes:
        check_name(name)
    if "coordinator" in nodes or len(set(nodes)) < len(nodes):
        raise InputError("nodes need names of their own, other than 'coordinator'")
    if is_occupied(folder):
        raise InputError(f"{folder} exists; keys are never overwritten. Choose another folder, or remove it first")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    coordinator = folder / "coordinator"
    create(coordinator)
    for name in nodes:
        create(folder / name)
        allow(folder / name, coordinator / "public.key", "coordinator")
        allow(coordinator, folder / name / "public.key", name)
    return [coordinator, *(folder / name for name in nodes)]


def allow(folder: Path, public: Path, name: str) -> None:
    """Let a process speak with the owner of a public key, known as ``name`` from now on.

    Raises:
        InputError: it is no public key, or no name.
    """
    check_name(name)
    with replacing(folder / "allowed" / f"{name}.key") as temporary:
        _write(temporary, _read(public), 0o644)


def revoke(folder: Path, name: str) -> None:
    """Let a process speak with ``name`` no more.

    Raises:
        InputError: nobody is known by that name.
    """
    check_name(name)
    file = folder / "allowed" / f"{name}.key"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in (folder / "allowed").glob("*.key"))) or "nobody"
        raise InputError(f"{name!r} is not allowed in {folder}; there is: {known}")
    file.unlink()


def check_name(name: str) -> None:
    """Refuse what cannot name a key file.

    Raises:
        InputError: saying what is allowed.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} is no name for a key; allowed: letters, digits, '.', '_', '-', at most 64")


def _read(file: Path) -> str:
    try:
        text = read_regular(file, most_bytes=MOST_TEXT_BYTES).decode().strip()
    except OSError as error:
        raise InputError(f"cannot read the key {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} holds no key: expected 40 characters of Z85") from error
    if not _KEY.fullmatch(text):
        raise InputError(f"{file} holds no key: expected 40 characters of Z85")
    return text


def _write(file: Path, text: str, mode: int) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text + "\n")
