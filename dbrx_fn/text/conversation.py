"""Checks conversations from users, servers and data, and renders them, or their beginnings."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import jinja2

from dbrx_fn.errors import DbrxError, InputError, TokenizerError
from dbrx_fn.files.json_file import shown
from dbrx_fn.text.chat_format import DEFAULT_SYSTEM_PROMPT, ChatFormat
from dbrx_fn.text.literal_chat import Marks
from dbrx_fn.text.template_sandbox import compile_template, render
from dbrx_fn.text.valid_text import valid_text

BUILT_IN_ROLES = ("system", "user", "assistant")
ROLES = (*BUILT_IN_ROLES, "developer", "tool", "function", "ipython", "observation")
"""Common roles. A template's own roles are accepted too."""

SAID = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")
"""Keys of a message for text beside its content."""

_REASONING = SAID[2:]


@dataclass(frozen=True)
class Conversation:
    """Checked messages, made by `read_conversation`.

    Attributes:
        messages: values of JSON's types, without null keys.
        tools: descriptions of functions, or None.
        chat_format: the format of the conversation.
        default_system: whether the format's default system prompt is kept.
        now: the time that a template sees, the same in all renderings.
    """

    messages: tuple[dict[str, Any], ...]
    tools: list[Any] | None
    chat_format: ChatFormat
    default_system: bool
    now: datetime

    def __len__(self) -> int:
        return len(self.messages)

    def render(self, count: int, add_generation_prompt: bool, then: Sequence[dict[str, Any]] = ()) -> str:
        """Renders the first `count` messages, followed by those of `then`.

        Raises:
            TokenizerError: if the template can't be rendered.
        """
        return self._render((*self.messages[:count], *then), add_generation_prompt)

    def check_used(self) -> None:
        """Checks that the format renders every message whose role isn't user or assistant.

        Raises:
            InputError: if it leaves one out.
            TokenizerError: if the template can't be rendered.
        """
        others = [n for n, message in enumerate(self.messages) if message["role"] not in ("user", "assistant")]
        if not others:
            return
        # Each content is replaced by a unique word. One rendering then shows most of the messages.
        word = _unused_word(self.messages)
        probes = {n: {**self.messages[n], "content": f"{word}{n}."} for n in others}
        shown_at_once = self._try([probes.get(n, message) for n, message in enumerate(self.messages)]) or ""
        for n in others:
            if f"{word}{n}." in shown_at_once:
                continue
            rest = [*self.messages[:n], *self.messages[n + 1 :]]
            # Some templates render a system message only if the last message is the user's.
            counts = range(len(self), max(n, 1), -1)
            if all(self._is_same(self.messages[:count], rest[: count - 1]) for count in counts):
                raise InputError(
                    f"{self.chat_format.source} leaves out message {n + 1}, of the role "
                    f"{shown(self.messages[n]['role'])}: take the message out, or correct the template."
                )

    def unread_keys(self) -> dict[str, int]:
        """Keys of messages without effect on the rendering, each with the number of its first message, from 0."""
        names = template_names(self.chat_format)
        read = {"role", "content", *names, *(_REASONING if names.intersection(_REASONING) else ())}
        found: dict[str, int] = {}
        for number, message in enumerate(self.messages):
            for key, value in message.items():
                # Reasoning is stored under two names.
                if key not in read and key not in found and key not in _REASONING[1:] and value not in ("", [], {}):
                    found[key] = number
        without = {
            key: [{name: value for name, value in message.items() if name != key} for message in self.messages]
            for key in found
        }
        return {key: number for key, number in found.items() if self._is_same(self.messages, without[key])}

    def _is_same(self, messages: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> bool:
        """Whether two lists of messages render to the same prompt."""
        text = self._try(messages)
        return text is not None and text == self._try(others)

    def _try(self, messages: Sequence[dict[str, Any]]) -> str | None:
        """The prompt, or None if the template refuses these messages."""
        try:
            return self._render(messages, True)
        except DbrxError:
            return None

    def _render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        form = self.chat_format
        if form.template is None:
            return _render_chatml(messages, form.default_system and self.default_system, add_generation_prompt)
        variables = {
            **form.special_tokens,
            "messages": list(messages),
            "tools": self.tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = render(compile_template(form.template), variables, self.now)
        # A template is a program, and can fail in any way.
        except Exception as error:
            raise _cannot_be_rendered(form, error) from error
        if not self.default_system:
            # DBRX's own template has no option to leave out its default prompt, so it is removed here.
            text = text.removeprefix(_turn("system", DEFAULT_SYSTEM_PROMPT) + "\n")
        return text


@dataclass(frozen=True)
class MarkedConversation:
    """A conversation with marks at the places where it spells control tokens.

    Attributes:
        plain: the conversation without marks.
        marked: the conversation with marks.
        marks: removes the marks from rendered text.
    """

    plain: Conversation
    marked: Conversation
    marks: Marks

    def render(self, count: int, add_generation_prompt: bool, then: Sequence[dict[str, Any]] = ()) -> str:
        """Renders like `Conversation.render`, with marks.

        Raises:
            InputError: if the template changes a text that spells a control token.
            TokenizerError: if the template can't be rendered.
        """
        text = self.marked.render(count, add_generation_prompt, then)
        if self.marks and self.marks.take_out(text)[0].text != self.plain.render(count, add_generation_prompt, then):
            raise InputError(
                "The conversation spells a control token, such as <|im_end|>, in a place where the chat template "
                "changes its text: take it out, or let control tokens in."
            )
        return text


def mark(conversation: Conversation, *, control_tokens: bool) -> MarkedConversation:
    """Puts marks into a conversation.

    Args:
        conversation: from `read_conversation`.
        control_tokens: whether spelled control tokens become tokens. Then there are no marks.

    Raises:
        InputError: if it uses every character that could be a mark.
    """
    form = conversation.chat_format
    values = [*conversation.messages, conversation.tools, form.template]
    marks = Marks(() if control_tokens else form.control_tokens, values)
    messages = tuple(marks.put_in(message) for message in conversation.messages)
    marked = replace(conversation, messages=messages, tools=marks.put_in(conversation.tools))
    return MarkedConversation(conversation, marked, marks)


def read_conversation(
    messages: Sequence[Mapping[str, Any]],
    chat_format: ChatFormat,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    system: str | None = None,
    now: datetime | None = None,
) -> Conversation:
    """Checks a conversation, and converts it to the form that transformers gives to a template.

    Null keys are removed. Reasoning gets each name under which templates read it. Parts of a content are joined into
    one text if the format doesn't read parts.

    Args:
        messages: as in `dbrx_fn.text.chat.render_chat`.
        chat_format: the format of the conversation.
        tools: as in `dbrx_fn.text.chat.render_chat`.
        system: as in `dbrx_fn.text.chat.render_chat`.
        now: the time that a template sees. The present, if not given.

    Raises:
        InputError: as in `dbrx_fn.text.chat.render_chat`.
        TokenizerError: if the checkpoint's template can't be compiled.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"The conversation is {shown(messages)} where a list of messages is expected.")
    if not messages:
        raise InputError("The conversation is empty; give at least one message of the user.")
    names = template_names(chat_format)
    checked = [_checked(message, number, chat_format, names) for number, message in enumerate(messages, start=1)]
    if system is not None:
        if any(message["role"] == "system" for message in checked):
            raise InputError(
                "The system prompt is given twice, as `system` and as a system message; leave one of the two out."
            )
        if system.strip():
            checked.insert(0, {"role": "system", "content": system})
    if all(message["role"] == "system" for message in checked):
        raise InputError("The conversation has nothing but a system message; add a message of the user.")
    if tools and "tools" not in names:
        raise InputError(f"{chat_format.source} has no place for tools: leave them out, or take a template that has.")
    return Conversation(
        tuple(checked),
        [_plain(tool, "The description of a tool") for tool in tools] if tools else None,
        chat_format,
        default_system=system is None or bool(system.strip()),
        now=datetime.now() if now is None else now,
    )


def template_names(chat_format: ChatFormat) -> frozenset[str]:
    """Variables, attributes, keys and constant texts of the format's template.

    Raises:
        TokenizerError: if it can't be compiled.
    """
    if chat_format.template is None:
        return frozenset()
    try:
        program = compile_template(chat_format.template)
    except Exception as error:
        raise _cannot_be_rendered(chat_format, error) from error
    return program.names | program.variables


def _checked(message: object, number: int, chat_format: ChatFormat, names: frozenset[str]) -> dict[str, Any]:
    where = f"Message {number}"
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is a {type(message).__name__}; it must be a mapping with 'role' and 'content'.")
    plain = {key: value for key, value in _plain(message, where).items() if value is not None}
    role, content = plain.get("role"), plain.get("content")
    if not isinstance(role, str):
        raise InputError(f"{where}: 'role' {_found(message, 'role')}; it must be a text.")
    roles = BUILT_IN_ROLES if chat_format.template is None else ROLES
    if role not in roles and role not in names:
        raise InputError(f"{where} has the unknown role {shown(role)}; use one of {', '.join(roles)}.")
    calls = [key for key in SAID[:2] if plain.get(key)]
    if isinstance(content, list):
        plain["content"] = _parts(content, where, whole="text" in names)
    elif not isinstance(content, str) and not (content is None and calls):
        raise InputError(f"{where}: 'content' {_found(message, 'content')}; it must be a text.")
    for key in calls:
        if key not in names:
            raise InputError(f"{where}: {chat_format.source} has no place for '{key}'; take a template that has.")
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _found(message: Mapping[str, Any], key: str) -> str:
    return f"is {shown(message[key])}" if key in message else "is missing"


def _parts(parts: list[Any], where: str, whole: bool) -> list[Any] | str:
    """A content's parts, unchanged or as one text."""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise InputError(
                f"{where}: 'content' has the part {shown(part)} where a text or parts such as "
                '{"type": "text", "text": "Hi"} are expected, since DBRX reads nothing but text.'
            )
    return parts if whole else "".join(part["text"] for part in parts)


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """The value rebuilt from JSON's types, since a template could call methods of other types."""
    if depth > 50:
        raise InputError(f"{where} is nested more than 50 deep: make it flatter.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, int):
        if value.bit_length() > 64:
            raise InputError(f"{where} has a whole number of more than 64 bits: give it as a text.")
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        keys = [str(key) for key in value]
        return {_plain(key, where): _plain(value[old], where, depth + 1) for key, old in zip(keys, value, strict=True)}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(item, where, depth + 1) for item in value]
    raise InputError(f"{where} holds {shown(value)} where values of JSON's kinds are expected.")


def _cannot_be_rendered(chat_format: ChatFormat, error: Exception) -> TokenizerError:
    said = str(error)
    if isinstance(error, jinja2.TemplateSyntaxError):
        said = f"line {error.lineno}: {error.message}"
    # A template's error can be long, and can contain characters that steer a terminal.
    reason = textwrap.shorten((said or type(error).__name__)[:2000], 200, placeholder="...").rstrip(".")
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in reason)
    return TokenizerError(
        f"{chat_format.source} can't be rendered ({visible}); check the order of the roles, or correct the "
        "template, or remove it, which leaves DBRX's built-in ChatML."
    )


def _unused_word(messages: Sequence[dict[str, Any]]) -> str:
    text = str(messages)
    return next(word for word in (f"probe{number}of" for number in itertools.count()) if word not in text)


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>"


def _render_chatml(messages: Sequence[dict[str, Any]], default_system: bool, add_generation_prompt: bool) -> str:
    turns = [_turn(message["role"], message["content"]) for message in messages]
    if messages and messages[0]["role"] == "system":
        turns[0] = _turn("system", messages[0]["content"].strip())
    elif default_system:
        turns.insert(0, _turn("system", DEFAULT_SYSTEM_PROMPT))
    if add_generation_prompt:
        turns.append("<|im_start|>assistant\n")
    return "\n".join(turns)
