"""Requests of the Open Inference Protocol over HTTP, with tensors as bytes."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from onnxsplit.errors import InputError, one_line
from onnxsplit.tensors import Array
from runtime.errors import PipelineError
from runtime.gateway.protocol.inference import datatype_of
from runtime.gateway.protocol.tensor_data import to_bytes
from runtime.load.connections import Connections, Exchange, post
from runtime.load.served_model import ANSWERS_IN_S, ModelServer
from runtime.load.target import EndDetail, Ended, LoadTarget

_MOST_ANSWER_BYTES = 64 << 20  # of a document about a model
_MOST_REASON_BYTES = 64 << 10  # of an error


class HttpServer(ModelServer):
    """Asks a server over HTTP.

    Args:
        url: ``http://HOST:PORT`` or ``https://...``, without a path at its end.
        headers: headers of every request.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._url = url
        self._headers = headers

    def models(self) -> list[str]:
        """As the repository index says, which only some servers have."""
        listed = self._ask("/v2/repository/index", b'{"ready": true}')
        entries = listed if isinstance(listed, list) else []
        return sorted({str(entry["name"]) for entry in entries if isinstance(entry, dict) and "name" in entry})

    def metadata(self, model: str) -> dict[str, Any]:
        """As ``GET /v2/models/M`` says."""
        found = self._ask(f"/v2/models/{quote(model, safe='')}")
        if not isinstance(found, dict):
            raise InputError(f"{self._url} has no model {model!r}")
        return found

    def config(self, model: str) -> dict[str, Any]:
        """As ``GET /v2/models/M/config`` says."""
        return self._ask(f"/v2/models/{quote(model, safe='')}/config") or {}

    def statistics(self, model: str) -> dict[str, Any]:
        """As ``GET /v2/models/M/stats`` says."""
        return self._ask(f"/v2/models/{quote(model, safe='')}/stats") or {}

    def _ask(self, path: str, body: bytes | None = None) -> Any:
        return ask(self._url, path, self._headers, body)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are answers: the requests of a load do not follow them, and a header is for one server only."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(
    urllib.request.ProxyHandler({}), _NoRedirect
)  # as the load: to the address itself


def ask(url: str, path: str, headers: Mapping[str, str], body: bytes | None = None) -> Any:
    """The JSON at a path of a server; None where the server has nothing there.

    Raises:
        PipelineError: the server does not answer, answers elsewhere or otherwise, or wants to know who asks.
    """
    try:
        request = urllib.request.Request(url + path, body, dict(headers))  # noqa: S310  http or https
        with _OPENER.open(request, timeout=ANSWERS_IN_S) as answer:
            return json.loads(answer.read(_MOST_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            _check_status(url, path, error)
        return None
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        reason = one_line(Exception(getattr(error, "reason", error)), 200) or type(error).__name__
        raise PipelineError(f"{url} does not answer: {reason}. Check the address, and that the server runs") from None


def _check_status(url: str, path: str, error: urllib.error.HTTPError) -> None:
    """Raise PipelineError unless a status says that the server has nothing at a path."""
    status = f"{url} answers {error.code} {error.reason:.100} to {path}"
    if error.code in (401, 403):
        raise PipelineError(f"{status}; give it what it asks for, as --header 'Authorization: Bearer TOKEN'") from None
    if 300 <= error.code < 400:
        raise PipelineError(
            f"{status}, and points to {error.headers.get('Location')!r:.300}; give that address"
        ) from None
    if error.code in (429, 502, 503, 504):
        raise PipelineError(f"{status}; try again when it is ready") from None


class HttpTarget(LoadTarget):
    """Sends inference requests over HTTP.

    Args:
        url: as for :class:`HttpServer`.
        model: the model's name.
        inputs: the inputs of each request; several are sent in turn.
        headers: headers of every request.

    Raises:
        MissingDependency: a package is missing.
        InputError: a header is not plain text.
    """

    def __init__(self, url: str, model: str, inputs: Sequence[Mapping[str, Array]], headers: Mapping[str, str]) -> None:
        self._connections = Connections(url)
        path = f"/v2/models/{quote(model, safe='')}/infer"
        self._messages = [_message(url, path, entry, headers) for entry in inputs]

    async def open(self) -> None:
        """Take requests; each connection is made by the first request that needs it."""
        self._connections.open()

    async def close(self) -> None:
        """Close the connections."""
        await self._connections.close()

    def start(self, number: int, ended: Ended) -> None:
        """Send a request on a free connection, or a new one."""
        self._connections.send(self._messages[number % len(self._messages)], _Inference(ended))


class _Inference(Exchange):
    """One inference request. The tensors of its answer are not decoded."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended)
        self._said = b""

    def body(self, status: int, data: bytes) -> None:
        if status != 200 and len(self._said) < _MOST_REASON_BYTES:
            self._said += data

    def complete(self, status: int) -> None:
        if status == 200:
            self.ended()
        else:
            self.ended(f"HTTP {status}", EndDetail(message=_reason(self._said)))


def _message(url: str, path: str, inputs: Mapping[str, Array], headers: Mapping[str, str]) -> bytes:
    """A request as it is sent: the JSON of its head, and the bytes of its tensors."""
    tensors = {name: bytes(to_bytes(array)) for name, array in inputs.items()}
    described = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": datatype_of(array),
            "parameters": {"binary_data_size": len(tensors[name])},
        }
        for name, array in inputs.items()
    ]
    head = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    length = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    return post(url, path, b"".join([head, *tensors.values()]), {**headers, **length})


def _reason(content: bytes) -> str:
    """What a server says in an error."""
    try:
        return str(json.loads(content)["error"])
    except (ValueError, LookupError, TypeError):
        return content[:200].decode(errors="replace")
