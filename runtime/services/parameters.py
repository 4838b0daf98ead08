"""The parameters of an endpoint: from the types of a method to the fields of a request, and to its arguments.

body                                    fields
application/json                        the members of the object; bytes are in base64, or a data: URL
multipart/form-data, urlencoded form    the parts: files and texts
anything else                           the body, for the only parameter of type bytes or picture
the query of the URL                    further fields
"""

from __future__ import annotations

import inspect
import io
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from onnxsplit.errors import InputError, one_line, shown

_MOST_FIELDS = 1000
_MESSAGE_CHARACTERS = 500
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


@dataclass(frozen=True)
class _Field:
    """A parameter: its type for msgspec, and what makes the argument of the value."""

    kind: Any
    argument: Callable[[Any], Any] | None = None

    @property
    def is_bytes(self) -> bool:
        """Whether its values are bytes."""
        return self.kind is bytes

    @property
    def is_list(self) -> bool:
        """Whether it may be given several times."""
        return (typing.get_origin(self.kind) or self.kind) in (list, tuple, set, Any)


class Parameters:
    """The parameters of a method.

    Args:
        method: the method as the class has it: its first parameter is the object.
        name: the name of the method, with its class.

    Raises:
        InputError: a parameter has no type, or cannot be given by a request.

    Attributes:
        struct: the type of the fields of a request.
    """

    def __init__(self, method: Callable[..., Any], name: str) -> None:
        self._fields: dict[str, _Field] = {}
        declared: list[Any] = []
        hints = _hints(method, name)
        for parameter in list(inspect.signature(method).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise InputError(f"{name} takes {parameter}; the parameters of an endpoint have names, and no * or /")
            if parameter.name not in hints:
                raise InputError(f"the parameter {parameter.name!r} of {name} has no type; write one, as image: bytes")
            field = self._fields[parameter.name] = _field(hints[parameter.name])
            default = () if parameter.default is parameter.empty else (parameter.default,)
            declared.append((parameter.name, field.kind, *default))
        try:
            self.struct = msgspec.defstruct(name.replace(".", "_"), declared, forbid_unknown_fields=True, kw_only=True)
            msgspec.json.schema(self.struct)
        except (TypeError, ValueError) as error:
            raise InputError(f"the parameters of {name} cannot be given by a request: {one_line(error)}") from error

    async def arguments(self, request: Request) -> dict[str, Any]:
        """The arguments of a call.

        Raises:
            InputError: the request does not have the fields that the method takes.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await request.body()
        texts: list[tuple[str, Any]] = list(request.query_params.multi_items())
        others: list[tuple[str, Any]] = []
        if kind in _FORMS:
            texts += await _form(request, len(body))
        elif kind in ("application/json", "") and (body[:1] in (b"", b"{") or kind):
            others = list(_members(body).items())
        elif body:
            others = [(self._whole_body(kind), body)]
        fields = self._joined(texts, others)
        try:
            values = msgspec.convert(fields, self.struct, strict=not texts)
        except (msgspec.ValidationError, RecursionError) as error:
            raise InputError(f"the request does not fit: {one_line(error, _MESSAGE_CHARACTERS)}") from error
        return {name: _argument(name, field, getattr(values, name)) for name, field in self._fields.items()}

    def _whole_body(self, kind: str) -> str:
        """The parameter that gets the whole body."""
        names = [name for name, field in self._fields.items() if field.is_bytes]
        if len(names) != 1:
            raise InputError(
                f"a body of type {shown(kind)} cannot be divided among {', '.join(self._fields) or 'no parameters'}; "
                "send application/json or multipart/form-data"
            )
        return names[0]

    def _joined(self, texts: list[tuple[str, Any]], others: list[tuple[str, Any]]) -> dict[str, Any]:
        """The fields by name, from texts and files and from the members of an object.

        A text that is given several times is a list, if the parameter is one.
        """
        fields: dict[str, Any] = {}
        for name, text in texts:
            field = self._fields.get(name, _Field(str))
            value = _of_text(field, text)
            values = value if isinstance(value, list) or not field.is_list else [value]
            if name not in fields:
                fields[name] = values
            elif field.is_list and isinstance(values, list) and isinstance(fields[name], list):
                fields[name] += values
            else:
                raise _twice(name)
        for name, value in others:
            if name in fields:
                raise _twice(name)
            data_url = isinstance(value, str) and value.startswith("data:") and self._is_bytes(name)
            fields[name] = value.partition(",")[2] if data_url else value
        return fields

    def _is_bytes(self, name: str) -> bool:
        return name in self._fields and self._fields[name].is_bytes


def _twice(name: str) -> InputError:
    return InputError(f"the field {shown(name)} is given twice")


def _hints(method: Callable[..., Any], name: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(method, include_extras=True)
    except Exception as error:  # whatever the user's annotations raise
        raise InputError(f"the types of {name} cannot be read: {one_line(error)}") from error


def _members(body: bytes) -> Mapping[str, Any]:
    try:
        members = msgspec.json.decode(body) if body else {}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"the body is not JSON: {one_line(error, _MESSAGE_CHARACTERS)}") from error
    if not isinstance(members, dict):
        raise InputError(f"the body is {shown(members)}; send a JSON object with the parameters")
    return members


async def _form(request: Request, size: int) -> list[tuple[str, Any]]:
    """The fields of a form: files as bytes, others as text."""
    try:
        form = await request.form(max_files=_MOST_FIELDS, max_fields=_MOST_FIELDS, max_part_size=size)
    except (HTTPException, MultiPartException, ValueError, KeyError) as error:
        text = error.detail if isinstance(error, HTTPException) else str(error)
        raise InputError(f"the body is not the form that its Content-Type says: {text}") from error
    try:
        return [
            (name, await value.read() if isinstance(value, UploadFile) else value) for name, value in form.multi_items()
        ]
    finally:
        await form.close()


def _of_text(field: _Field, value: Any) -> Any:
    """A field of a form or of the query: bytes as they are, lists and objects from JSON, other texts for msgspec."""
    if not isinstance(value, str):
        return value
    if field.is_bytes:
        return value.encode()
    plain = field.kind in (str, int, float, bool)
    return _decoded(value) if not plain and value[:1] in ("{", "[") else value


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return text


def _field(kind: Any) -> _Field:
    """What a parameter of a type takes."""
    plain = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
    if inspect.isclass(plain) and plain.__module__.split(".")[0] == "PIL":
        return _Field(bytes, _picture)
    if plain is np.ndarray or typing.get_origin(plain) is np.ndarray:
        return _Field(Any, np.asarray)
    if hasattr(plain, "model_validate"):  # Pydantic
        return _Field(dict[str, Any], plain.model_validate)
    return _Field(kind)


def _picture(data: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"its {len(data)} bytes are no picture of a kind that Pillow reads") from error
    return picture


def _argument(name: str, field: _Field, value: Any) -> Any:
    if field.argument is None:
        return value
    try:
        return field.argument(value)
    except Exception as error:  # Pillow, NumPy and Pydantic raise many kinds
        raise InputError(f"{shown(name)} cannot be read: {one_line(error, _MESSAGE_CHARACTERS)}") from error
