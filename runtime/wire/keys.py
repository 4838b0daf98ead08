"""Key pairs and allow-lists as files.

Each process has a keys folder of its own:

    keys/                   readable by the user alone (mode 700)
      secret.key            the secret key (mode 600); it never leaves the folder
      public.key            the public key, to be copied to the peers that this process communicates with
      allowed/NAME.key      the public keys of those peers

A coordinator allows its nodes. A node allows its coordinator, which tells it the public keys of the other nodes.

``allowed`` is read again whenever its files have changed. It may be a link to a folder that is replaced as a whole, as
Kubernetes does it with the volumes of ConfigMaps and Secrets.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import stat
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from onnxsplit.errors import InputError
from onnxsplit.files import MOST_TEXT_BYTES, read_regular, replacing
from runtime.wire.security import KeyPair, new_key_pair

_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # Z85, https://rfc.zeromq.org/spec/32/
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}")
_log = logging.getLogger("runtime.wire")


def default_folder() -> Path | None:
    """The folder ``$XDG_CONFIG_HOME/onnxsplit/keys``; None when it holds no keys."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "onnxsplit" / "keys"
    return folder if (folder / "secret.key").exists() else None


class Keys:
    """A keys folder.

    Attributes:
        pair: the key pair.
        revoked: the public keys that were allowed before the folder was last looked at, and are not now.

    Raises:
        InputError: a file is missing or holds no key, or other users can read the secret key.
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
                    f"{path} has mode {mode:o}, so other users may read the keys; run: chmod {allowed} {path}"
                )
        self.pair = KeyPair(public=_read(self._folder / "public.key"), secret=_read(secret))
        self._seen: dict[Path, tuple[int, ...]] = _versions(self._folder / "allowed")
        self._peers = {file: _read(file) for file in self._seen}
        self.revoked: frozenset[str] = frozenset()

    @property
    def allowed(self) -> frozenset[str]:
        """The public keys of the allowed peers, as the folder lists them now.

        A file that is changed and holds no key now, perhaps because it is being written, keeps the key it had before;
        that is logged once. A new file that holds none allows nobody.
        """
        seen = _versions(self._folder / "allowed")
        if seen != self._seen:
            before = self._peers
            self._peers = {file: key for file in seen if (key := self._key_now(file, before.get(file))) is not None}
            self._seen = seen
            self.revoked = self.revoked.union(before.values()).difference(self._peers.values())
        return frozenset(self._peers.values())

    @staticmethod
    def _key_now(file: Path, before: str | None) -> str | None:
        try:
            return _read(file)
        except InputError as error:
            if not file.exists():  # it was removed after the folder was listed
                return None
            _log.warning("%s; %s", error, "nobody is allowed by it" if before is None else "its former key stays")
            return before

    def of(self, name: str) -> str:
        """The public key of the allowed peer ``name``.

        Raises:
            InputError: no peer of this name is allowed.
        """
        file = self._folder / "allowed" / f"{name}.key"
        if not file.exists():
            raise InputError(f"{file} is missing; run: onnxsplit keys allow {self._folder} PUBLIC.key --name {name}")
        return _read(file)


def is_occupied(folder: Path) -> bool:
    """Whether there is a file, or a folder that is not empty."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _occupied(folder: Path, nodes: tuple[str, ...] = ()) -> str:
    """Why no keys are made in a folder: the keys that it holds, since when, and what uses them; and what to do."""
    owners = sorted(path.parent for path in (*folder.glob("secret.key"), *folder.glob("*/secret.key")))
    others = folder.with_name(f"{folder.name}-2") if folder.name else folder / "other"
    make = shlex.join(["onnxsplit", "keys", "new", str(others), *(word for name in nodes for word in ("--node", name))])
    if not owners:
        return f"{folder} exists and holds no keys; nothing was touched. Make keys in another folder: {make}"
    made_s = min((owner / "secret.key").stat().st_mtime for owner in owners)
    since = datetime.fromtimestamp(made_s).astimezone().isoformat(" ", "minutes")
    allowed = sorted({file.stem for owner in owners for file in (owner / "allowed").glob("*.key")})
    using = f"the processes that are started with --keys {owners[0]}"
    if len(owners) > 1 or owners[0] != folder:
        using = f"the processes that are started with --keys and one of: {', '.join(map(str, owners))}"
    if folder == default_folder():
        using += ", or without --keys, because it is the default folder"
    peers = f" They allow {', '.join(allowed)} to connect." if allowed else ""
    return (
        f"{folder} holds keys since {since}; keys are never overwritten, and nothing was touched. They are used by "
        f"{using}.{peers} Make others: {make}"
    )


def create(folder: Path) -> None:
    """Make a keys folder with a new key pair and an empty allow-list.

    Raises:
        InputError: there is a file or a folder that is not empty.
    """
    if is_occupied(folder):
        raise InputError(_occupied(folder))
    pair = new_key_pair()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    (folder / "allowed").mkdir(mode=0o700)
    _write(folder / "secret.key", pair.secret, 0o600)
    _write(folder / "public.key", pair.public, 0o644)


def create_for(folder: Path, nodes: tuple[str, ...]) -> list[Path]:
    """Make a keys folder for a coordinator and one for each node, which allow each other.

    Args:
        folder: the folder to make them in.
        nodes: the names of the nodes.

    Returns:
        The keys folders, the coordinator's first.

    Raises:
        InputError: as :func:`create`, or a name is not allowed.
    """
    for name in nodes:
        check_name(name)
    if "coordinator" in nodes or len(set(nodes)) < len(nodes):
        raise InputError("each node needs a name of its own, other than 'coordinator'")
    if is_occupied(folder):
        raise InputError(_occupied(folder, nodes))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    coordinator = folder / "coordinator"
    create(coordinator)
    return [coordinator, *(add_node(folder, name) for name in nodes)]


def add_node(folder: Path, name: str) -> Path:
    """Make a keys folder for another node of a coordinator whose keys :func:`create_for` made.

    Returns:
        The node's keys folder.

    Raises:
        InputError: as :func:`create`, or the name is not allowed.
    """
    check_name(name)
    create(folder / name)
    allow(folder / name, folder / "coordinator" / "public.key", "coordinator")
    allow(folder / "coordinator", folder / name / "public.key", name)
    return folder / name


def allow(folder: Path, public: Path, name: str) -> None:
    """Add a peer to the allow-list of a keys folder.

    Args:
        folder: the keys folder.
        public: file with the peer's public key.
        name: the peer's name.

    Raises:
        InputError: the file holds no public key, or the name is not allowed.
    """
    check_name(name)
    with replacing(folder / "allowed" / f"{name}.key") as temporary:
        _write(temporary, _read(public), 0o644)


def revoke(folder: Path, name: str) -> None:
    """Remove a peer from the allow-list of a keys folder.

    Raises:
        InputError: no peer of this name is allowed.
    """
    check_name(name)
    file = folder / "allowed" / f"{name}.key"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in (folder / "allowed").glob("*.key"))) or "nobody"
        raise InputError(f"{name!r} is not allowed in {folder}; allowed are: {known}")
    file.unlink()


def check_name(name: str) -> None:
    """Check that a name can be the name of a key file.

    Raises:
        InputError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} is not a name for a key; allowed: letters, digits, '.', '_', '-', at most 64")


def _versions(folder: Path) -> dict[Path, tuple[int, ...]]:
    """The key files in a folder, each with what changes when it is written or replaced."""
    found: dict[Path, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.key")):
        with suppress(OSError):  # it was removed after the folder was listed
            status = file.stat()
            found[file] = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return found


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
