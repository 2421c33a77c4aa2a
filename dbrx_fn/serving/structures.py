"""The form that a request wants its answer to have: OpenAI's `response_format`, and vLLM's `structured_outputs`."""

from typing import Any

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import parse_json
from dbrx_fn.generation.structured import Structure, TokenTrie, token_trie
from dbrx_fn.serving.fields import FieldError, Fields, wrong_value
from dbrx_fn.text.tokenizer import Tokenizer

_FORMS = ("json", "regex", "choice", "json_object")
"""Of `structured_outputs` (https://docs.vllm.ai/en/latest/features/structured_outputs.html)."""


def trie_if_any(tokenizer: Tokenizer, vocab_size: int) -> TokenTrie | None:
    """What structured output needs. Without llguidance or a stop token it is `None`, and such requests are refused."""
    try:
        return token_trie(tokenizer, vocab_size)
    except InputError:
        return None


def read_structure(fields: Fields) -> Structure | None:
    """The answer's structure; `None` if it may be any text.

    Raises:
        FieldError: if a form is unknown, isn't valid, or can't be enforced. The message names the keyword.
    """
    wanted = {name: fields.inner(name) for name in ("response_format", "structured_outputs")}
    given = {name: form for name, form in wanted.items() if form is not None}
    if len(given) == 2:
        raise FieldError("structured_outputs", "response_format and structured_outputs are both given: give one.")
    for name, form in given.items():
        try:
            return _response_format(form) if name == "response_format" else _structured_outputs(form)
        except FieldError:
            raise
        except InputError as error:
            raise FieldError(name, str(error)) from None
    return None


def _response_format(form: Fields) -> Structure | None:
    kind = form.required("type")
    structure = None
    if kind == "json_object":
        structure = Structure.json_object()
    elif kind == "json_schema":
        inner = form.inner("json_schema")
        if inner is None:
            raise FieldError("response_format.json_schema", "response_format.json_schema is missing: give it.")
        # A schema is always enforced, so `strict` makes no difference.
        for name in ("name", "description"):
            inner.text(name)
        inner.flag("strict")
        structure = Structure.json_schema(inner.required("schema"))
        inner.finish()
    elif kind != "text":
        raise wrong_value("response_format.type", kind, "'text', 'json_object' or 'json_schema'")
    form.finish()
    return structure


def _structured_outputs(form: Fields) -> Structure:
    given = {name: value for name in _FORMS if (value := form.take(name)) is not None}
    form.finish()
    if len(given) != 1:
        raise FieldError("structured_outputs", f"structured_outputs takes one of {', '.join(_FORMS)}: give just one.")
    ((name, value),) = given.items()
    if name == "json":
        return Structure.json_schema(_schema(value))
    if name == "regex":
        return Structure.regex(value)
    if name == "choice":
        if not isinstance(value, list):
            raise wrong_value("structured_outputs.choice", value, "a list of texts")
        return Structure.choice(value)
    if value is not True:
        raise wrong_value("structured_outputs.json_object", value, "true")
    return Structure.json_object()


def _schema(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value.encode())
    except ValueError as error:
        raise FieldError("structured_outputs.json", f"structured_outputs.json is no JSON schema: {error}.") from None
