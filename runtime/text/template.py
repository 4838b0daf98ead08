"""Chat templates: the text of a conversation as a model was trained to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from onnxsplit.errors import InputError, one_line


class ChatTemplate:
    """A chat template in Jinja's language, as ``transformers`` renders it.

    Args:
        source: the template.
        variables: what it may use by name, ``bos_token`` for example.

    Raises:
        InputError: it is not a template.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self._variables = dict(variables)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(source)

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of a conversation.

        Args:
            messages: dictionaries with ``role`` and ``content``.
            variables: more that the template may use, ``tools`` and ``add_generation_prompt`` for example.

        Raises:
            InputError: the template refuses the conversation, or takes too much time or memory.
        """
        try:
            return self._template.render(messages=list(messages), **{**self._variables, **variables})
        except Exception as error:
            raise InputError(f"the chat template refuses the messages: {one_line(error, 300)}") from error

    def close(self) -> None:
        """End what belongs to it."""
