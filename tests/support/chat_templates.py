# ruff: noqa: E501, RUF001
"""Chat templates in the formats of well-known models, and conversations to render with them.

They are written for these tests, with the formats and the parts of the language that the models' own templates use.
"""

from __future__ import annotations

from typing import Any

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

CHATML = """
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content | trim ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

SMOLLM2 = """{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}"""

LLAMA_3 = """{{- bos_token }}
{%- set today = date_string if date_string is defined else strftime_now("%d %b %Y") %}
{%- macro head(role) %}<|start_header_id|>{{ role }}<|end_header_id|>{{ "\\n\\n" }}{% endmacro %}
{#- The first message may be the system's. #}
{%- set said = messages[0].content if messages[0].role == "system" else "" %}
{%- set turns = messages[1:] if messages[0].role == "system" else messages %}
{{- head("system") ~ "Today is " ~ today ~ "\\n" ~ said | trim ~ "<|eot_id|>" }}
{%- if tools is not none %}
    {%- if not turns %}{{- raise_exception("There is no first message to put the tools into") }}{%- endif %}
    {{- head("user") }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n" }}{%- endfor %}
    {{- turns[0].content | trim ~ "<|eot_id|>" }}
    {%- set turns = turns[1:] %}
{%- endif %}
{%- for turn in turns %}
    {%- if turn.role == "tool" %}
        {{- head("ipython") }}
        {%- if turn.content is mapping or turn.content is iterable %}{{- turn.content | tojson }}{% else %}{{- turn.content }}{% endif %}
    {%- elif "tool_calls" in turn %}
        {%- if turn.tool_calls | length != 1 %}{{- raise_exception("One call at once") }}{%- endif %}
        {{- head("assistant") }}{"name": "{{ turn.tool_calls[0].function.name }}", "parameters": {{ turn.tool_calls[0].function.arguments | tojson }}}
    {%- else %}
        {{- head(turn.role) ~ turn.content | trim }}
    {%- endif %}
    {{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- head("assistant") }}{%- endif %}
"""

QWEN_2_5 = """{%- set has_system = messages[0].role == "system" %}
{{- "<|im_start|>system\\n" }}{{- messages[0].content if has_system else "Be helpful." }}
{%- if tools %}
    {{- "\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" ~ tool | tojson }}{%- endfor %}
    {{- "\\n</tools>" }}
{%- endif %}
{{- "<|im_end|>\\n" }}
{%- for message in messages %}
    {%- if loop.first and has_system %}
    {%- elif message.role == "tool" %}
        {%- if loop.first or loop.previtem.role != "tool" %}{{- "<|im_start|>user" }}{%- endif %}
        {{- "\\n<tool_response>\\n" ~ message.content ~ "\\n</tool_response>" }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{- "<|im_end|>\\n" }}{%- endif %}
    {%- elif message.tool_calls %}
        {{- "<|im_start|>assistant" ~ ("\\n" ~ message.content if message.content else "") }}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}{{- call.arguments | tojson }}{{- "}\\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
    {%- else %}{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}
"""

QWEN_3 = """{%- set found = namespace(question=-1) %}
{%- for message in messages[::-1] %}
    {%- if found.question < 0 and message.role == "user" and message.content is string and not message.content.startswith("<tool_response>") %}
        {%- set found.question = loop.revindex0 %}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- "<|im_start|>system\\n" }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- "<|im_end|>\\n" }}{%- endif %}
{%- for message in messages %}
    {%- set said = message.content if message.content is string else "" %}
    {%- set thoughts = message.reasoning_content if message.reasoning_content is string else "" %}
    {%- if message.role == "assistant" and not thoughts and "</think>" in said %}
        {%- set parts = said.split("</think>") %}
        {%- set thoughts = parts[0].split("<think>")[-1].strip("\\n") %}
        {%- set said = parts[-1].lstrip("\\n") %}
    {%- endif %}
    {{- "<|im_start|>" ~ message.role ~ "\\n" }}
    {%- if thoughts and loop.index0 > found.question %}{{- "<think>\\n" ~ thoughts ~ "\\n</think>\\n\\n" }}{%- endif %}
    {{- said }}
    {%- for call in message.tool_calls or [] %}{{- "<tool_call>" }}{{- (call.function or call) | tojson }}{{- "</tool_call>" }}{%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- "<think>\\n\\n</think>\\n\\n" }}{%- endif %}
{%- endif %}
"""

MISTRAL = """{{- bos_token }}
{%- set turns = messages | rejectattr("role", "equalto", "system") | list %}
{%- set told = messages | selectattr("role", "equalto", "system") | map(attribute="content") | join("\\n") %}
{%- set asked = turns | selectattr("role", "equalto", "user") | list %}
{%- set count = namespace(plain=0) %}
{%- for turn in turns %}
    {%- if turn.role == "tool" %}{{- "[TOOL_RESULTS]" ~ {"content": turn.content, "call_id": turn.tool_call_id} | tojson ~ "[/TOOL_RESULTS]" }}
    {%- elif turn.tool_calls is defined and turn.tool_calls is not none %}
        {{- "[TOOL_CALLS][" }}
        {%- for call in turn.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}{{- raise_exception("An id has nine characters") }}{%- endif %}
            {{- (call.function | tojson)[:-1] ~ ', "id": "' ~ call.id ~ '"}' ~ ("" if loop.last else ", ") }}
        {%- endfor %}
        {{- "]" ~ eos_token }}
    {%- else %}
        {%- if turn.role not in ("user", "assistant") %}{{- raise_exception("Unknown role " ~ turn.role) }}{%- endif %}
        {%- if (count.plain % 2 == 0) != (turn.role == "user") %}{{- raise_exception("Users and assistants take turns") }}{%- endif %}
        {%- set count.plain = count.plain + 1 %}
        {%- if turn.role == "assistant" %}{{- turn.content + eos_token }}
        {%- else %}
            {%- if tools is not none and turn == asked[-1] %}
                {{- "[AVAILABLE_TOOLS][" }}
                {%- for tool in tools %}
                    {{- "{" }}
                    {%- for key, value in tool.function.items() if key != "return" %}{{- '"' ~ key ~ '": ' ~ value | tojson ~ ("" if loop.last else ", ") }}{%- endfor %}
                    {{- "}" if loop.last else "}, " }}
                {%- endfor %}
                {{- "][/AVAILABLE_TOOLS]" }}
            {%- endif %}
            {{- "[INST]" ~ (told ~ "\\n\\n" if loop.last and told) ~ turn.content ~ "[/INST]" }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """{%- macro words(content) -%}
    {%- if content is string -%}{{ content | trim }}
    {%- elif content is sequence -%}{{ content | selectattr('type', 'equalto', 'text') | map(attribute='text') | map('trim') | join }}
    {%- else -%}{{ raise_exception('The content is neither a text nor a list') }}{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- set told = words(messages[0].content) + '\n\n' if messages[0].role == 'system' else '' -%}
{%- for message in (messages[1:] if told else messages) -%}
    {%- if loop.index is odd and message.role != 'user' or loop.index is even and message.role == 'user' -%}
        {{ raise_exception('Users and models take turns') }}
    {%- endif -%}
    {{ '<start_of_turn>' + {'assistant': 'model'}.get(message.role, message.role) + '\n' }}{{ told if loop.first }}
    {{- words(message.content) }}{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""

PHI = """{% for message in messages %}
{% if message['role'] == 'system' and message['content'] %}
{{'<|system|>\n' + message['content'] + '<|end|>\n'}}
{% elif message['role'] == 'user' %}
{{'<|user|>\n' + message['content'] + '<|end|>\n'}}
{% elif message['role'] == 'assistant' %}
{% generation %}{{'<|assistant|>\n' + (message['content'] | default('', true)) + '<|end|>\n'}}{% endgeneration %}

{% else %}{% continue %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

DEEPSEEK = """{%- set now = namespace(told=[], after_tool=false) -%}
{%- for message in messages if message.role == 'system' %}{%- set now.told = now.told + [message.content] %}{%- endfor -%}
{{ bos_token }}{{ now.told | join('\\n\\n') }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'tool' %}{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
    {%- elif message['role'] == 'assistant' and 'tool_calls' in message %}
        {{- '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
        {%- for call in message['tool_calls'] %}
            {{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] }}
            {{- call['function']['arguments'] | tojson(sort_keys=true, separators=(',', ':')) + '<｜tool▁call▁end｜>' }}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ('' if now.after_tool else '<｜Assistant｜>') + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
    {%- set now.after_tool = message['role'] == 'tool' %}
{%- endfor -%}
{% if add_generation_prompt and not now.after_tool %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

COMMAND = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}
{%- macro types(schema) -%}
    {%- for name, fields in schema.properties.items() | sort(attribute=0) -%}
        {{ name }}: {{ {'string': 'str', 'number': 'float', 'integer': 'int'}.get(fields.type, fields.type | upper) }}{{ ', ' if not loop.last }}
    {%- endfor -%}
{%- endmacro -%}
{%- if tools %}{%- for tool in tools | rejectattr('function', 'none') -%}
def {{ tool.function.name }}({{ types(tool.function.parameters) }}):
    \"\"\"{{ tool.function.description | default('nothing') | replace('\\n', ' ') }}\"\"\"
{% endfor %}{% endif -%}
{%- if documents %}{% for document in documents %}Document: {{ loop.index0 }} {{ document.title | title }}: {{ document.text | truncate(20) }}
{% endfor %}{% endif -%}
{% if system != false %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system + '<|END_OF_TURN_TOKEN|>' }}{% endif %}
{%- for message in loop_messages %}
    {%- set content = message['content'] | default('') %}
    {%- if message['role'] == 'user' %}{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
    {%- elif message['role'] == 'assistant' %}
        {%- if message.tool_calls %}{{ '<|CHATBOT_TOKEN|>' }}[{% for call in message.tool_calls %}{{ call.function | tojson(indent=2) | indent(4) }}{% if loop.last %}{% break %}{% endif %},{% endfor %}]
        {%- else %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{%- endif %}
    {%- elif message['role'] == 'tool' %}{{ '<results>\\n' ~ content | escape ~ '\\n</results>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}
"""

TEMPLATES = {
    "ChatML": CHATML,
    "SmolLM2": SMOLLM2,
    "Llama 3": LLAMA_3,
    "Qwen 2.5": QWEN_2_5,
    "Qwen 3": QWEN_3,
    "Mistral": MISTRAL,
    "Gemma": GEMMA,
    "Phi": PHI,
    "DeepSeek": DEEPSEEK,
    "Command": COMMAND,
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & later,\n in a 'town' of \"Ελλάδα\".",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}},
            "required": ["town"],
        },
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "abcdef123",
            "type": "function",
            "function": {"name": "weather", "arguments": {"town": "Zürich", "days": 2}},
        }
    ],
}


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


_ASK, _ANSWER, _SYSTEM = _turn("user", "What is 2 + 2?"), _turn("assistant", "4"), _turn("system", "  Be brief.\n")
_TOOL = {"role": "tool", "tool_call_id": "abcdef123", "name": "weather", "content": '{"degrees": 21.5, "sky": "☀️"}'}

CONVERSATIONS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([_ASK], {}),
    ([_SYSTEM, _ASK], {}),
    ([_ASK, _ANSWER, _turn("user", "And 3 + 3?")], {}),
    ([_SYSTEM, _ASK, _ANSWER, _turn("user", "again"), _turn("assistant", "8"), _turn("user", "ok")], {}),
    ([_turn("user", "weather in Zürich?")], {"tools": [WEATHER]}),
    ([_SYSTEM, _turn("user", "weather?")], {"tools": [WEATHER, WEATHER]}),
    ([_turn("user", "weather?"), CALL, _TOOL], {"tools": [WEATHER]}),
    (
        [_turn("user", "weather?"), CALL, _TOOL, _turn("assistant", "warm"), _turn("user", "thanks")],
        {"tools": [WEATHER]},
    ),
    ([_turn("user", "你好 🙃 العربية हिन्दी Привет 👨‍👩‍👧"), _turn("assistant", "<b>&amp; 'ja' \"nein\"</b>\t")], {}),
    ([_turn("user", " spaces \n\n and {{ braces }} {% raw %} <|im_end|> ")], {}),
    ([_ASK, {**_ANSWER, "reasoning_content": "two and two"}, _turn("user", "why?")], {}),
    ([_ASK, _turn("assistant", "<think>\nsum\n</think>\n\n4")], {"enable_thinking": False}),
    ([_ASK], {"documents": [{"title": "a title", "text": "a text that is longer than twenty letters"}]}),
    ([_ANSWER, _ASK], {}),
    ([_turn("user", [{"type": "text", "text": "parts"}, {"type": "text", "text": "of text"}])], {}),
    ([_ASK, {"role": "assistant", "content": None, "tool_calls": None}], {}),
]
"""Messages, and the other variables. Some templates refuse some of them."""
