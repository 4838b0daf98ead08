"""Who may ask: tokens, and browsers that were led here by other sites."""

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
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


def read_tokens(file: Path) -> tuple[str, ...]:
    """The tokens of a file, one a line; ``#`` begins a remark.

    Raises:
        InputError: it cannot be read, others can read it, it has none, or one that is too short.
    """
    try:
        mode = file.stat().st_mode
        lines = read_regular(file, most_bytes=MOST_TEXT_BYTES).decode().splitlines()
    except OSError as error:
        raise InputError(f"cannot read the tokens in {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read the tokens in {file}: they are not UTF-8 text") from error
    if mode & 0o077:
        raise InputError(f"{file} can be read by others (mode {mode & 0o777:o}); make it your own: chmod 600 {file}")
    tokens = tuple(text for line in lines if (text := line.partition("#")[0].strip()))
    if not tokens or any(len(token) < _SHORTEST for token in tokens):
        raise InputError(
            f"{file} needs a token of at least {_SHORTEST} characters on each line; to make one: "
            "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return tokens


class AccessControl:
    """Decides by a request's headers.

    Args:
        tokens: one of which must come; none asks for none.
        loopback: True when the server listens to this host alone, so that other names for it are a trick.
    """

    def __init__(self, tokens: tuple[str, ...] = (), *, loopback: bool = True) -> None:
        self._tokens = tuple(token.encode() for token in tokens)
        self._loopback = loopback

    def check(self, authorizations: Sequence[str]) -> None:
        """Hold what a client shows against the tokens: ``Bearer TOKEN``, or ``Basic`` with it as the password.

        Args:
            authorizations: every one that came.

        Raises:
            Unauthorized: none, not one of ours, or several.
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
        """Refuse what a page of another site makes a browser send, and what could be read in two ways.

        Args:
            hosts: every ``Host`` that came.
            origins: every ``Origin``.
            target: what is asked for, as the request's first line has it.

        Raises:
            InputError: there is not one host, or it is not written as one.
            Forbidden: the site is not ours, or the name is not.
        """
        if len(hosts) != 1 or not hosts[0]:
            raise InputError(f"the request has {len(hosts)} Host headers; HTTP needs one, with the name of this server")
        if len(origins) > 1:
            raise Forbidden(f"the request has {len(origins)} Origin headers; a browser sends one")
        host, origin = hosts[0], origins[0] if origins else None
        found = _HOST.fullmatch(host)
        if found is None:
            raise InputError(
                f"the Host header is {shown(host)}; it must be a name, an IPv4 address or an [IPv6 address], with or "
                "without :PORT"
            )
        name = found["name"].strip("[]").lower()
        try:
            site = urlsplit(origin or "").netloc
            asked = urlsplit(target).netloc if not target.startswith("/") else host
        except ValueError as error:
            raise Forbidden(f"the request names no address: {error}") from error
        if asked not in (host, ""):
            raise Forbidden(f"the request asks {shown(asked)} for something, and says to {shown(host)}")
        if self._loopback and name not in LOOPBACK:
            raise Forbidden(f"this server is of this host alone, and was asked as {shown(host)}; ask localhost")
        if origin is not None and site != host:
            raise Forbidden(f"pages of {shown(origin)} may not ask this server")
