"""Renders and encodes conversations as prompts, in the form that the model was trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from dbrx_fn.text.chat_format import CHATML as CHATML
from dbrx_fn.text.chat_format import DEFAULT_SYSTEM_PROMPT as DEFAULT_SYSTEM_PROMPT
from dbrx_fn.text.chat_format import ChatFormat as ChatFormat
from dbrx_fn.text.conversation import mark, read_conversation
from dbrx_fn.text.prompt_length import encode_prompt
from dbrx_fn.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


def render_chat(
    messages: Messages,
    chat_format: ChatFormat = CHATML,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    system: str | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Renders a conversation as the text of a prompt.

    The text doesn't show whether a control token was written by the format or only spelled by a message. `encode_chat`
    makes this distinction.

    The built-in format is the `default_chat_template` of the Hub's databricks/dbrx-instruct (tiktoken.py). A template
    is rendered as in `transformers.PreTrainedTokenizerBase.apply_chat_template`, within bounds on work and memory.

    Args:
        messages: mappings with a "role" and a "content", and other keys that the format reads, such as "tool_calls".
            The content is a text, or a list of parts such as `{"type": "text", "text": "Hi"}`. The built-in format
            knows the roles system, user and assistant. It strips white space around a leading system message, as in the
            reference. All other content is unchanged.
        chat_format: the checkpoint's format, such as `Tokenizer.chat_format`.
        tools: descriptions of the functions that the model may call, as JSON schemas.
        system: the system prompt, instead of a system message and of the default. A blank one means none, but a
            template's own default, if it isn't DBRX's, stays.
        add_generation_prompt: whether the text ends with the opening of the assistant's turn.

    Raises:
        InputError: if there is no message or only a system message, if a role is unknown, if a field is missing or of a
            wrong type, if the system prompt is given twice, or if the format leaves out tools, calls or a message.
        TokenizerError: if the checkpoint's template can't be rendered.
    """
    conversation = read_conversation(messages, chat_format, tools=tools, system=system)
    conversation.check_used()
    return conversation.render(len(conversation), add_generation_prompt)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    system: str | None = None,
    add_generation_prompt: bool = True,
    control_tokens_in_content: bool = False,
    most: int | None = None,
) -> list[int]:
    """Encodes a conversation as the tokens of a prompt.

    The contents of messages and tools are text. A control token spelled there, such as `<|im_end|>`, is encoded as
    ordinary text, so a message can't end a turn or begin one. Other added tokens, such as `<think>`, are words of the
    vocabulary, and are encoded as such.

    Args:
        tokenizer: the model's.
        messages: as in `render_chat`.
        tools: as in `render_chat`.
        system: as in `render_chat`. It is text, too.
        add_generation_prompt: whether the tokens end with the opening of the assistant's turn.
        control_tokens_in_content: whether spelled control tokens become tokens, which is the default of transformers
            and mlx-lm.
        most: the model's context length. A conversation that can't fit is then refused before it takes memory.

    Raises:
        InputError: as in `render_chat`; or if the template changes a text that spells a control token; or if a long
            conversation has more than `most` tokens.
        TokenizerError: as in `render_chat`.
    """
    conversation = read_conversation(messages, tokenizer.chat_format, tools=tools, system=system)
    conversation.check_used()
    marked = mark(conversation, control_tokens=control_tokens_in_content)
    rendered, _ = marked.marks.take_out(marked.render(len(conversation), add_generation_prompt))
    return encode_prompt(tokenizer, rendered.text, most, add_special_tokens=False, literal=rendered.literal)
