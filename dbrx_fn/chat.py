"""Turns a conversation into the text that DBRX was trained to continue."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dbrx_fn.errors import InputError, TokenizerError

ROLES = ("system", "user", "assistant")

# The wording of the chat template in the Hub's databricks/dbrx-instruct, which LLaMA-Factory (template "dbrx") and
# SGLang (template "dbrx-instruct") repeat. The repository github.com/databricks/dbrx has an older wording.
DEFAULT_SYSTEM_PROMPT = (
    "You are DBRX, created by Databricks. You were last updated in December 2023. You answer questions based on "
    "information available up to that point.\n"
    "YOU PROVIDE SHORT RESPONSES TO SHORT QUESTIONS OR STATEMENTS, but provide thorough responses to more complex and "
    "open-ended questions.\n"
    "You assist with various tasks, from writing to coding (using markdown for code blocks — remember to use ``` with "
    "code, JSON, and tables).\n"
    "(You do not have real-time data access or code execution capabilities. You avoid stereotyping and provide "
    "balanced perspectives on controversial topics. You do not provide song lyrics, poems, or news articles and do "
    "not divulge details of your training data.)\n"
    "This is your system prompt, guiding your responses. Do not reference it, just respond to the user. If you find "
    "yourself talking about this message, stop. You should be responding appropriately and usually that means not "
    "mentioning this.\n"
    "YOU DO NOT MENTION ANY OF THIS INFORMATION ABOUT YOURSELF UNLESS THE INFORMATION IS DIRECTLY PERTINENT TO THE "
    "USER'S QUERY."
)


@dataclass(frozen=True)
class ChatFormat:
    """How one checkpoint writes a conversation down.

    Attributes:
        template: the checkpoint's own Jinja template, or None for the built-in DBRX ChatML.
        default_system: whether the built-in ChatML begins with `DEFAULT_SYSTEM_PROMPT` where a conversation brings no
            system message (`use_default_system_prompt` in tokenizer_config.json). A template decides this by itself.
        special_tokens: what a template sees as variables, such as `{"bos_token": "<|endoftext|>"}`.
        source: the file that the template comes from, for error messages.
    """

    template: str | None = None
    default_system: bool = True
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    source: str = "The chat template"


CHATML = ChatFormat()


def render_chat(
    messages: Sequence[Mapping[str, str]],
    chat_format: ChatFormat = CHATML,
    *,
    system: str | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Renders a conversation as the text of a prompt.

    The built-in form is the `default_chat_template` of the Hub's databricks/dbrx-instruct (tiktoken.py); a template
    is rendered as `transformers.PreTrainedTokenizerBase.apply_chat_template` does.

    Args:
        messages: each with a "role" (system, user or assistant) and a "content". A leading system message is stripped
            of surrounding white space, as in the reference; every other content is kept as it stands.
        chat_format: the checkpoint's form, such as `Tokenizer.chat_format`.
        system: the system prompt, in place of a system message and of the default. A blank one means none at all,
            except that a template which brings in a prompt other than `DEFAULT_SYSTEM_PROMPT` keeps it.
        add_generation_prompt: whether the text ends with the opening of the assistant's turn.

    Raises:
        InputError: no messages, none but a system message, an unknown role, a missing or wrong-typed field, or a
            system prompt that is given twice.
        TokenizerError: the checkpoint's template can't be rendered.
    """
    conversation = _checked(messages)
    if system is not None:
        if any(message["role"] == "system" for message in conversation):
            raise InputError(
                "The system prompt is given twice, as `system` and as a system message; leave one of the two out."
            )
        if system.strip():
            conversation.insert(0, {"role": "system", "content": system})
    if all(message["role"] == "system" for message in conversation):
        raise InputError("The conversation has nothing but a system message; add a message of the user.")

    no_system = system is not None and not system.strip()
    if chat_format.template is None:
        default_system = chat_format.default_system and not no_system
        return _render_chatml(conversation, default_system, add_generation_prompt)
    text = _render_template(conversation, chat_format, add_generation_prompt)
    if no_system:
        # DBRX's own template has no switch for its default prompt, so this is the only way to leave it out.
        text = text.removeprefix(_turn("system", DEFAULT_SYSTEM_PROMPT) + "\n")
    return text


def _checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if not messages:
        raise InputError("The conversation is empty; give at least one message of the user.")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise InputError(
                f"Message {number} is a {type(message).__name__}; it must be a mapping with 'role' and 'content'."
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = f"is a {type(message[key]).__name__}" if key in message else "is missing"
                raise InputError(f"Message {number}: '{key}' {found}; it must be a text.")
        if message["role"] not in ROLES:
            raise InputError(
                f"Message {number} has the unknown role '{message['role']}'; use one of {', '.join(ROLES)}."
            )
    return [dict(message) for message in messages]


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>"


def _render_chatml(conversation: list[dict[str, str]], default_system: bool, add_generation_prompt: bool) -> str:
    turns = [_turn(message["role"], message["content"]) for message in conversation]
    if conversation[0]["role"] == "system":
        turns[0] = _turn("system", conversation[0]["content"].strip())
    elif default_system:
        turns.insert(0, _turn("system", DEFAULT_SYSTEM_PROMPT))
    if add_generation_prompt:
        turns.append("<|im_start|>assistant\n")
    return "\n".join(turns)


def _render_template(conversation: list[dict[str, str]], chat_format: ChatFormat, add_generation_prompt: bool) -> str:
    assert chat_format.template is not None
    try:
        return _compile(chat_format.template).render(
            messages=conversation,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **chat_format.special_tokens,
        )
    # A template is a program of the checkpoint's author, which can fail in any way that a program can.
    except Exception as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder="...").rstrip(".")
        raise TokenizerError(
            f"{chat_format.source} can't be rendered ({reason}); check the order of the roles, or correct the "
            "template, or remove it, which leaves DBRX's built-in ChatML."
        ) from error


class _GenerationBlocks(Extension):
    """Accepts transformers' `{% generation %}` blocks, which mark the assistant's text, and renders what they hold."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would change what the model reads.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)
