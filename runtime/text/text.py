"""Text in and out of a plan with a decoder, by the tokenizer and the chat template that the plan carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Unpack

from onnxsplit.arguments import check_names, option_names
from onnxsplit.errors import InputError, shown
from onnxsplit.plan import Plan
from onnxsplit.tensors import Array
from runtime.requests.generate_options import GenerateArguments, GenerateOptions
from runtime.requests.generation import Generation
from runtime.text.files import read_text_files
from runtime.text.generation import TextGeneration
from runtime.text.options import TextArguments, TextOptions
from runtime.text.stops import StopStrings
from runtime.text.template import ChatTemplate
from runtime.text.tokenizer import Tokenizer


class Generate(Protocol):
    """Continues a sequence of tokens, as :meth:`runtime.pipeline.Pipeline.generate`."""

    def __call__(
        self,
        tokens: Sequence[int] | Array,
        *,
        timeout: float | None = None,
        block: bool = True,
        **options: Unpack[GenerateArguments],
    ) -> Generation:
        """Continue the tokens of a prompt."""


class CompleteArguments(TextArguments, GenerateArguments, total=False):
    """The options of :meth:`Text.complete`, for editors and type checkers."""


class Text:
    """Completes texts and conversations. A pipeline has one as ``pipeline.text``.

    Args:
        tokenizer: the tokenizer.
        template: the chat template; None where the plan has none.
        generate: continues tokens.
        defaults: the options of ``generate`` that the model's makers recommend (``generation_config.json``), such as
            ``temperature`` and ``top_p``. They apply where a caller gives none.

    Attributes:
        tokenizer: as given.
        template: as given.
        defaults: as given.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        generate: Generate,
        defaults: Mapping[str, Any],
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults
        self._generate = generate

    @classmethod
    def open(cls, folder: Path, plan: Plan, generate: Generate) -> Text | None:
        """The text of a plan; None where it has no decoder or no tokenizer.

        Raises:
            InputError: a file cannot be used. A template that is none is reported when it is rendered.
            MissingDependency: the extra ``text`` is not installed.
        """
        names = {entry.name for entry in plan.decoder.text} if plan.decoder is not None else set()
        files = read_text_files(folder, names)
        if files is None:
            return None
        template = ChatTemplate(files.templates, files.variables) if files.templates else None
        return cls(files.tokenizer, template, generate, files.defaults)

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """The tokens of a text; see :meth:`Tokenizer.encode`."""
        return self.tokenizer.encode(text, special=special)

    def chat_tokens(
        self, messages: Sequence[Mapping[str, Any]], /, *, add_generation_prompt: bool = True, **variables: Any
    ) -> tuple[int, ...]:
        """The tokens of a conversation, as the model reads it.

        Args:
            messages: dictionaries with ``role`` and ``content``.
            add_generation_prompt: whether the answer of the assistant follows.
            variables: more that the template may use, ``tools`` for example.

        Raises:
            InputError: the plan has no chat template, or it refuses the messages.
        """
        if self.template is None:
            raise InputError("the plan has no chat template, so it takes prompts only; add chat_template.jinja")
        text = self.template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
        tokens = self.encode(text, special=False)
        if not tokens:
            raise InputError("the chat template makes an empty text of these messages; give the plan another template")
        return tokens

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        block: bool = True,
        **options: Unpack[CompleteArguments],
    ) -> TextGeneration:
        """Continue a text. Returns at once.

        Args:
            prompt: the text, or its tokens.
            timeout: as for :meth:`~runtime.pipeline.Pipeline.generate`.
            block: as there.
            options: the attributes of :class:`~runtime.text.options.TextOptions` and of
                :class:`~runtime.requests.generate_options.GenerateOptions`.

        Raises:
            InputError: an argument is invalid or unknown, or the prompt has no tokens.
            Busy, PipelineClosed: as for ``generate``.
        """
        check_names(options, [*option_names(TextOptions, GenerateOptions), "timeout", "block"])
        names = option_names(TextOptions)
        own: dict[str, Any] = {name: value for name, value in options.items() if name in names}
        wanted = TextOptions(**own)
        generating = {name: value for name, value in options.items() if name not in names}
        stops = StopStrings(wanted.stops(), include=wanted.include_stop)
        tokens = self._prompt(prompt) if isinstance(prompt, str) else prompt
        generation = self._generate(tokens, timeout=timeout, block=block, **{**self.defaults, **generating})
        detokenizer = self.tokenizer.detokenizer(skip_special=wanted.skip_special)
        return TextGeneration(generation, tuple(tokens), detokenizer, stops)

    def _prompt(self, text: str) -> tuple[int, ...]:
        tokens = self.encode(text)
        if not tokens:
            raise InputError(f"the prompt {shown(text)} has no tokens; it must have at least one, so give some text")
        return tokens

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        variables: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        block: bool = True,
        **options: Unpack[CompleteArguments],
    ) -> TextGeneration:
        """Answer the last message of a conversation. Takes what :meth:`chat_tokens` and :meth:`complete` take."""
        return self.complete(self.chat_tokens(messages, **(variables or {})), timeout=timeout, block=block, **options)

    def close(self) -> None:
        """End what belongs to it."""
        if self.template is not None:
            self.template.close()
