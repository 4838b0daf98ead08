"""Who may ask: tokens, and browsers that were led here by other sites."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from onnxsplit.errors import InputError
from runtime.gateway.errors import Forbidden, Unauthorized

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_SHORTEST = 16


def read_tokens(file: Path) -> tuple[str, ...]:
    """The tokens of a file, one a line; ``#`` begins a remark.

    Raises:
        InputError: it cannot be read, others can read it, it has none, or one that is too short.
    """
    try:
        mode = file.stat().st_mode
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the tokens in {file}: {error}") from error
    if mode & 0o077:
        raise InputError(f"{file} can be read by others (mode {mode & 0o777:o}); make it your own: chmod 600 {file}")
    tokens = tuple(text for line in lines if (text := line.partition("#")[0].strip()))
    if not tokens or any(len(token) < _SHORTEST for token in tokens):
        raise InputError(
            f"{file} needs a token of at least {_SHORTEST} characters on each line; to make one: "
            "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return tokens


class Guard:
    """Decides by a request's headers.

    Args:
        tokens: one of which must come; none asks for none.
        loopback: True when the server listens to this host alone, so that other names for it are a trick.
    """

    def __init__(self, tokens: tuple[str, ...] = (), *, loopback: bool = True) -> None:
        self._tokens = tuple(token.encode() for token in tokens)
        self._loopback = loopback

    def check(self, authorization: str | None) -> None:
        """Hold what a client shows against the tokens: ``Bearer TOKEN``, or ``Basic`` with it as the password.

        Raises:
            Unauthorized: none, or not one of ours.
        """
        if not self._tokens:
            return
        scheme, _, shown = (authorization or "").partition(" ")
        token = shown.strip().encode()
        if scheme.lower() == "basic":
            try:
                token = base64.b64decode(token, validate=True).partition(b":")[2]
            except binascii.Error:
                token = b""
        elif scheme.lower() != "bearer":
            token = b""
        if sum(hmac.compare_digest(token, ours) for ours in self._tokens) == 0:
            raise Unauthorized("this server asks for a token: send the header Authorization: Bearer TOKEN")

    def check_site(self, headers: Mapping[str, str]) -> None:
        """Refuse what a page of another site makes a browser send.

        Raises:
            Forbidden: the site is not ours, or the name is not.
        """
        host = headers.get("host", "")
        origin = headers.get("origin")
        try:
            name, site = urlsplit(f"//{host}").hostname or "", urlsplit(origin or "").netloc
        except ValueError as error:
            raise Forbidden(f"the header Host or Origin holds no address: {error}") from error
        if self._loopback and host and name not in LOOPBACK:
            raise Forbidden(f"this server is of this host alone, and was asked as {host!r}; ask localhost")
        if origin is not None and site != host:
            raise Forbidden(f"pages of {origin!r} may not ask this server")
