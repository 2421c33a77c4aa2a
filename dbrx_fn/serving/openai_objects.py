"""OpenAI's objects: answers, their parts, lists of models, errors.

https://platform.openai.com/docs/api-reference
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dbrx_fn.errors import BusyError, DbrxError, EngineError, GenerationError
from dbrx_fn.serving.asked import Asked
from dbrx_fn.serving.choice import Delta, Entry
from dbrx_fn.serving.fields import FieldError
from dbrx_fn.serving.served_model import ServedModel

Object = dict[str, Any]

_LEAST_LOGPROB = -9999.0
"""OpenAI's log-probability of impossible tokens. JSON has no infinity."""


@dataclass(frozen=True)
class Usage:
    """Token counts of a request: of its prompts, of their cached part, and of its answers."""

    prompt: int
    cached: int
    made: int

    def as_object(self) -> Object:
        """The usage in OpenAI's form."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.made,
            "total_tokens": self.prompt + self.made,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True)
class Form:
    """One of the two forms of answers.

    `id`: the answer's id.
    `created`: in seconds since 1970.
    `adapter`: the adapter that answers; `None` for the model alone.
    """

    kind: Literal["completion", "chat"]
    id: str
    created: int
    model: ServedModel
    adapter: str | None = None

    def answer(self, choices: Iterable[Sequence[Delta]], usage: Usage, asked: Asked) -> Object:
        """A whole answer, from all parts of each choice."""
        whole = []
        for index, deltas in enumerate(choices):
            joined = Delta(
                "".join(delta.text for delta in deltas),
                tuple(entry for delta in deltas for entry in delta.entries),
                tuple(experts for delta in deltas for experts in delta.experts),
                deltas[-1].finish_reason,
            )
            content = (
                {"text": joined.text}
                if self.kind == "completion"
                else {"message": {"role": "assistant", "content": joined.text, "refusal": None}}
            )
            whole.append({"index": index, **content, **self._rest(joined, asked)})
        return {**self._head(whole=True), "choices": whole, "usage": usage.as_object()}

    def chunk(self, index: int, delta: Delta, asked: Asked, *, first: bool) -> Object:
        """A part of a choice in a stream. A choice's first part differs."""
        content: Object = {"text": delta.text}
        if self.kind == "chat":
            said = {"content": delta.text} if delta.text or first or not delta.finish_reason else {}
            content = {"delta": {**({"role": "assistant"} if first else {}), **said}}
        choice = {"index": index, **content, **self._rest(delta, asked)}
        usage = {"usage": None} if asked.include_usage else {}
        return {**self._head(whole=False), "choices": [choice], **usage}

    def last_chunk(self, usage: Usage) -> Object:
        """The last part of a stream, with the usage."""
        return {**self._head(whole=False), "choices": [], "usage": usage.as_object()}

    def _head(self, *, whole: bool) -> Object:
        chat = "chat.completion" if whole else "chat.completion.chunk"
        return {
            "id": self.id,
            "object": "text_completion" if self.kind == "completion" else chat,
            "created": self.created,
            "model": self.adapter or self.model.name,
        }

    def _rest(self, delta: Delta, asked: Asked) -> Object:
        told: Object | None = None
        if asked.wants_logprobs:
            of_entries = _older_logprobs if self.kind == "completion" else _chat_logprobs
            told = of_entries(delta.entries, self.model)
        experts = {"experts": delta.experts} if asked.wants_experts else {}
        return {"logprobs": told, **experts, "finish_reason": delta.finish_reason}


def models(model: ServedModel) -> Object:
    """The list of the model and its adapters."""
    return {"object": "list", "data": [one_model(model, name) for name in model.names]}


def one_model(model: ServedModel, name: str) -> Object:
    """The model, or the adapter of this name.

    `max_model_len` (the longest text) and `parent` (the model that an adapter stands beside) are vLLM's names,
    `moe_num_experts` is config.json's.
    """
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "dbrx_fn",
        "parent": None if name == model.name else model.name,
        "max_model_len": model.capacity,
        "moe_num_experts": model.config.ffn.moe_num_experts,
    }


def json_bytes(content: Object) -> bytes:
    """An object as it is sent: in ASCII, since clients can put lone surrogates into texts."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def error_object(message: str, kind: str, field: str | None = None, code: str | None = None) -> Object:
    """An error as clients expect it."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


class HttpError(DbrxError):
    """An error with its own HTTP status.

    `status`: the HTTP status.
    `code`: a word for programs.
    `headers`: to send along.
    """

    def __init__(self, status: int, sentence: str, code: str | None = None, headers: Mapping[str, str] = {}) -> None:
        super().__init__(sentence)
        self.status, self.code, self.headers = status, code, dict(headers)


def status_of(error: DbrxError) -> int:
    """The HTTP status for an error."""
    match error:
        case HttpError():
            return error.status
        case BusyError():
            return 429
        case EngineError():
            return 503
        case GenerationError():
            return 500
        case FieldError() if error.code == "model_not_found":
            return 404
    return 400


def told(error: DbrxError) -> Object:
    """An error's object."""
    status = status_of(error)
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    field = error.field if isinstance(error, FieldError) else None
    code = error.code if isinstance(error, FieldError | HttpError) else None
    return error_object(str(error), kind, field, code)


def _older_logprobs(entries: Sequence[Entry], model: ServedModel) -> Object:
    """`logprobs` of a completion. `top_logprobs` always includes the chosen token."""
    tops: list[Mapping[str, float] | None] = []
    for entry in entries:
        if entry.logprobs is None:
            tops.append(None)
        else:
            pairs = [*entry.logprobs.top, (entry.token, entry.logprobs.chosen)]
            tops.append({token_text(model.piece(token)): _finite(logprob) for token, logprob in pairs})
    return {
        "tokens": [token_text(model.piece(entry.token)) for entry in entries],
        "token_logprobs": [None if e.logprobs is None else _finite(e.logprobs.chosen) for e in entries],
        "top_logprobs": tops,
        "text_offset": [entry.offset for entry in entries],
    }


def _chat_logprobs(entries: Sequence[Entry], model: ServedModel) -> Object:
    def one(token: int, logprob: float) -> Object:
        piece = model.piece(token)
        return {"token": token_text(piece), "logprob": _finite(logprob), "bytes": list(piece)}

    content = [
        {
            **one(entry.token, entry.logprobs.chosen),
            "top_logprobs": [one(token, logprob) for token, logprob in entry.logprobs.top],
        }
        for entry in entries
        if entry.logprobs is not None
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST_LOGPROB else _LEAST_LOGPROB


def token_text(piece: bytes) -> str:
    """A token's text. A part of a character is written as OpenAI does, so that different tokens look different."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
