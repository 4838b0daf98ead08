"""Requests for texts by OpenAI's API, whose answers come as streams of tokens."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from msgspec.json import Decoder

from onnxsplit.errors import InputError, shown
from runtime.load.connections import Connections, Exchange, post
from runtime.load.http import ask
from runtime.load.request_data import read_entries
from runtime.load.target import EndDetail, Ended, LoadTarget

FIRST_TOKEN, BETWEEN_TOKENS = "first_token", "between_tokens"
"""The names of the times of a text: until its first token, and between its tokens in the mean of the text."""

TOKENS = "tokens"
"""The name of the count of tokens."""

_MOST_REASON_BYTES = 64 << 10  # of an error
_MOST_LINE_BYTES = 4 << 20  # of a stream
_MOST_TOKENS = 1 << 31  # of a text
_WORDS = ("the", "sea", "and", "a", "ship", "that", "sails", "to", "old", "ports", "with", "salt", "wind", "light")


def text_model(url: str, name: str | None, headers: Mapping[str, str]) -> str:
    """The model of an endpoint to send requests to: the one that is named, or the only one.

    Raises:
        InputError: the endpoint does not have it, or has several and none is named.
        PipelineError: the endpoint does not answer.
    """
    listed = ask(url, "/models", headers)
    try:
        found = sorted(str(entry["id"]) for entry in listed["data"])
    except (LookupError, TypeError):
        raise InputError(f"{url} lists no models; give the base of OpenAI's API, as http://HOST:PORT/v1") from None
    if name is None and len(found) == 1:
        return found[0]
    if name not in found:
        has = f"{url} has {', '.join(found) or 'none that completes texts'}"
        raise InputError(f"name the model with --model; {has}" if name is None else f"no model {name!r}; {has}")
    return name


def prompts(data: Sequence[str], *, words: int) -> list[dict[str, Any]]:
    """The prompts of requests that are sent in turn, as parts of a request's body.

    Args:
        data: JSON files with entries ``{"text_input": TEXT}``, or ``{"payload": [BODY]}`` with any fields of a request;
            empty to make prompts up.
        words: number of words of prompts that are made up. No two prompts begin alike.

    Raises:
        InputError: a file cannot be used.
    """
    if not data:
        source = random.Random(0)  # noqa: S311  words, not secrets
        return [{"prompt": f"{number} " + " ".join(source.choices(_WORDS, k=words))} for number in range(1000)]
    found: list[dict[str, Any]] = []
    for name in data:
        for entry in read_entries(Path(name)):
            text, payload = _first(entry.get("text_input")), _first(entry.get("payload"))
            if isinstance(payload, dict):
                found.append(payload)
            elif isinstance(text, str):
                found.append({"prompt": text})
            else:
                raise InputError(f"{name}: an entry has neither a 'text_input' nor a 'payload': {list(entry)}")
    if not found:
        raise InputError(f"{', '.join(data)} holds no prompt; its list 'data' is empty")
    return found


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


class TextTarget(LoadTarget):
    """Asks for texts and reads them as they come.

    Args:
        url: the address of the server, ``http://HOST:PORT``; requests go to paths below ``/v1``.
        model: the model's name.
        prompts: parts of the bodies of requests, sent in turn; a ``prompt`` becomes a message of a conversation.
        chat: whether to ask for an answer to a conversation, or for a continuation of the prompt.
        options: further fields of each body, such as ``max_tokens``.
        headers: headers of every request.

    Raises:
        MissingDependency: a package is missing.
        InputError: a header is not plain text.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompts: Sequence[Mapping[str, Any]],
        *,
        chat: bool,
        options: Mapping[str, Any],
        headers: Mapping[str, str],
    ) -> None:
        self._connections = Connections(url)
        path = "/v1/chat/completions" if chat else "/v1/completions"
        shared = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **options}
        kind = {**headers, "Content-Type": "application/json"}
        bodies = (json.dumps({**shared, **_asked(prompt, chat=chat)}).encode() for prompt in prompts)
        self._messages = [post(url, path, body, kind) for body in bodies]

    async def open(self) -> None:
        """Take requests; each connection is made by the first request that needs it."""
        self._connections.open()

    async def close(self) -> None:
        """Close the connections, which ends the texts."""
        await self._connections.close()

    def start(self, number: int, ended: Ended) -> None:
        """Ask for a text."""
        self._connections.send(self._messages[number % len(self._messages)], _Stream(ended))


def _asked(prompt: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    asked = dict(prompt)
    if chat and "prompt" in asked:
        asked["messages"] = [{"role": "user", "content": asked.pop("prompt")}]
    return asked


class _Delta(Struct):
    content: Any = None
    tool_calls: Any = None
    reasoning_content: Any = None


class _Choice(Struct):
    """A part of a chunk; the first of a conversation brings only the role."""

    text: Any = None
    delta: _Delta | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta
        return bool(self.text or (delta and (delta.content or delta.tool_calls or delta.reasoning_content)))


class _Usage(Struct):
    completion_tokens: Annotated[int, Meta(ge=0, le=_MOST_TOKENS)] = 0


class _Chunk(Struct):
    """The fields of a chunk that are counted."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = Decoder(_Chunk, strict=False).decode


class _Stream(Exchange):
    """The chunks of one answer as they come, as server-sent events. The request is sent when this is made."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended)
        self._begun_ns = time.perf_counter_ns()
        self._first_ns = self._last_ns = 0
        self._chunks = self._tokens = 0
        self._rest = b""  # the line that is not complete yet; of an error, all that was said
        self._error = ""
        self._complete = False

    def body(self, status: int, data: bytes) -> None:
        self._rest += data
        if status != 200:
            self._rest = self._rest[:_MOST_REASON_BYTES]
            return
        *lines, self._rest = self._rest.split(b"\n")
        if len(self._rest) > _MOST_LINE_BYTES:
            raise ValueError(f"a line of the stream is longer than {_MOST_LINE_BYTES >> 20} MiB")
        for line in lines:
            self._take(line)

    def complete(self, status: int) -> None:
        if status != 200:
            self.ended(f"HTTP {status}", EndDetail(message=self._rest[:300].decode(errors="replace")))
            return
        self._take(self._rest)
        self._tell()

    def _take(self, line: bytes) -> None:
        if not line.startswith(b"data:"):
            return
        data, now_ns = line[5:].strip(), time.perf_counter_ns()
        if data == b"[DONE]":
            self._complete = True
            return
        try:
            chunk = _decode(data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(f"a chunk of the stream is not one of OpenAI's API: {error}") from None
        if chunk.error is not None:
            self._error = f"{chunk.error:.300}" if isinstance(chunk.error, str) else shown(chunk.error, 300)
        if chunk.usage is not None:
            self._tokens = chunk.usage.completion_tokens
        if any(choice.has_text for choice in chunk.choices or ()):
            self._chunks += 1
            self._first_ns = self._first_ns or now_ns
            self._last_ns = now_ns

    def _tell(self) -> None:
        if self._error or not self._complete:
            self.ended("stream broke off", EndDetail(message=self._error or "the stream ended without [DONE]"))
            return
        times: dict[str, list[int]] = {}
        tokens = self._tokens or self._chunks
        if self._first_ns:
            times[FIRST_TOKEN] = [self._first_ns - self._begun_ns]
            if tokens > 1:
                times[BETWEEN_TOKENS] = [(self._last_ns - self._first_ns) // (tokens - 1)]
        self.ended(detail=EndDetail(times=times, counts={TOKENS: tokens}))
