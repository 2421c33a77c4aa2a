"""Turns a conversation into the text and the tokens that DBRX was trained to continue."""

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

    In this text nothing tells a control token that the form writes from one that a message only spells; `encode_chat`
    keeps them apart.

    The built-in form is the `default_chat_template` of the Hub's databricks/dbrx-instruct (tiktoken.py); a template
    is rendered as `transformers.PreTrainedTokenizerBase.apply_chat_template` does, within bounds on work and memory.

    Args:
        messages: each with a "role" and a "content", which is a text or a list of parts such as
            `{"type": "text", "text": "Hi"}`, and with what else the form reads, such as "tool_calls". The built-in
            form has system, user and assistant only; there a leading system message is stripped of surrounding white
            space, as in the reference. Every other content is kept as it stands.
        chat_format: the checkpoint's form, such as `Tokenizer.chat_format`.
        tools: descriptions of the functions that the model may call, as JSON schemas.
        system: the system prompt, in place of a system message and of the default. A blank one means none at all,
            except that a template which brings in a prompt other than DBRX's default keeps it.
        add_generation_prompt: whether the text ends with the opening of the assistant's turn.

    Raises:
        InputError: no messages, none but a system message, an unknown role, a missing or wrong-typed field, a system
            prompt that is given twice, or tools, calls or a message that the form leaves out.
        TokenizerError: the checkpoint's template can't be rendered.
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

    What messages and tools say is text. Where it spells a control token, such as `<|im_end|>`, that is encoded as
    ordinary text, so nobody ends a turn or begins one from inside of a message. Other added tokens, such as `<think>`,
    are words of the vocabulary and stay what they are.

    Args:
        tokenizer: the model's.
        messages: as of `render_chat`.
        tools: as of `render_chat`.
        system: as of `render_chat`; it is text, too.
        add_generation_prompt: whether the tokens end with the opening of the assistant's turn.
        control_tokens_in_content: whether texts that spell control tokens become those tokens, as in transformers and
            mlx-lm unless they are told otherwise.
        most: the tokens that the model's context holds, if a conversation that can't fit is to be refused before it
            takes memory.

    Raises:
        InputError: as of `render_chat`, or the template treats a text that spells a control token as no other text, or
            a long conversation has more than `most` tokens.
        TokenizerError: as of `render_chat`.
    """
    conversation = read_conversation(messages, tokenizer.chat_format, tools=tools, system=system)
    conversation.check_used()
    marked = mark(conversation, control_tokens=control_tokens_in_content)
    rendered, _ = marked.marks.take_out(marked.render(len(conversation), add_generation_prompt))
    return encode_prompt(tokenizer, rendered.text, most, add_special_tokens=False, literal=rendered.literal)
