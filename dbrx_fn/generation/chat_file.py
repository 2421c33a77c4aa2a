"""Saves and loads a conversation: JSON with `messages`, as chat APIs and training data have them.

Its keys and values may lie beside it (`save_cache`), under the same name with `.cache`. The JSON's `cache` then has the
cached tokens, the cache's size and SHA-256, and the fingerprint of the weights. A cache that doesn't fit isn't used.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbrx_fn.errors import DbrxError, InputError
from dbrx_fn.files.atomic import write_file
from dbrx_fn.files.checksums import disagreement, file_sum
from dbrx_fn.files.json_file import parse_json, read_bounded, shown, shown_path
from dbrx_fn.generation.cache_file import load_cache, save_cache
from dbrx_fn.generation.chat_session import ChatSession, Held
from dbrx_fn.generation.stream import token_ids
from dbrx_fn.text.conversation import read_conversation


def save_chat(file: Path, session: ChatSession, weights: str | None = None) -> None:
    """Saves a conversation. It replaces only a saved conversation of that name, and no other file.

    Args:
        file: any name in an existing folder.
        session: the conversation.
        weights: the model's fingerprint, to save the cache too. `None` saves no cache.

    Raises:
        InputError: if a file can't be written, or another one is in the way. What was there stays.
    """
    replaced = _read(file) if file.exists() else {}
    system = [] if session.system is None else [{"role": "system", "content": session.system}]
    content: dict[str, Any] = {"messages": [*system, *session.messages]}
    if weights is not None and session.held is not None:
        beside = cache_beside(file)
        if beside.exists() and "cache" not in replaced:
            raise InputError(f"{shown_path(beside)} exists already: move it, or save under another name.")
        save_cache(beside, session.held.cache)
        content["cache"] = {
            **file_sum(beside),
            "weights": weights,
            "tokens": session.held.tokens,
        }
    write_file(file, json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def load_chat(file: Path, session: ChatSession, weights: Callable[[], str]) -> str | None:
    """Replaces the session's conversation by a saved one.

    Args:
        file: from `save_chat`, or with `messages` of any chat.
        session: the conversation.
        weights: returns the model's fingerprint; called only if it is needed.

    Returns:
        Why the saved cache isn't used, as a clause; `None` if it is used, or if there is none.

    Raises:
        InputError: if the file can't be read, or isn't a conversation. The session stays as it was.
        TokenizerError: if the model's chat template can't be rendered.
    """
    content = _read(file)
    messages = content["messages"]
    system = None
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        system, messages = messages[0].get("content"), messages[1:]
        if not isinstance(system, str):
            raise InputError(f"{shown_path(file)}: the system prompt is {shown(system)} where a text is expected.")
    if messages:
        try:
            read_conversation(messages, session.tokenizer.chat_format, system=system)
        except InputError as error:
            raise InputError(f"{shown_path(file)} isn't a conversation for this model: {error}") from None
    held, unused = None, None
    if "cache" in content:
        try:
            held = _cache(cache_beside(file), content["cache"], session, weights)
        except (DbrxError, OSError, ValueError) as error:
            unused = getattr(error, "strerror", None) or str(error).rstrip(".")
    session.system, session.messages = system, tuple(messages)
    session.held = held or session.held
    return unused


def cache_beside(file: Path) -> Path:
    """The path of a conversation's cache."""
    return file.with_name(f"{file.name}.cache")


def _read(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_bounded(file), unique=True)
        if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
            raise ValueError("it isn't an object with a list of messages")
        if not content.keys() <= {"messages", "cache"}:
            raise ValueError(f"it has {shown(next(iter(content.keys() - {'messages', 'cache'})))} beside its messages")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{shown_path(file)} is not a saved conversation ({reason}): name another file.") from None
    return content


def _cache(file: Path, note: Any, session: ChatSession, weights: Callable[[], str]) -> Held:
    if not isinstance(note, dict) or not note.keys() >= {"weights", "tokens", "bytes", "sha256"}:
        raise ValueError("the note about it is incomplete")
    if note["weights"] != weights():
        raise ValueError("it was made with other weights")
    different = disagreement(file_sum(file), {name: note[name] for name in ("bytes", "sha256")})
    if different is not None:
        raise ValueError(different)
    tokens = tuple(token_ids("cache.tokens", note["tokens"], session.config))
    cache = load_cache(file, session.config)
    if cache.lengths != (len(tokens),):
        raise ValueError(f"it holds {cache.lengths} tokens where {len(tokens)} are noted")
    return Held(tokens, cache)
