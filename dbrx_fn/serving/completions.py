"""Reads the body of `/v1/completions`: one or more prompts to continue."""

from dataclasses import replace
from typing import cast

from dbrx_fn.serving.asked import Asked, choices_of, read_n, read_request, read_stops, read_stream
from dbrx_fn.serving.fields import FieldError, read_object, wrong_value
from dbrx_fn.serving.served_model import ServedModel
from dbrx_fn.text.prompt_length import encode_prompt

_MOST_LOGPROBS = 5
"""The most top tokens with log-probabilities in OpenAI's completions API."""

_MOST_SCORED = 2**18
"""The most prompt tokens with log-probabilities in one answer. Each takes some 100 bytes of JSON."""

Prompt = str | list[int]


def read_completion(body: bytes, model: ServedModel) -> Asked:
    """Reads a body, and encodes its prompts.

    Fields and their meaning: https://platform.openai.com/docs/api-reference/completions/create. Beside those there are
    `top_k`, `min_p`, `repetition_penalty` and `ignore_eos`, as vLLM has them, and `experts`.

    Raises:
        InputError: naming the field that can't be followed.
        TokenizerError: if the tokenizer fails on a prompt.
    """
    fields = read_object(body)
    adapter = model.read_adapter(fields)
    fields.text("user")
    fields.refuse("suffix", "")
    n = read_n(fields, model)
    fields.refuse("best_of", n)
    stream, include_usage = read_stream(fields)
    echo = fields.flag("echo")
    top_logprobs = fields.whole("logprobs", 0, _MOST_LOGPROBS)
    max_tokens = fields.whole("max_tokens", 0 if echo else 1, 2**31 - 1)
    request = replace(
        read_request(fields, model, adapter, top_logprobs=top_logprobs),
        prompt_logprobs=echo and top_logprobs is not None,
    )
    stops = read_stops(fields, model, request)
    given = _prompts(fields.required("prompt"), model, n)
    fields.finish()
    prompts = [_encoded(prompt, model) for prompt in given]
    if request.prompt_logprobs and n * sum(map(len, prompts)) > _MOST_SCORED:
        raise FieldError(
            "echo",
            f"The log-probabilities of {n * sum(map(len, prompts))} prompt tokens are asked for, where at most"
            f" {_MOST_SCORED} are told at once: split the request.",
        )
    return Asked(
        choices_of(request, prompts, n, 1 if max_tokens == 0 else max_tokens, model),
        n,
        stops,
        stream,
        include_usage,
        echoes=tuple(_text(prompt, model) for prompt in given) if echo else None,
        prompt_only=max_tokens == 0,
    )


def _prompts(value: object, model: ServedModel, n: int) -> list[Prompt]:
    """The prompts, given as a text, a list of token ids, or a list of these."""
    is_one = not isinstance(value, list) or (value and type(value[0]) is int)
    prompts: list[object] = [value] if is_one else cast(list[object], value)
    if not prompts:
        raise wrong_value("prompt", value, "a text, a list of token ids, or a list of these")
    if len(prompts) * n > model.most_choices:
        raise FieldError(
            "n",
            f"The request asks for {len(prompts) * n} texts, where {model.most_choices} are made at most: split it.",
        )
    return [_prompt(prompt, model) for prompt in prompts]


def _prompt(value: object, model: ServedModel) -> Prompt:
    return value if isinstance(value, str) else checked_ids("prompt", value, model)


def checked_ids(field: str, value: object, model: ServedModel) -> list[int]:
    """The token ids of a prompt in a body.

    Raises:
        FieldError: if they aren't a list of ids of the model's vocabulary.
    """
    if not isinstance(value, list):
        raise wrong_value(field, value, "a text or a list of token ids" if field == "prompt" else "a list of token ids")
    vocab = model.config.vocab_size
    strange = [token for token in value if type(token) is not int or not 0 <= token < vocab]
    if strange:
        raise wrong_value(field, strange[0], f"a token's id from 0 to {vocab - 1}")
    return value


def _encoded(prompt: Prompt, model: ServedModel) -> list[int]:
    return encode_prompt(model.tokenizer, prompt, model.config.max_seq_len) if isinstance(prompt, str) else prompt


def _text(prompt: Prompt, model: ServedModel) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt, skip_special_tokens=False)
