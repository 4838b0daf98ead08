"""A conversation on a terminal, or with the lines of standard input."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from types import FrameType
from typing import TYPE_CHECKING, Any

from onnxsplit.cli.output import Output, milliseconds
from onnxsplit.cli.sampling import shown_text, speeds
from onnxsplit.errors import InputError, OnnxsplitError

if TYPE_CHECKING:
    from runtime.text.generation import TextGeneration
    from runtime.text.text import Text

_MOST_LINE = 1 << 20  # characters of a line of standard input
_SPARE = 8  # a share of the context that is kept for an answer: one eighth
_HELP = "/clear forgets the conversation, /system TEXT changes what the model is told before it, /exit ends the chat."


class Conversation:
    """Messages and answers so far.

    Args:
        output: prints answers and remarks.
        text: answers.
        length: the most tokens of a conversation with its answer.
        system: what the model is told before the conversation; None for nothing.
        options: those of the answers.
    """

    def __init__(self, output: Output, text: Text, length: int, system: str | None, options: Mapping[str, Any]) -> None:
        self._output = output
        self._text = text
        self._length = length
        self._system = system
        self._options = options
        self._messages: list[dict[str, str]] = []

    def on_terminal(self) -> None:
        """Ask for messages until the user ends it."""
        import readline  # noqa: F401  # input() then has a history and editing keys

        self._output.line("Write a message. /help lists commands; Ctrl-C stops an answer, Ctrl-D ends the chat.")
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                self._output.piece("\n")
                return
            except UnicodeDecodeError:
                self._output.note("this is not UTF-8 text")
                continue
            if line == "/exit":
                return
            if line.startswith("/"):
                self._obey(line)
            elif line:
                try:
                    self._answer(line)
                except OnnxsplitError as error:
                    self._output.note(f"onnxsplit: {error}")

    def from_lines(self) -> None:
        """Answer each line of standard input.

        Raises:
            InputError: a line is not text, or is too long.
            OnnxsplitError: an answer has failed.
        """
        while line := sys.stdin.buffer.readline(_MOST_LINE + 1):
            if len(line) > _MOST_LINE:
                raise InputError(f"a line of standard input has more than {_MOST_LINE} bytes; write shorter messages")
            try:
                message = line.decode().strip()
            except UnicodeDecodeError as error:
                raise InputError(f"standard input is not UTF-8 text: {line[:40]!r}; save it as UTF-8") from error
            if message and not self._answer(message):
                raise KeyboardInterrupt

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/clear":
            self._messages.clear()
            self._output.aside("The conversation is forgotten.")
        elif command == "/system":
            self._system = rest.strip() or None
            self._output.aside("The model is told so from now on." if self._system else "The model is told nothing.")
        else:
            self._output.aside(_HELP)

    def _answer(self, message: str) -> bool:
        """Print the answer to a message; returns False if Ctrl-C stopped it."""
        self._messages.append({"role": "user", "content": message})
        answer = None
        try:
            with _interrupts() as stop:
                tokens = self._fitting_tokens()
                with self._text.complete(tokens, **self._limited(len(tokens))) as generation:
                    stop.watch(generation)
                    answer = self._print(generation)
        finally:
            if answer is None or (stop.asked and not answer):
                self._messages.pop()
            else:
                self._messages.append({"role": "assistant", "content": answer})
        return not stop.asked

    def _limited(self, prompt: int) -> dict[str, Any]:
        """The options, with no more tokens than there is room for behind a prompt of so many."""
        options = dict(self._options)
        if "max_tokens" in options:
            options["max_tokens"] = max(1, min(options["max_tokens"], self._length - prompt))
        return options

    def _print(self, generation: TextGeneration) -> str:
        """Print an answer as it comes, and how fast it was; returns it."""
        parts: list[str] = []
        tokens: list[int] = []
        reason, on_terminal = None, sys.stdout.isatty()
        try:
            for piece in generation:
                parts.append(piece.text)
                tokens += piece.tokens
                reason = piece.reason
                self._output.piece(shown_text(piece.text, on_terminal=on_terminal))
        finally:
            self._output.piece("\n")
        usage, times_ns = generation.usage, generation.generation.times_ns[: len(tokens)]
        first_s, per_s = speeds(generation.generation.submitted_ns, times_ns) if tokens else (0.0, 0.0)
        is_full = reason == "length" and usage.prompt + usage.completion >= self._length
        end = "; stopped" if reason is None else "; the context is full, /clear begins anew" if is_full else ""
        if tokens:
            self._output.aside(
                f"{usage.completion} tokens, {per_s:.1f} tokens/s, first after {milliseconds(first_s * 1e9)}{end}"
            )
        self._output.result(
            {
                "text": "".join(parts),
                "tokens": tokens,
                "reason": reason,
                "usage": usage,
                "first_token_s": first_s,
                "tokens_per_s": per_s,
            }
        )
        return "".join(parts)

    def _fitting_tokens(self) -> tuple[int, ...]:
        """The tokens of the conversation. The oldest messages are forgotten where it leaves no room for an answer."""
        room = self._length - min(self._options.get("max_tokens", self._length), self._length // _SPARE)
        forgotten = 0
        while len(tokens := self._tokens(forgotten)) > room and len(self._messages) - forgotten > 2:
            forgotten += 2  # a message and its answer
        if forgotten and len(tokens) < self._length:  # a message that never fits is refused, and nothing is forgotten
            del self._messages[:forgotten]
            self._output.aside(f"The context is full; the {forgotten} oldest messages are forgotten.")
        return tokens

    def _tokens(self, forgotten: int) -> tuple[int, ...]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return self._text.chat_tokens([*system, *self._messages[forgotten:]])


class _Stop:
    """Ctrl-C while an answer comes. The signal only leaves a note; a thread reads it and closes the generation.

    Attributes:
        asked: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._notes: SimpleQueue[bool] = SimpleQueue()  # True: close it; False: it has ended
        self._thread: Thread | None = None

    def signalled(self, _number: int, _frame: FrameType | None) -> None:
        """Take the signal. The main thread may hold any lock here, so nothing is closed."""
        self.asked = True
        self._notes.put(True)

    def watch(self, generation: TextGeneration) -> None:
        """Close a generation as soon as the signal comes, or now if it has come."""
        self._thread = Thread(target=self._close, args=(generation,), daemon=True)
        self._thread.start()

    def _close(self, generation: TextGeneration) -> None:
        if self._notes.get():
            generation.close()

    def end(self) -> None:
        """The answer has ended."""
        self._notes.put(False)
        if self._thread is not None:
            self._thread.join()


@contextmanager
def _interrupts() -> Iterator[_Stop]:
    """Ctrl-C stops the answer that is printed in the ``with`` block, instead of raising an error somewhere in it."""
    stop = _Stop()
    before = signal.signal(signal.SIGINT, stop.signalled)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
        stop.end()
