"""The parameters and results of endpoints, and what a class may declare."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import HTMLResponse

from onnxsplit import InputError, PipelineError, endpoint, service
from runtime.services.declare import declaration_of, endpoints_of
from runtime.services.parameters import Parameters
from runtime.services.results import media_type, response_of

JSON = "application/json"


class Model(BaseModel):
    x: int


@dataclass
class Point:
    x: float
    y: float = 0.0


class Subject:
    def several(self, text: str, number: int = 1, flag: bool = False, points: list[Point] | None = None) -> None: ...
    def raw(self, data: bytes, name: str = "none") -> None: ...
    def picture(self, image: Image.Image) -> None: ...
    def array(self, values: np.ndarray) -> None: ...
    def nothing(self) -> None: ...
    def words(self, words: list[str]) -> None: ...
    def maybe(
        self,
        text: str | None = None,
        data: Annotated[bytes, "a file"] | None = None,
        words: list[str] | None = None,
        image: Image.Image = None,  # type: ignore[assignment]
        flag: bool = False,
        point: Model = Model(x=1),  # noqa: B008
        numbers: list[int] = [1],  # noqa: B006
    ) -> None: ...
    def asked(self, request: Request, text: str) -> None: ...


def request(body: bytes = b"", kind: str = "", query: str = "") -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"content-type", kind.encode())] if kind else []
    return Request({"type": "http", "method": "POST", "headers": headers, "query_string": query.encode()}, receive)


def arguments(method: str, *words: Any, **more: Any) -> dict[str, Any]:
    parameters = Parameters(getattr(Subject, method), f"Subject.{method}")
    return asyncio.run(parameters.arguments(request(*words, **more)))


def form(*parts: tuple[str, bytes, str | None]) -> tuple[bytes, str]:
    """A form of (name, content, file name or None), and its content type."""
    body = b""
    for name, content, file in parts:
        named = "" if file is None else f'; filename="{file}"'
        body += f'--limit\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"
    return body + b"--limit--\r\n", "multipart/form-data; boundary=limit"


def png(width: int = 3, height: int = 2) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


# Parameters


def test_members_of_an_object_are_arguments():
    body = b'{"text": "a", "number": 2, "points": [{"x": 1}]}'
    expected = {"text": "a", "number": 2, "points": [Point(1.0)]}
    assert arguments("several", body, JSON) == expected
    assert arguments("several", body) == expected


def test_fields_of_forms_and_of_the_query_are_converted():
    body, kind = form(("text", b"a", None), ("flag", b"true", None), ("points", b'[{"x": 1}]', None))
    expected = {"text": "a", "number": 5, "flag": True, "points": [Point(1.0)]}
    assert arguments("several", body, kind, "number=5") == expected
    encoded = urlencode({"text": "a", "flag": "1", "number": "5", "points": '[{"x": 1}]'}).encode()
    assert arguments("several", encoded, "application/x-www-form-urlencoded") == expected


def test_a_field_that_is_a_list_may_be_given_several_times():
    assert arguments("words", *form(("words", b"a", None), ("words", b"b", None))) == {"words": ["a", "b"]}
    assert arguments("words", *form(("words", b"a", None))) == {"words": ["a"]}
    assert arguments("words", *form(("words", b'["a", "b"]', None))) == {"words": ["a", "b"]}
    assert arguments("words", b"", JSON, "words=a&words=b") == {"words": ["a", "b"]}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"data": "' + base64.b64encode(b"\x00\xff") + b'"}', JSON),
        (b'{"data": "data:image/png;base64,' + base64.b64encode(b"\x00\xff") + b'"}', JSON),
        form(("data", b"\x00\xff", "a.bin")),
        (b"\x00\xff", "application/octet-stream"),
        (b"\x00\xff", ""),
    ],
)
def test_bytes_come_in_every_form(body, kind):
    assert arguments("raw", body, kind) == {"data": b"\x00\xff"}


def test_text_for_bytes_in_a_form_is_its_bytes():
    assert arguments("raw", *form(("data", b"aGk=", None)))["data"] == b"aGk="


def test_a_picture_comes_as_a_file_as_base64_and_alone():
    assert arguments("picture", *form(("image", png(), "a.png")))["image"].size == (3, 2)
    assert arguments("picture", b'{"image": "' + base64.b64encode(png()) + b'"}', JSON)["image"].size == (3, 2)
    assert arguments("picture", png(), "image/png")["image"].size == (3, 2)


def test_an_array_is_made_of_lists():
    values = arguments("array", b'{"values": [[1, 2], [3, 4]]}', JSON)["values"]
    assert values.shape == (2, 2)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (("text", b"[1]", None), "[1]"),
        (("text", b"a", "a.txt"), "a"),
        (("data", b"aGk=", None), b"aGk="),
        (("data", b"\x00", "a.bin"), b"\x00"),
        (("words", b"a", None), ["a"]),
        (("flag", b"on", None), True),
        (("point", b'{"x": 3}', None), Model(x=3)),
        (("numbers", b"4", None), [4]),
    ],
)
def test_fields_that_may_be_left_out_are_taken_from_forms(field, expected):
    assert arguments("maybe", *form(field)) == {field[0]: expected}


def test_what_is_left_out_keeps_the_default_of_the_method():
    assert arguments("maybe") == {}
    assert arguments("maybe", b'{"text": null, "image": null}', JSON) == {"text": None, "image": None}


def test_a_method_may_take_the_request_itself():
    found = arguments("asked", b'{"text": "a"}', "application/merge-patch+json")
    assert found["request"].headers["content-type"] == "application/merge-patch+json"
    assert found["text"] == "a"


def test_a_method_without_parameters_takes_an_empty_body():
    assert arguments("nothing") == arguments("nothing", b"{}", JSON) == {}


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("several", (b"{}", JSON), "missing required field `text`"),
        ("several", (b'{"text": 1}', JSON), r"Expected `str`, got `int` - at `\$.text`"),
        ("several", (b'{"text": "a", "numbr": 1}', JSON), "unknown field `numbr`"),
        ("several", (b'{"text": ', JSON), "the body is not JSON"),
        ("several", (b"[1]", JSON), "send a JSON object"),
        ("several", (b"abc", "text/plain"), "cannot be divided among text, number, flag, points"),
        ("several", (b"text=a&text=b", "application/x-www-form-urlencoded"), "'text' is given twice"),
        ("several", (b'{"text": "a"}', JSON, "text=b"), "'text' is given twice"),
        ("several", (b"--limit\r\nno form", "multipart/form-data; boundary=limit"), "cut off"),
        ("several", (b"x", "multipart/form-data"), "not the form"),
        ("picture", (b"no picture", "image/png"), "'image' cannot be read: .*10 bytes are no picture"),
        ("array", (b'{"values": [[1], [2, 3]]}', JSON), "'values' cannot be read"),
        ("array", (b'{"values": "x"}', JSON), "does not fit"),
        ("array", (b'{"values": null}', JSON), "does not fit"),
        ("raw", (b'{"data": "?"}', JSON), "does not fit"),
        ("raw", (form(("data", b"whole", None))[0][:-4], "multipart/form-data; boundary=limit"), "cut off"),
        ("several", (b'{"text": "a"}', "application/x-www-form-urlencoded"), "send content-type: application/json"),
        ("several", (b"[" * 100_000, JSON), "not JSON"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(method, words, message):
    with pytest.raises(InputError, match=message):
        arguments(method, *words)


def test_a_method_whose_parameters_no_request_can_give_is_refused():
    class Bad:
        def untyped(self, x): ...
        def star(self, *x: int): ...
        def strange(self, x: object | Iterator[int]): ...

    for name, message in (("untyped", "has no type"), ("star", r"no \* or /"), ("strange", "cannot be given")):
        with pytest.raises(InputError, match=message):
            Parameters(getattr(Bad, name), f"Bad.{name}")


# Results


@pytest.mark.parametrize(
    ("result", "kind", "body"),
    [
        ({"a": [1, 2.5, None]}, JSON, b'{"a":[1,2.5,null]}'),
        ([Point(1.0)], JSON, b'[{"x":1.0,"y":0.0}]'),
        ({"a": np.float32(0.5), "b": np.arange(3)}, JSON, b'{"a":0.5,"b":[0,1,2]}'),
        ({"a": b"\x00"}, JSON, b'{"a":"AA=="}'),
        ("text", "text/plain; charset=utf-8", b"text"),
        (b"\x00\xff", "application/octet-stream", b"\x00\xff"),
        (None, JSON, b"null"),
        (HTMLResponse("<p>", 201), "text/html; charset=utf-8", b"<p>"),
    ],
)
def test_a_result_becomes_a_response(result, kind, body):
    response = asyncio.run(response_of(result, Any))
    assert response.headers["content-type"] == kind
    assert response.body == body


def test_a_picture_becomes_a_png():
    response = asyncio.run(response_of(Image.new("L", (4, 5)), Any))
    assert response.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(response.body)).size == (4, 5)


def test_what_is_no_data_is_refused():
    with pytest.raises(PipelineError, match=r"not JSON.*object"):
        asyncio.run(response_of({"a": object()}, Any))


async def streamed(result: Any, annotation: Any) -> tuple[str, bytes]:
    response = await response_of(result, annotation)
    return response.media_type, b"".join([part async for part in response.body_iterator])


def test_an_iterator_becomes_events():
    def parts():
        yield "two\nlines"
        yield {"a": 1}
        raise InputError("it ends early")

    kind, body = asyncio.run(streamed(parts(), Iterator[str]))
    assert kind == "text/event-stream"
    assert body == b'data: two\ndata: lines\n\ndata: {"a":1}\n\nevent: error\ndata: {"error":"it ends early"}\n\n'


def test_no_text_forges_an_event():
    _, body = asyncio.run(streamed(iter(["a\rdata: b\r\n\r\nc"]), Iterator[str]))
    assert body == b"data: a\ndata: data: b\ndata: \ndata: c\n\n"


def test_what_fails_before_the_first_part_is_no_stream():
    def parts():
        raise InputError("wrong from the start")
        yield

    with pytest.raises(InputError, match="wrong from the start"):
        asyncio.run(response_of(parts(), Iterator[str]))


def test_an_asynchronous_iterator_of_bytes_is_sent_as_it_is():
    async def parts():
        yield b"a"
        yield b"b"

    assert asyncio.run(streamed(parts(), AsyncIterator[bytes])) == ("application/octet-stream", b"ab")


def test_the_media_type_is_known_from_the_annotation():
    types = (dict[str, int], str, bytes, Image.Image, Iterator[str], Iterator[bytes], AsyncIterator[str], HTMLResponse)
    assert [media_type(one) for one in types] == [
        *(JSON, "text/plain", "application/octet-stream", "image/png"),
        *("text/event-stream", "application/octet-stream", "text/event-stream", "text/html"),
    ]


# Declarations


def test_a_service_has_the_path_of_its_name_and_the_endpoints_of_its_class():
    @service(models={"a": "a.plan"}, workers=3)
    class TextReader:
        @endpoint
        def read(self) -> None: ...
        @endpoint(name="read-all")
        def every(self) -> None: ...
        def helper(self) -> None: ...

    declaration = declaration_of(TextReader)
    assert declaration is not None
    assert (declaration.path, declaration.workers) == ("/text-reader", 3)
    assert set(endpoints_of(TextReader)) == {"read", "read-all"}

    class Heir(TextReader): ...

    assert declaration_of(Heir) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": 0}, "workers must be a whole number, at least 1"),
        ({"calls": True}, "calls must be a whole number"),
        ({"attempts": 10**9}, "attempts must be"),
        ({"timeout": -1}, "timeout must be seconds above 0"),
        ({"timeout": float("nan")}, "timeout must be seconds"),
        ({"path": "no-slash"}, "the path 'no-slash'"),
        ({"path": "/v2/mine"}, "not below /v1, /v2"),
        ({"path": "/{model}"}, "the path"),
    ],
)
def test_a_wrong_argument_is_refused(given, message):
    with pytest.raises(InputError, match=message):

        @service(**given)
        class Wrong:
            @endpoint
            def read(self) -> None: ...


def test_a_class_without_endpoints_is_refused():
    with pytest.raises(InputError, match="it has no endpoint; mark a method with @endpoint"):

        @service()
        class Nothing:
            def read(self) -> None: ...

    with pytest.raises(InputError, match="steps around one model, and it has 2"):

        @service(models={"a": "a.plan", "b": "b.plan"})
        class Steps:
            def preprocess(self, x: int) -> None: ...

    with pytest.raises(InputError, match="two endpoints 'read': every and read"):

        @service()
        class Twice:
            @endpoint
            def read(self) -> None: ...
            @endpoint(name="read")
            def every(self) -> None: ...

    with pytest.raises(InputError, match=r"Static\.read is a staticmethod; an endpoint is a method"):

        @service()
        class Static:
            @staticmethod
            @endpoint
            def read() -> None: ...

    with pytest.raises(InputError, match=r"write @service\(\)"):

        @service
        class Bare:
            @endpoint
            def read(self) -> None: ...

    with pytest.raises(InputError, match="may have letters"):
        endpoint(name="a/b")(lambda self: None)
