"""Reads the body of `/v1/chat/completions`: a conversation to be answered."""

from collections.abc import Mapping
from typing import Any

from dbrx_fn.serving.asked import Asked, choices_of, read_n, read_request, read_stops, read_stream
from dbrx_fn.serving.fields import FieldError, Fields, read_object, wrong_value
from dbrx_fn.serving.request import MOST_TOP_LOGPROBS
from dbrx_fn.serving.served_model import ServedModel
from dbrx_fn.text.chat import encode_chat
from dbrx_fn.text.conversation import template_names

_ASK_FOR_NOTHING = ("user", "safety_identifier", "prompt_cache_key")
"""Texts that tell who asks."""

_REFUSED: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that aren't supported, each with the values that ask for nothing."""


def read_chat(body: bytes, model: ServedModel) -> Asked:
    """Reads a body, and encodes its conversation.

    Fields and their meaning: https://platform.openai.com/docs/api-reference/chat/create. Beside those there are
    `top_k`, `min_p`, `repetition_penalty` and `ignore_eos`, as vLLM has them, and `experts`. Messages are plain
    text: control tokens spelled in them stay text.

    Raises:
        InputError: naming the field that can't be followed.
        TokenizerError: if the chat template can't be rendered.
    """
    fields = read_object(body)
    adapter = model.read_adapter(fields)
    for name in _ASK_FOR_NOTHING:
        fields.text(name)
    for name, neutral in _REFUSED.items():
        fields.refuse(name, *neutral)
    n = read_n(fields, model)
    stream, include_usage = read_stream(fields)
    max_tokens = _max_tokens(fields)
    request = read_request(fields, model, adapter, top_logprobs=_top_logprobs(fields))
    stops = read_stops(fields, model, request)
    messages = read_messages(fields, model)
    fields.finish()
    prompt = encode_chat(model.tokenizer, messages, most=model.config.max_seq_len)
    return Asked(choices_of(request, [prompt], n, max_tokens, model), n, stops, stream, include_usage)


def read_messages(fields: Fields, model: ServedModel) -> list[dict[str, Any]]:
    """The conversation, as `encode_chat` takes it.

    Raises:
        FieldError: if it isn't a list of messages, or one has a key that the model's chat template doesn't read.
    """
    messages = fields.required("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise wrong_value("messages", messages, "a list of messages")
    read = {"role", "content", *template_names(model.tokenizer.chat_format)}
    for number, message in enumerate(messages):
        for key, value in message.items():
            if key not in read and value not in (None, "", [], {}):
                raise FieldError(
                    f"messages[{number}]",
                    f"messages[{number}] has {key[:80]!r}, which the model's chat template doesn't read: leave it out.",
                    "unsupported_parameter",
                )
    return messages


def _max_tokens(fields: Fields) -> int | None:
    older, newer = (fields.whole(name, 1, 2**31 - 1) for name in ("max_tokens", "max_completion_tokens"))
    if older is not None and newer is not None and older != newer:
        raise FieldError(
            "max_tokens", f"max_tokens is {older} and max_completion_tokens is {newer}: give one of the two."
        )
    return older if newer is None else newer


def _top_logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, MOST_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise FieldError("top_logprobs", "top_logprobs is given without logprobs: set logprobs to true.")
    return (top or 0) if wanted else None
