"""The fields of an HTML form, as browsers and ``curl -F`` send them."""

from __future__ import annotations

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from onnxsplit.errors import InputError, MissingDependency

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
"""The content types of forms."""

_MOST_FIELDS = 1000


async def form_fields(request: Request, body: bytes) -> list[tuple[str, str | bytes]]:
    """The fields of a form: files as bytes, others as text.

    Raises:
        InputError: the body is not such a form.
        MissingDependency: the extra ``serve`` is not installed.
    """
    kind = request.headers["content-type"]
    if kind.startswith(FORMS[0]):
        _check_end(kind, body)
    elif body[:1] == b"{":
        raise InputError("the body looks like JSON, but is sent as a form; send content-type: application/json")
    try:
        form = await request.form(max_files=_MOST_FIELDS, max_fields=_MOST_FIELDS, max_part_size=len(body))
    except (HTTPException, MultiPartException, ValueError, KeyError) as error:
        text = error.detail if isinstance(error, HTTPException) else str(error)
        raise InputError(f"the body is not the form that its Content-Type says: {text}") from error
    try:
        return [
            (name, await value.read() if isinstance(value, UploadFile) else value) for name, value in form.multi_items()
        ]
    finally:
        await form.close()


def _check_end(kind: str, body: bytes) -> None:
    """Check that a form has its last boundary; the parser takes one that is cut off."""
    try:
        from python_multipart.multipart import parse_options_header
    except ImportError as error:
        raise MissingDependency("forms with files need another package: pip install 'onnxsplit[serve]'") from error
    boundary = parse_options_header(kind)[1].get(b"boundary")
    if not boundary:
        raise InputError("the form has no boundary in its Content-Type; it is not the form that its Content-Type says")
    if b"--" + boundary + b"--" not in body:
        raise InputError("the form is cut off: its last boundary is missing")
