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
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request

from onnxsplit.errors import InputError, one_line, shown
from runtime.services.forms import FORMS, form_fields
from runtime.services.threads import in_thread

_MESSAGE_CHARACTERS = 500
_QUICK_BYTES = 64 << 10  # the most bytes of a body that are converted in the event loop
_WORDS = {"on": True, "yes": True, "off": False, "no": False}


@dataclass(frozen=True)
class _Field:
    """A parameter.

    Attributes:
        kind: its type for msgspec.
        members: the types that it may have, without what annotates them.
        argument: makes the argument of a value that is not None, where that is not the value itself.
    """

    kind: Any
    members: tuple[Any, ...]
    argument: Callable[[Any], Any] | None = None

    @property
    def is_bytes(self) -> bool:
        """Whether its values are bytes."""
        return bytes in self.members

    @property
    def is_list(self) -> bool:
        """Whether a text for it may be given several times."""
        return any((typing.get_origin(one) or one) in (list, tuple, set, frozenset) for one in self.members)

    def of_text(self, text: Any) -> Any:
        """A text or a file as the value that msgspec converts: lists and objects from JSON, words for yes and no."""
        if isinstance(text, bytes):
            return _decoded_text(text) if str in self.members and not self.is_bytes else text
        if self.is_bytes:
            return text.encode()
        if str in self.members:
            return text
        if bool in self.members and text.lower() in _WORDS:
            return _WORDS[text.lower()]
        return _decoded(text) if text[:1] in ("{", "[") or self.argument is not None else text


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
        self._requests: list[str] = []
        declared: list[Any] = []
        hints = type_hints(method, name)
        for parameter in list(inspect.signature(method).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise InputError(f"{name} takes {parameter}; the parameters of an endpoint have names, and no * or /")
            if parameter.name not in hints:
                raise InputError(f"the parameter {parameter.name!r} of {name} has no type; write one, as image: bytes")
            if hints[parameter.name] is Request:
                self._requests.append(parameter.name)
                continue
            field = self._fields[parameter.name] = _field(hints[parameter.name], default=parameter.default)
            default = () if parameter.default is parameter.empty else (msgspec.UNSET,)
            declared.append((parameter.name, field.kind, *default))
        try:
            self.struct = msgspec.defstruct(name.replace(".", "_"), declared, forbid_unknown_fields=True, kw_only=True)
            msgspec.json.schema(self.struct)
        except (TypeError, ValueError) as error:
            raise InputError(f"the parameters of {name} cannot be given by a request: {one_line(error)}") from error

    async def arguments(self, request: Request) -> dict[str, Any]:
        """The arguments of a call; those that the request leaves out are not among them.

        Raises:
            InputError: the request does not have the fields that the method takes.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await request.body()
        texts: list[tuple[str, Any]] = list(request.query_params.multi_items())
        others: list[tuple[str, Any]] = []
        if kind in FORMS:
            texts += await form_fields(request, body)
        elif kind.endswith(("/json", "+json")) or (not kind and body[:1] in (b"", b"{")):
            others = list(_members(body).items())
        elif body:
            others = [(self._whole_body(kind), body)]
        fields = self._joined(texts, others)
        slow = len(body) > _QUICK_BYTES or any(field.argument is not None for field in self._fields.values())
        strict = not texts
        arguments = await in_thread(self._converted, fields, strict) if slow else self._converted(fields, strict)
        return arguments | dict.fromkeys(self._requests, request)

    def _converted(self, fields: dict[str, Any], strict: bool) -> dict[str, Any]:
        try:
            values = msgspec.convert(fields, self.struct, strict=strict)
        except (msgspec.ValidationError, RecursionError) as error:
            raise InputError(f"the request does not fit: {one_line(error, _MESSAGE_CHARACTERS)}") from error
        given = {name: getattr(values, name) for name in self._fields}
        return {
            name: _argument(name, self._fields[name], value)
            for name, value in given.items()
            if value is not msgspec.UNSET
        }

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
        unknown = _Field(str, (str,))
        for name, text in texts:
            field = self._fields.get(name, unknown)
            value = field.of_text(text)
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
            is_url = isinstance(value, str) and value.startswith("data:") and self._fields.get(name, unknown).is_bytes
            fields[name] = value.partition(",")[2] if is_url else value
        return fields


def type_hints(method: Callable[..., Any], name: str) -> dict[str, Any]:
    """The types of a method's parameters and of its result.

    Raises:
        InputError: they cannot be read.
    """
    try:
        return typing.get_type_hints(method, include_extras=True)
    except Exception as error:  # whatever the user's annotations raise
        raise InputError(f"the types of {name} cannot be read: {one_line(error)}") from error


def _twice(name: str) -> InputError:
    return InputError(f"the field {shown(name)} is given twice")


def _members(body: bytes) -> Mapping[str, Any]:
    try:
        members = msgspec.json.decode(body) if body else {}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"the body is not JSON: {one_line(error, _MESSAGE_CHARACTERS)}") from error
    if not isinstance(members, dict):
        raise InputError(f"the body is {shown(members)}; send a JSON object with the parameters")
    return members


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return text


def _decoded_text(data: bytes) -> Any:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _field(kind: Any, *, default: Any) -> _Field:
    """What a parameter of a type takes. One whose default is None may be None."""
    members = _members_of(kind)
    optional = type(None) in members or default is None
    special = [(one, found) for one in members if (found := _special(one)) is not None]
    if not special:
        return _Field(kind | None if default is None and type(None) not in members else kind, members)
    _, (given, argument) = special[0]
    return _Field(given | None if optional else given, (given,), argument)


def _members_of(kind: Any) -> tuple[Any, ...]:
    """The types that a type stands for: those of a union, without what annotates them."""
    if typing.get_origin(kind) is typing.Annotated:
        return _members_of(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(inner for one in typing.get_args(kind) for inner in _members_of(one))
    return (kind,)


def _special(kind: Any) -> tuple[Any, Callable[[Any], Any]] | None:
    """What msgspec makes for a type that it does not know, and what makes the argument of that."""
    if inspect.isclass(kind) and kind.__module__.split(".")[0] == "PIL":
        return bytes, _picture
    if kind is np.ndarray or typing.get_origin(kind) is np.ndarray:
        return list[Any] | int | float | bool, np.asarray
    if hasattr(kind, "model_validate"):  # Pydantic
        return dict[str, Any], kind.model_validate
    return None


def _picture(data: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"its {len(data)} bytes are no picture of a kind that Pillow reads") from error
    return picture


def _argument(name: str, field: _Field, value: Any) -> Any:
    if field.argument is None or value is None:
        return value
    try:
        return field.argument(value)
    except Exception as error:  # Pillow, NumPy and Pydantic raise many kinds
        raise InputError(f"{shown(name)} cannot be read: {one_line(error, _MESSAGE_CHARACTERS)}") from error
