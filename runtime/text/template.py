"""Chat templates: the text of a conversation as a model was trained to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxsplit.errors import InputError, shown
from runtime.text.template_process import TemplateProcess

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; the first is what templates read


class ChatTemplate:
    """A chat template in Jinja's language, as ``transformers`` renders it.

    It is rendered in a process of its own, with limits of memory and time. Any number of threads may use it.

    Args:
        source: the template; or several by name, of which ``tool_use`` is taken where there are tools, and ``default``
            otherwise.
        variables: what it may use by name, ``bos_token`` for example.
        process: renders it.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        variables: Mapping[str, Any],
        process: TemplateProcess | None = None,
    ) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._variables = dict(variables)
        self._process = process or TemplateProcess()

    def render(self, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str:
        """The text of a conversation.

        Args:
            messages: dictionaries with ``role`` and ``content``, at least one.
            variables: more that the template may use, ``tools`` and ``add_generation_prompt`` for example.

        Raises:
            InputError: the template is invalid, refuses the conversation, or takes too much time or memory.
            PipelineClosed: the pipeline was closed.
        """
        given = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": False,
            **self._variables,
            **variables,
            "messages": [_message(message, place) for place, message in enumerate(_listed(messages))],
        }
        return self._process.render(self._source(given["tools"] is not None), given)

    def _source(self, has_tools: bool) -> str:
        for name in ("tool_use", "default") if has_tools else ("default",):
            if name in self._sources:
                return self._sources[name]
        raise InputError(
            f"the plan has chat templates for {', '.join(sorted(self._sources)) or 'nothing'}, but none is named "
            "default; name one so in tokenizer_config.json"
        )

    def close(self) -> None:
        """End the process that renders."""
        self._process.close()


def _listed(messages: object) -> Sequence[object]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes | bytearray):
        raise InputError(f"messages must be a list of dictionaries with role and content, but it is {shown(messages)}")
    if not messages:
        raise InputError("messages is empty; a conversation has at least one message")
    return messages


def _message(message: object, place: int) -> dict[str, Any]:
    """A message as templates read it: without fields that are None, and with its reasoning under the usual name."""
    if not isinstance(message, Mapping):
        raise InputError(
            f"messages holds {shown(message)} at place {place}; each must be a dictionary with role and content"
        )
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in _REASONING if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}
