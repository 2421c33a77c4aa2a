import hashlib
from datetime import datetime
from typing import Any

import pytest

from dbrx_fn.errors import InputError, TokenizerError
from dbrx_fn.text.chat import CHATML, DEFAULT_SYSTEM_PROMPT, ChatFormat, render_chat
from tests.templates.families import FAMILIES, Family

USER = {"role": "user", "content": " Hi \n"}
ASSISTANT = {"role": "assistant", "content": " Hello. "}
SYSTEM = {"role": "system", "content": "\n Be brief. \n"}

# The default chat template of the Hub's databricks/dbrx-instruct, which conversions carry in tokenizer_config.json.
HUB_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% elif 'system' not in messages[0]['role'] %}"
    "{% set loop_messages = messages %}{% set system_message = '"
    + DEFAULT_SYSTEM_PROMPT.replace("'", "\\'").replace("\n", "\\n")
    + "' %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 %}{% if system_message != false %}"
    "{{ '<|im_start|>system\\n' + system_message | trim + '<|im_end|>\\n'}}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% else %}"
    "{{ '\\n' + '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endif %}"
    "{% if (add_generation_prompt == true and loop.last) %}{{ '\\n' + '<|im_start|>' + 'assistant' + '\\n' }}"
    "{% endif %}{% endfor %}"
)
HUB = ChatFormat(template=HUB_TEMPLATE)
BARE = ChatFormat(default_system=False)


def test_chatml_strips_only_the_system_message() -> None:
    assert render_chat([SYSTEM, USER, ASSISTANT, USER]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n Hi \n<|im_end|>\n"
        "<|im_start|>assistant\n Hello. <|im_end|>\n"
        "<|im_start|>user\n Hi \n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chatml_ends_without_a_newline_where_no_answer_is_asked_for() -> None:
    rendered = render_chat([USER, ASSISTANT], BARE, add_generation_prompt=False)
    assert rendered == "<|im_start|>user\n Hi \n<|im_end|>\n<|im_start|>assistant\n Hello. <|im_end|>"


def test_default_system_prompt_is_the_hubs() -> None:
    # The digest is of the text as the Hub's template writes it, not as this project does.
    digest = hashlib.sha256(DEFAULT_SYSTEM_PROMPT.encode()).hexdigest()
    assert digest == "c42f153d746cfd50b9510169ff352f4f724cb3cc317cc27038f69d0236126802"


@pytest.mark.parametrize("chat_format", [CHATML, HUB])
def test_default_system_prompt_gives_way(chat_format: ChatFormat) -> None:
    assert render_chat([USER], chat_format).startswith(f"<|im_start|>system\n{DEFAULT_SYSTEM_PROMPT}<|im_end|>\n")
    assert render_chat([USER], chat_format, system=" Be brief. ") == render_chat([SYSTEM, USER], chat_format)
    for none_at_all in ("", " \n"):
        assert render_chat([USER], chat_format, system=none_at_all) == (
            "<|im_start|>user\n Hi \n<|im_end|>\n<|im_start|>assistant\n"
        )


def test_settings_can_leave_the_default_system_prompt_out() -> None:
    assert render_chat([USER], BARE) == render_chat([USER], system="")
    assert "Be brief." in render_chat([USER], BARE, system="Be brief.")


CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT],
    [USER, ASSISTANT, USER],
    [SYSTEM, USER, ASSISTANT, USER],
    [USER, SYSTEM, USER],
    [SYSTEM, SYSTEM, USER],
    [ASSISTANT],
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_built_in_equals_the_hubs_template(conversation: list[dict[str, str]], add_generation_prompt: bool) -> None:
    rendered = render_chat(conversation, add_generation_prompt=add_generation_prompt)
    assert rendered == render_chat(conversation, HUB, add_generation_prompt=add_generation_prompt)


TEMPLATES = [
    HUB_TEMPLATE,
    "{{ bos_token }}\n  {%- for message in messages %}\n    {% if loop.index0 == 1 %}{% continue %}{% endif %}\n"
    "  {{ message.role }}: {{ message.content | tojson }}\n{% endfor %}\n{{ eos_token }}",
    "{% for message in messages %}\n{% generation %}{{ message['content'] }}{% endgeneration %}\n{% endfor %}",
    "{{ tools is none }} {{ documents is none }} {{ strftime_now('%Y') }} {{ messages | tojson(indent=2) }} {{ x }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(
    template: str, conversation: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    names = {"bos_token": "<|endoftext|>", "eos_token": "<é>"}
    expected, _ = utilities.render_jinja_template(
        [conversation], chat_template=template, add_generation_prompt=add_generation_prompt, **names
    )
    chat_format = ChatFormat(template, special_tokens=names)
    assert render_chat(conversation, chat_format, add_generation_prompt=add_generation_prompt) == expected[0]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <é>.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": ["<é>"]}}}
RICH: list[dict[str, Any]] = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
    {"role": "tool", "name": "add", "content": '{"sum": "<é>"}'},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nDone.", "name": None},
    {"role": "user", "content": "Thanks."},
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_render_as_in_transformers(family: Family, add_generation_prompt: bool) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    form = family.chat_format
    conversations: list[tuple[list[dict[str, Any]], Any]] = [
        (family.conversation(("one", " uno\n")), None),
        (family.conversation(("one", "uno"), (" two ", "<think>\nhm\n</think>\n\ndos"))[:-1], None),
        (family.conversation(("one", "uno"), ("two", "<think>\nhm\n</think>\n\ndos")), None),
    ]
    if family.tools:
        conversations += [(RICH[:count], TOOLS) for count in range(1, 6)]
    for conversation, tools in conversations:
        # apply_chat_template leaves out what is null.
        kept = [{key: value for key, value in message.items() if value is not None} for message in conversation]
        expected, _ = utilities.render_jinja_template(
            [kept],
            tools=tools,
            chat_template=form.template,
            add_generation_prompt=add_generation_prompt,
            **form.special_tokens,
        )
        rendered = render_chat(conversation, form, tools=tools, add_generation_prompt=add_generation_prompt)
        assert rendered == expected[0]


def test_template_sees_what_transformers_offers() -> None:
    template = (
        "{% for message in messages %}\n"
        "  {% generation %}{{ message | tojson }}{% endgeneration %}\n"
        "  {% break %}\n"
        "{% endfor %}\n"
        "{{ bos_token }} {{ tools is none }} {{ strftime_now('%Y') }}"
    )
    message = {"role": "user", "content": "<é>"}
    rendered = render_chat([message, USER], ChatFormat(template, special_tokens={"bos_token": "<s>"}))
    assert rendered == f'{{"role": "user", "content": "<é>"}}<s> True {datetime.now().year}'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ missing.name }}", "'missing' is undefined"),
        ("{{ messages.append(1) }}", "not safely callable|access to attribute"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_template_failures_are_one_sentence(template: str, reason: str) -> None:
    chat_format = ChatFormat(template, source="models/x/chat_template.jinja")
    with pytest.raises(TokenizerError, match=reason) as caught:
        render_chat([USER], chat_format)
    text = str(caught.value)
    assert text.startswith("models/x/chat_template.jinja can't be rendered (")
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize("chat_format", [CHATML, HUB])
@pytest.mark.parametrize(
    ("messages", "system", "reason"),
    [
        ([], None, "conversation is empty"),
        ([], "Be brief.", "conversation is empty"),
        ([SYSTEM], None, "nothing but a system message"),
        ([SYSTEM, USER], "Be brief.", "given twice"),
        ([SYSTEM, USER], "", "given twice"),
        ([USER, {"role": "assistent", "content": "4"}], None, "Message 2 has the unknown role 'assistent'; use one of"),
        ([{"content": "Hi"}], None, "Message 1: 'role' is missing"),
        ([{"role": "user"}], None, "Message 1: 'content' is missing"),
        ([{"role": "user", "content": 4}], None, "Message 1: 'content' is 4; it must be a text"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            None,
            "'content' has the part {'type': 'image'} where a text",
        ),
        (
            [{"role": "user", "content": object()}],
            None,
            "Message 1 holds <object object at .*> where values of JSON's kinds",
        ),
        ([{"role": "user", "content": "a", "id": 2**64}], None, "Message 1 has a whole number of more than 64 bits"),
        (["Hi"], None, "Message 1 is a str; it must be a mapping"),
    ],
)
def test_conversations_are_checked(
    chat_format: ChatFormat, messages: list[dict[str, str]], system: str | None, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        render_chat(messages, chat_format, system=system)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_messages_stay_as_they_are() -> None:
    messages = [dict(USER)]
    render_chat(messages, system="Be brief.")
    assert messages == [USER]
