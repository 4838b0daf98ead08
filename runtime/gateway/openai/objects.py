"""The answers of OpenAI's API, and the chunks of its streams. Pure."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class PromptDetails(Struct, frozen=True):
    """How many tokens of the prompts were not computed, because another text had begun alike."""

    cached_tokens: int


class TokenUsage(Struct, frozen=True):
    """Numbers of tokens of a request. A prompt of several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | UnsetType = UNSET


class TopLogprob(Struct, frozen=True):
    """The logarithm of a token's probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Struct, frozen=True):
    """The same for a token of the answer, and of the most probable tokens at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """Those of several tokens."""

    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(Struct, frozen=True):
    """Logarithms of probabilities as completions report them: lists with one entry for each token.

    Attributes:
        text_offset: the number of characters of the text before the token.
        token_logprobs: the logarithm of its probability.
        tokens: its text.
        top_logprobs: the most probable tokens at its place.
    """

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class AnswerHead(Struct, frozen=True):
    """What all answers and chunks begin with; chunks of one answer have the same.

    Attributes:
        id: the answer's own name.
        created: when it was asked for, in seconds since the epoch.
        model: the model, as the client calls it.
        system_fingerprint: changes with the version of this software and with the plan.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str


class CompletionChoice(Struct, frozen=True):
    """One text, or a piece of it in a chunk.

    Attributes:
        index: which of the texts of the request.
        text: the text.
        logprobs: null if they were not asked for.
        finish_reason: null in all chunks of a text but the last.
        stop_reason: the stop string, or the token of ``stop_token_ids``, that ended the text (as vLLM reports it).
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET


class CompletionObject(AnswerHead, frozen=True, tag_field="object", tag="text_completion"):
    """The answer of ``/v1/completions``, and a chunk of its stream."""

    choices: list[CompletionChoice]
    usage: TokenUsage | UnsetType | None = UNSET


class FunctionCall(Struct, frozen=True, omit_defaults=True):
    """A function that the model calls; the arguments are JSON. A chunk has a piece of them."""

    name: str | None = None
    arguments: str | UnsetType = UNSET


class ToolCallObject(Struct, frozen=True, omit_defaults=True):
    """A call of a tool; in chunks with its index, and with the other attributes once."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | UnsetType = UNSET


class ChatDelta(Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallObject] | None = None


class ChatChunkChoice(Struct, frozen=True):
    """What a chunk adds to one answer; the attributes are those of :class:`CompletionChoice`."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET


class ChatChunk(AnswerHead, frozen=True, tag_field="object", tag="chat.completion.chunk"):
    """A chunk of the stream of ``/v1/chat/completions``."""

    choices: list[ChatChunkChoice]
    usage: TokenUsage | UnsetType | None = UNSET


class AnswerMessage(Struct, frozen=True):
    """The message of the assistant. The content is null where it only calls tools."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCallObject] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """One answer; the other attributes are those of :class:`CompletionChoice`."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET


class ChatObject(AnswerHead, frozen=True, tag_field="object", tag="chat.completion"):
    """The answer of ``/v1/chat/completions``."""

    choices: list[ChatChoice]
    usage: TokenUsage


class ModelObject(Struct, frozen=True, tag_field="object", tag="model"):
    """A model that completes texts."""

    id: str
    created: int
    max_model_len: int
    owned_by: str = "onnxsplit"


class ModelList(Struct, frozen=True, tag_field="object", tag="list"):
    """All of them: the answer of ``/v1/models``."""

    data: list[ModelObject]


class TokenizeAnswer(Struct, frozen=True):
    """The answer of ``/tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(Struct, frozen=True):
    """The answer of ``/detokenize``."""

    prompt: str
