"""The requests of OpenAI's API, as clients send them, with the fields that vLLM's server adds. Pure.

field of a struct here       served, as its docstring says
field of ``NotServed``       known and not served: other values than the neutral one are refused, by name
any other field              ignored: clients send fields of their own
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from onnxsplit.errors import shown
from runtime.gateway.openai.errors import FieldError

MOST_TEXTS = 128
"""The most texts that one request asks for: prompts times ``n``."""

_MOST_MESSAGES = 4096
_MOST_PARTS = 1024
_REQUEST_ID = r"^[A-Za-z0-9._:-]{1,128}\Z"

Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
Tokens = list[Count]


class StreamOptions(Struct, kw_only=True):
    """What a stream reports beside its text.

    Attributes:
        include_usage: whether the last chunk reports the numbers of tokens.
        continuous_usage_stats: whether every chunk does.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class NotServed(Struct, kw_only=True):
    """Known fields that this server does not have. :data:`NEUTRAL` holds the values that ask for nothing."""

    allowed_token_ids: Any = None
    audio: Any = None
    bad_words: Any = None
    cache_salt: Any = None
    chat_template: Any = None
    ec_transfer_params: Any = None
    function_call: Any = None
    functions: Any = None
    kv_transfer_params: Any = None
    length_penalty: Any = None
    logits_processors: Any = None
    logprob_token_ids: Any = None
    media_io_kwargs: Any = None
    mm_payload: Any = None
    mm_processor_kwargs: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    priority: Any = None
    prompt_embeds: Any = None
    prompt_logprobs: Any = None
    repetition_detection: Any = None
    return_prompt_text: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    return_weight_versions: Any = None
    spaces_between_special_tokens: Any = None
    suffix: Any = None
    thinking_token_budget: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None
    vllm_xargs: Any = None
    watermarking: Any = None
    web_search_options: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words": ([],),
    "ec_transfer_params": ({},),
    "functions": ([],),
    "function_call": ("none",),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "priority": (0,),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_weight_versions": (False,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "thinking_token_budget": (-1,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
"""Values of fields of :class:`NotServed`, besides null, that ask for nothing, so that they are not refused."""

_INSTEAD = {
    "functions": "; use tools",
    "function_call": "; use tool_choice",
    "chat_template": "; the plan carries the template",
}


class SampledRequest(NotServed, kw_only=True):
    """The fields that completions and conversations share. Null is as good as no field.

    Attributes:
        model: the name of the model; may be left out where the server has only one.
        stream: whether the text is sent as it comes.
        n: the number of texts for each prompt. The seed of each is one more than that of the one before.
        best_of: 1, or ``n``.
        stop: strings that end the text.
        include_stop_str_in_output: whether the text contains the one that ended it.
        stop_token_ids: more tokens that end the text.
        ignore_eos: whether the model's own end tokens do not end the text.
        skip_special_tokens: whether special tokens are left out of the text.
        logit_bias: what is added to the scores of some tokens, by the token's number.
        response_format: what the text must match; ``structured_outputs`` and ``guided_*`` are vLLM's names for that.
        request_id: the second part of the answer's ``id``; otherwise it is random.
        timeout: seconds from the request until the end of the text.

    The other attributes are those of :class:`~runtime.requests.generate_options.GenerateOptions`.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_TEXTS)] | None = None
    best_of: int | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: Tokens | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    request_id: Annotated[str, Meta(pattern=_REQUEST_ID)] | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None

    @property
    def choices(self) -> int:
        """The number of texts for each prompt."""
        return self.n or 1

    def check(self) -> None:
        """Refuse what is known and not served.

        Raises:
            FieldError: it names the field.
        """
        for name in NotServed.__struct_fields__:
            value = getattr(self, name)
            if value is not None and value not in NEUTRAL.get(name, ()):
                raise FieldError(name, f"{name} is not served by this server{_INSTEAD.get(name, '; leave it out')}")
        if self.best_of is not None and self.best_of not in (1, self.choices):
            raise FieldError(
                "best_of", f"best_of is {shown(self.best_of)}; allowed are 1 and n, which is {self.choices}"
            )


class CompletionRequest(SampledRequest, kw_only=True):
    """The body of ``POST /v1/completions``.

    Attributes:
        prompt: a text, the numbers of its tokens, or a list of either.
        echo: whether the text begins with the prompt.
        logprobs: report the probability of each token, and of so many of the most probable ones.
        add_special_tokens: whether the tokenizer adds the tokens that it puts around a text.
    """

    prompt: str | list[str | Count | Tokens]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_special_tokens: bool | None = None

    def prompts(self) -> list[str | Tokens]:
        """The prompts, one or more.

        Raises:
            FieldError: there are none, texts and tokens are mixed, or there are too many.
        """
        given: list[Any] = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if given and all(type(one) is int for one in given):
            given = [given]
        kinds = {type(one) for one in given}
        if len(kinds) != 1 or int in kinds or not all(given):
            raise FieldError(
                "prompt", "prompt must be a text, a list of token numbers, or a list of either; none empty"
            )
        if len(given) * self.choices > MOST_TEXTS:
            raise FieldError(
                "prompt",
                f"{len(given)} prompts with n = {self.choices} ask for more than {MOST_TEXTS} texts; send fewer",
            )
        return given


class ContentPart(Struct, kw_only=True, omit_defaults=True):
    """A part of a message. Only text is served."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(Struct, kw_only=True):
    """One message of a conversation. The reasoning of an answer has two names, of which clients send either."""

    role: str
    content: str | Annotated[list[ContentPart], Meta(max_length=_MOST_PARTS)] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=_MOST_MESSAGES)]


class ChatRequest(SampledRequest, kw_only=True):
    """The body of ``POST /v1/chat/completions``.

    Attributes:
        messages: the conversation.
        add_generation_prompt: whether the answer of the assistant follows.
        continue_final_message: whether the answer goes on in the last message instead.
        add_special_tokens: whether the tokenizer adds the tokens that it puts around a text; templates have them.
        chat_template_kwargs: more that the template may use.
        tools: the functions that the model may call.
        documents: texts for the template.
        reasoning_effort: is given to the template.
        max_completion_tokens: the most new tokens; goes before ``max_tokens``.
        logprobs: whether to report the probability of each token.
        top_logprobs: and of how many of the most probable ones.
        tool_choice: ``auto``, ``none``, ``required`` or a tool by its name.
        parallel_tool_calls: whether an answer may call more than one tool.
        echo: not served.
    """

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = None

    def check(self) -> None:
        """Refuse what is known and not served, and fields that contradict each other."""
        super().check()
        if self.echo:
            raise FieldError("echo", "echo is not served for conversations; use /v1/completions")
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "top_logprobs needs logprobs: true")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise FieldError("tool_choice", f"tool_choice is {shown(self.tool_choice)}, but there are no tools")


class TokenizeRequest(Struct, kw_only=True):
    """The body of ``POST /tokenize``: a prompt or a conversation.

    Attributes:
        model: as in :class:`SampledRequest`.
        prompt: a text.
        messages: a conversation; its other fields are those of :class:`ChatRequest`.
        return_token_strs: whether the answer has the tokens as the vocabulary writes them, too.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template: Any = None
    media_io_kwargs: Any = None
    mm_processor_kwargs: Any = None
    return_token_strs: bool | None = None

    def chat(self) -> ChatRequest | None:
        """The conversation; None for a prompt.

        Raises:
            FieldError: there is neither or both, or a field is not served.
        """
        if (self.messages is None) == (self.prompt is None):
            raise FieldError("prompt", "give prompt or messages, and not both")
        if self.messages is None:
            return None
        chat = ChatRequest(
            messages=self.messages,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            add_special_tokens=self.add_special_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
            tools=self.tools,
            chat_template=self.chat_template,
            media_io_kwargs=self.media_io_kwargs,
            mm_processor_kwargs=self.mm_processor_kwargs,
        )
        chat.check()
        return chat


class DetokenizeRequest(Struct, kw_only=True):
    """The body of ``POST /detokenize``."""

    model: str | None = None
    tokens: Tokens
