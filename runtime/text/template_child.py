"""Renders chat templates, in a process that does nothing else: templates come with models, and none is to be trusted.

Jinja's sandbox keeps a template away from Python, but not from memory and time. So this process limits its own memory,
and an alarm ends it where a template takes too long. It is started as a file, and it imports nothing of this project.

    python -I -S template_child.py '{"paths": [...], "memory_bytes": N, "seconds": N, "characters": N}'

Its standard input is a socket, in both directions. Each message is its length, as four bytes in network order, and that
many bytes. The first message from here is empty: it is ready. A request is ``{"source": TEXT, "variables": {...}}``. An
answer is a letter of :data:`KINDS` and a text. The process ends when the other end of the socket is closed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

KINDS = {"t": "the text", "e": "why the template refuses its variables", "m": "which limit it has reached"}
"""The kinds of answers. After the last one, the process is to be ended, because its memory is in pieces."""

_STDIN = 0
_MOST_REPEATED = 1 << 24  # characters or items that ``*`` makes
_MOST_BITS = 4096  # of a number that ``*`` or ``**`` makes


def main(settings: dict[str, Any]) -> None:
    """Answer requests until the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"], settings["memory_bytes"]))
    sys.path.extend(settings["paths"])
    compiled = compiler()
    _write(b"")
    while (request := _read()) is not None:
        signal.setitimer(signal.ITIMER_REAL, settings["seconds"])
        kind, text = _answer(compiled, request, settings["characters"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(kind.encode() + text.encode(errors="surrogatepass"))


def _answer(compiled: Callable[[str], Any], request: bytes, characters: int) -> tuple[str, str]:
    try:
        asked = json.loads(request)
        parts, size = [], 0
        for part in compiled(asked["source"]).generate(asked["variables"]):
            parts.append(part)
            size += len(part)
            if size > characters:
                return "e", f"its text has more than {characters} characters"
        return "t", "".join(parts)
    except MemoryError:
        return "m", "it needs too much memory"
    except RecursionError:
        return "m", "it calls itself too often"
    except Exception as error:  # whatever a template does wrong
        return "e", _problem(error)


def _problem(error: Exception) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    text = str(error)[:1000]
    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {text}"
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"


def compiler() -> Callable[[str], Any]:
    """A function that compiles a template in the environment that ``transformers`` gives it."""
    from datetime import datetime
    from functools import lru_cache

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}...{% endgeneration %}`` marks answers for training. It gives its text unchanged."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

        def _unchanged(self, caller: Callable[[], str]) -> str:
            return caller()

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Multiply or raise to a power, unless the result would be large."""
            if _is_large(operator, left, right):
                raise TemplateError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return lru_cache(maxsize=2)(environment.from_string)


def _is_large(operator: str, left: Any, right: Any) -> bool:
    if operator == "**":
        return isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MOST_BITS
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length() > _MOST_BITS
    for many, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(many, str | list | tuple) and len(many) * times > _MOST_REPEATED:
            return True
    return False


def _read() -> bytes | None:
    """The next request; None at the end."""
    head = _read_exactly(4)
    return None if head is None else _read_exactly(*struct.unpack("!I", head))


def _read_exactly(size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = os.read(_STDIN, size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def _write(data: bytes) -> None:
    rest = memoryview(struct.pack("!I", len(data)) + data)
    while rest:
        rest = rest[os.write(_STDIN, rest) :]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
