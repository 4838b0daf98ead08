"""Access control: tokens, and protection against requests that other web sites make a browser send."""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from onnxsplit.errors import InputError, shown
from onnxsplit.files import MOST_TEXT_BYTES, read_regular
from runtime.gateway.errors import Forbidden, Unauthorized

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_SHORTEST = 16
_REMEMBERED = 256
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


def read_tokens(file: Path) -> tuple[str, ...]:
    """The tokens in a file, one on each line. A comment begins with ``#``.

    Raises:
        InputError: The file cannot be read, other users can read it, it has no tokens, or one is too short.
    """
    try:
        mode = file.stat().st_mode
        lines = read_regular(file, most_bytes=MOST_TEXT_BYTES).decode().splitlines()
    except OSError as error:
        raise InputError(f"cannot read the tokens in {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read the tokens in {file}: they are not UTF-8 text") from error
    if mode & 0o077:
        raise InputError(
            f"{file} can be read by others (mode {mode & 0o777:o}); allow only its owner: chmod 600 {file}"
        )
    tokens = tuple(text for line in lines if (text := line.partition("#")[0].strip()))
    if not tokens or any(len(token) < _SHORTEST for token in tokens):
        raise InputError(
            f"{file} needs a token of at least {_SHORTEST} characters on each line; to make one: "
            "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return tokens


class AccessControl:
    """Decides by the headers of a request whether it is allowed.

    Args:
        tokens: Valid tokens, one of which every request must carry. Without any, requests need none.
        loopback: True when the server listens on the loopback interface only. Then requests must name this host:
            another name means that a web site had the browser resolve its own name to this host.
    """

    def __init__(self, tokens: tuple[str, ...] = (), *, loopback: bool = True) -> None:
        self._tokens = tuple(token.encode() for token in tokens)
        self._loopback = loopback
        self._allowed: set[tuple[tuple[str, ...], ...]] = set()  # hosts and origins that were checked before

    def check(self, authorizations: Sequence[str]) -> None:
        """Check the token of a request: ``Bearer TOKEN``, or ``Basic`` with the token as the password.

        Args:
            authorizations: All ``Authorization`` headers of the request.

        Raises:
            Unauthorized: There is no header, more than one, or no valid token in it.
        """
        if len(authorizations) > 1:
            raise Unauthorized(f"the request carries {len(authorizations)} authorizations; send one")
        if not self._tokens:
            return
        scheme, _, given = (authorizations[0] if authorizations else "").partition(" ")
        token = given.strip().encode()
        if scheme.lower() == "basic":
            try:
                token = base64.b64decode(token, validate=True).partition(b":")[2]
            except binascii.Error:
                token = b""
        elif scheme.lower() != "bearer":
            token = b""
        if sum(hmac.compare_digest(token, ours) for ours in self._tokens) == 0:
            raise Unauthorized("this server asks for a token: send the header Authorization: Bearer TOKEN")

    def check_site(self, hosts: Sequence[str], origins: Sequence[str], target: str) -> None:
        """Refuse requests that another web site makes a browser send, and requests that are ambiguous.

        Args:
            hosts: All ``Host`` headers of the request.
            origins: All ``Origin`` headers.
            target: The target in the request line.

        Raises:
            InputError: There is not exactly one host, or it is not a valid one.
            Forbidden: The request comes from another site, or names another host.
        """
        relative = target.startswith("/")
        given = tuple(hosts), tuple(origins)
        if relative and given in self._allowed:
            return
        if len(hosts) != 1 or not hosts[0]:
            raise InputError(f"the request has {len(hosts)} Host headers; HTTP needs one, with the name of this server")
        if len(origins) > 1:
            raise Forbidden(f"the request has {len(origins)} Origin headers; a browser sends one")
        host, origin = hosts[0], origins[0] if origins else None
        match = _HOST.fullmatch(host)
        if match is None:
            raise InputError(
                f"the Host header is {shown(host)}; it must be a name, an IPv4 address or an [IPv6 address], with or "
                "without :PORT"
            )
        name = match["name"].strip("[]").lower()
        try:
            site = urlsplit(origin or "").netloc
            target_host = urlsplit(target).netloc if not relative else host
        except ValueError as error:
            raise Forbidden(f"the request has an invalid target or origin: {error}") from error
        if target_host not in (host, ""):
            raise Forbidden(f"the request asks {shown(target_host)}, but its Host header is {shown(host)}")
        if self._loopback and name not in LOOPBACK:
            raise Forbidden(
                f"this server answers requests of this host only, and was asked as {shown(host)}; ask localhost"
            )
        if origin is not None and site != host:
            raise Forbidden(f"pages of {shown(origin)} may not send requests to this server")
        if relative and len(self._allowed) < _REMEMBERED:
            self._allowed.add(given)
