"""Finds the parts of a conversation that a model learns: the assistant's entire turns, with their ends."""

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dbrx_fn.errors import DbrxError, InputError, TokenizerError
from dbrx_fn.files.json_file import shown
from dbrx_fn.text.conversation import MarkedConversation
from dbrx_fn.text.literal_chat import RenderedChat
from dbrx_fn.text.literal_text import any_of

# The most characters of all renderings, and the characters that each message adds to its own.
_MOST_RENDERED, _PER_MESSAGE = 2**28, 1000


@dataclass(frozen=True)
class TaughtChat:
    """A conversation, or its beginning, as the model sees it during generation.

    Attributes:
        chat: the text.
        turns: ranges of characters to predict, in order.
    """

    chat: RenderedChat
    turns: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Turn:
    """A turn in a text with marks.

    Attributes:
        start: the end of the prompt that it answers.
        ended: the text up to and including the turn's end.
        whole: the rendered text, or `ended` if that is longer.
    """

    start: int
    ended: str
    whole: str


def taught_chats(conversation: MarkedConversation, only_read: Collection[int] = ()) -> list[TaughtChat]:
    """Renders a conversation so that each of the assistant's turns follows the prompt that it answers.

    A turn begins where the rendered messages before it end, with the generation prompt. It ends with the first token
    that ends generation. Everything in between is predicted: content, reasoning, tool calls, the template's own text.

    Most templates render a turn in the same way regardless of what follows it. Then one text has all turns. Some render
    earlier turns differently, for example without their reasoning. Such a turn gets a text of its own, which ends with
    it.

    A turn with only a system message before it is only read, since generation never starts there.

    Args:
        conversation: from `mark`.
        only_read: numbers of messages, from 0, that aren't predicted.

    Raises:
        InputError: if no turn of the assistant follows another message.
        TokenizerError: if the template can't be rendered, if a turn doesn't follow its prompt, or if nothing ends it.
    """
    roles = [message["role"] for message in conversation.plain.messages]
    others = (number for number, role in enumerate(roles) if role not in ("system", "developer", "assistant"))
    numbers = [number for number in range(next(others, len(roles)), len(roles)) if roles[number] == "assistant"]
    if not numbers:
        raise InputError(
            "The conversation has no message of the assistant behind one of the user, which is what is learned; add "
            "one."
        )
    wanted = [number for number in numbers if number not in only_read]
    _check_size(conversation, wanted)
    left = [_turn(conversation, number) for number in wanted]
    chats: list[TaughtChat] = []
    while left:
        whole = left[-1].whole
        turns = [turn for turn in left if whole.startswith(turn.ended)]
        left = [turn for turn in left if not whole.startswith(turn.ended)]
        chat, places = conversation.marks.take_out(whole, [p for turn in turns for p in (turn.start, len(turn.ended))])
        chats.append(TaughtChat(chat, tuple(zip(places[::2], places[1::2], strict=True))))
    return chats[::-1]


def _check_size(conversation: MarkedConversation, numbers: Sequence[int]) -> None:
    """Raises `InputError` for a conversation that is too long: its time grows with the square of its length."""
    sizes = [_PER_MESSAGE + len(str(message)) for message in conversation.plain.messages]
    before = list(itertools.accumulate(sizes))
    if 2 * sum(before[number] for number in numbers) > _MOST_RENDERED:
        raise InputError(
            f"The conversation has {len(sizes)} messages and {len(numbers)} turns of the assistant, too many to render "
            "each turn with all before it: cut it into several conversations."
        )


def _turn(conversation: MarkedConversation, number: int) -> _Turn:
    form = conversation.plain.chat_format
    refused = f"{form.source} can't be learned from: "
    prompt, whole = conversation.render(number, True), conversation.render(number + 1, False)
    if not whole.startswith(prompt):
        same = next(place for place in range(len(prompt)) if prompt[place] != whole[place : place + 1])
        near = max(same - 20, 0)
        raise TokenizerError(
            f"{refused}message {number + 1} would be generated behind {shown(prompt[near:])}, but is written as "
            f"{shown(whole[near:])}; correct the template or the message, or give 'prompt' and 'completion' instead."
        )
    pattern = any_of(form.ends)
    found = None if pattern is None else pattern.search(whole, len(prompt))
    if found is None:
        ended = _ended_by_the_next(conversation, number, whole, pattern)
        if ended is None:
            raise TokenizerError(
                f"{refused}message {number + 1} ends with {shown(whole[-40:])} and nothing that stops generation "
                f"({', '.join(form.ends) or 'no token'} would); write the token that ends a turn into the template, or "
                "add it to eos_token_id in generation_config.json."
            )
        return _Turn(len(prompt), ended, ended)
    rest = whole[found.end() :]
    for token in sorted(form.control_tokens, key=len, reverse=True):
        rest = rest.replace(token, "")
    if rest.strip():
        raise TokenizerError(
            f"{refused}message {number + 1} goes on with {shown(rest.strip())} behind {found[0]}, which stops "
            "generation; correct the template, or eos_token_id in generation_config.json."
        )
    return _Turn(len(prompt), whole[: found.end()], whole)


def _ended_by_the_next(
    conversation: MarkedConversation, number: int, whole: str, pattern: re.Pattern[str] | None
) -> str | None:
    """The text up to the token that opens the user's turn, if that token stops generation, as in the GLM family."""
    try:
        followed = conversation.render(number + 1, False, then=[{"role": "user", "content": "."}])
    except DbrxError:
        return None
    found = pattern.search(followed, len(whole)) if pattern and followed.startswith(whole) else None
    if found is None or followed[len(whole) : found.start()].strip():
        return None
    return followed[: found.end()]
