"""Reads the documents that a model is trained on, and keeps some of them out of training."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbrx_fn.chat import CHATML, ChatFormat, render_chat
from dbrx_fn.errors import DbrxError, InputError

_TEXT_FILES = (".txt", ".md", ".text")
_LINE_FILES = ".jsonl"
_TURN_END = "<|im_end|>"


@dataclass(frozen=True)
class Document:
    """One text to learn from.

    Attributes:
        source: the file that it comes from and, in a JSONL file, the line: what a message names.
        spans: its parts in order, as (text, is_target): whether the part is to be predicted or only to be read, as a
            prompt is. Each part is made into tokens by itself, so no token belongs to two of them.
    """

    source: str
    spans: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """All parts together."""
        return "".join(text for text, _ in self.spans)


def read_documents(paths: Iterable[str | Path], chat_format: ChatFormat = CHATML) -> list[Document]:
    """Reads text files, JSONL files, and folders of both.

    - A text file, of any ending but .jsonl, is one document.
    - A line of a JSONL file is one: its `prompt` (only read) and `completion` (to be predicted) as they stand, or its
      `messages`, of which each turn of the assistant is to be predicted with the token that ends it, or its `text`.
      A line with several of these keys counts as the first of them, in mlx-lm's order; other keys are left alone.
    - A folder stands for its .txt, .md, .text and .jsonl files and those of its folders, in sorted order; hidden ones
      are passed over.

    Documents of nothing but white space are passed over too. Line ends stay as they are; a byte order mark goes.

    Args:
        paths: the files and folders.
        chat_format: how `messages` are written down, such as `Tokenizer.chat_format`.

    Raises:
        InputError: a path that is missing or can't be read, a file that isn't UTF-8, a line that is none of the
            above, or nothing to learn from in all of it.
        TokenizerError: the checkpoint's chat template can't be rendered.
    """
    given = [Path(path) for path in paths]
    read = itertools.chain.from_iterable(_read_file(file, chat_format) for path in given for file in _files(path))
    documents = [document for document in read if document.text.strip()]
    if not documents:
        names = ", ".join(map(str, given)) or "An empty list of paths"
        raise InputError(f"{names} holds no text at all: name files that hold some.")
    return documents


def split(documents: Sequence[Document], share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Splits documents into those to train on and those held out.

    The side is decided by a hash of the seed and the text, in which all white space counts as one space, so copies of
    a text are always on one side, and a document stays on its side when others join it. Where that leaves a side
    empty, the document nearest to it changes sides, with its copies. Where all are one text, its end is held out.

    Args:
        documents: at least one.
        share: how much to hold out, from 0 to less than 1; of the documents, not of their text.
        seed: chooses which.

    Raises:
        InputError: if the share can't be, or the only text is one conversation or completion, which can't be cut.
    """
    if not 0 <= share < 1:
        raise InputError(f"The share to hold out is {share} where a number from 0 to less than 1 is expected.")
    if share == 0:
        return list(documents), []
    places = [_place(document, seed) for document in documents]
    lowest, highest = min(places), max(places)
    if lowest == highest:
        head, tail = _cut(documents[0], share)
        return [head], [tail]
    # The lowest is always held out, and the highest never.
    limit = max(lowest, min(int(share * 2**64), highest - 1))
    train = [document for document, place in zip(documents, places, strict=True) if place > limit]
    held_out = [document for document, place in zip(documents, places, strict=True) if place <= limit]
    return train, held_out


def without_held_out(train: Sequence[Document], held_out: Sequence[Document]) -> tuple[list[Document], int]:
    """Leaves out what is held out too, up to white space.

    Returns:
        kept: the documents that aren't held out.
        removed: how many were left out.

    Raises:
        InputError: if nothing is kept.
    """
    known = {_content(document) for document in held_out}
    kept = [document for document in train if _content(document) not in known]
    if not kept:
        raise InputError(
            f"{_listed(train)} holds nothing that isn't held out too: train on other files, or hold out fewer."
        )
    return kept, len(train) - len(kept)


def text_pieces(text: str, size: int = 2**16) -> Iterator[str]:
    """Cuts a text into pieces of about `size` characters, whose tokens together are those of the whole.

    It is cut only after a single line feed between characters that aren't white space. There both cl100k's and GPT-2's
    patterns end a word, and no special token goes across. The pieces keep the tokenizer's memory small: the tokenizers
    library took 2.9 GiB for 20 MB of text at once, and some MiB for pieces of this size.
    """
    start = 0
    while start < len(text):
        end = text.find("\n", start + size - 1) + 1
        while end and (text[end - 2 : end - 1].isspace() or text[end : end + 1].isspace()):
            end = text.find("\n", end) + 1
        end = end or len(text)
        yield text[start:end]
        start = end


def _files(path: Path) -> list[Path]:
    # Not Path.is_dir, which raises where a name is too long.
    if not os.path.isdir(path):
        return [path]

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} can't be read ({error.strerror}): check the folder's permissions.")

    found: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in (*_TEXT_FILES, _LINE_FILES)
        ]
    if not found:
        raise InputError(f"{path} holds no {', '.join(_TEXT_FILES)} or {_LINE_FILES} file: name another folder.")
    return sorted(found)


def _read_file(path: Path, chat_format: ChatFormat) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} isn't UTF-8 at byte {error.start} ({error.reason}): convert it first.") from None
    except FileNotFoundError:
        raise InputError(f"{path} doesn't exist: name a text file, a JSONL file or a folder of them.") from None
    # A name with a zero byte is a ValueError.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise InputError(f"{path} can't be read ({reason}): check the name and the file's permissions.") from None
    if path.suffix.lower() != _LINE_FILES:
        yield Document(str(path), ((text, True),))
        return
    # Python's own lines also end at characters that JSON allows inside of a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _read_line(line, f"{path}, line {number}", chat_format)


def _read_line(line: str, source: str, chat_format: ChatFormat) -> Document:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: this isn't JSON ({error}): each line must be one JSON object.") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: {_shown(value)} is found where a JSON object is expected.")
    if "prompt" in value and "completion" in value:
        spans = [(_text(value, "prompt", source), False), (_text(value, "completion", source), True)]
    elif "messages" in value:
        spans = _chat_spans(value["messages"], source, chat_format)
    elif "text" in value:
        spans = [(_text(value, "text", source), True)]
    else:
        found = "has no keys" if not value else "has only " + _short(", ".join(f"'{key}'" for key in value))
        raise InputError(
            f"{source}: the object {found}, where 'text', 'prompt' and 'completion', or 'messages' is expected."
        )
    return Document(source, tuple((_valid(text), target) for text, target in spans))


def _text(value: Mapping[str, Any], key: str, source: str) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise InputError(f"{source}: '{key}' is {_shown(text)} where a text is expected.")
    return text


def _chat_spans(messages: object, source: str, chat_format: ChatFormat) -> list[tuple[str, bool]]:
    """The rendered conversation, cut at both ends of what the assistant says, its turn's end included."""
    if not isinstance(messages, list):
        raise InputError(f"{source}: 'messages' is {_shown(messages)} where a list is expected.")
    try:
        rendered = render_chat(messages, chat_format, add_generation_prompt=False)
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        if not said:
            raise InputError("The conversation has no message of the assistant, which is what is learned; add one.")
        between = _around(messages, rendered, chat_format)
        # Templates may strip white space.
        for contents in (said, [content.strip() for content in said]):
            if _woven(between, contents) == rendered:
                break
        else:
            raise InputError(
                "The checkpoint's chat template changes what the assistant says, so what is to be learned can't be "
                "found in its text; give 'prompt' and 'completion' instead."
            )
    except DbrxError as error:
        raise type(error)(f"{source}: {error}") from None

    spans = [(between[0], False)]
    for content, after in zip(contents, between[1:], strict=True):
        ends = (_TURN_END, chat_format.special_tokens.get("eos_token", _TURN_END))
        end = next((end for end in ends if after.startswith(end)), "")
        spans += [(content + end, True), (after.removeprefix(end), False)]
    return [(text, target) for text, target in spans if text]


def _around(messages: list[dict[str, str]], rendered: str, chat_format: ChatFormat) -> list[str]:
    """The parts of the rendered conversation before, between and after the assistant's contents.

    A mark that occurs nowhere else is rendered in their place, which shows where any template puts them.
    """
    marks = (f"\ue000{number}\ue001" for number in itertools.count())
    mark = next(mark for mark in marks if mark not in rendered)
    marked = [message | {"content": mark} if message["role"] == "assistant" else message for message in messages]
    return render_chat(marked, chat_format, add_generation_prompt=False).split(mark)


def _woven(between: list[str], contents: list[str]) -> str | None:
    if len(between) != len(contents) + 1:
        return None
    return between[0] + "".join(itertools.chain(*zip(contents, between[1:], strict=True)))


def _content(document: Document) -> bytes:
    return hashlib.sha256(" ".join(document.text.split()).encode()).digest()


def _place(document: Document, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} ".encode() + _content(document)).digest()[:8])


def _cut(document: Document, share: float) -> tuple[Document, Document]:
    """The document without its end, and its end: cut at a paragraph, else a line, else a word near to the share."""
    text = document.text
    first, last = len(text) - len(text.lstrip()), len(text.rstrip()) - 1
    if len(document.spans) > 1 or last <= first:
        raise InputError(
            f"{document.source} is the only text and can't be cut in two, one to train on and one to hold out: give "
            "more data, or hold out nothing."
        )
    wanted = min(max(round(len(text) * (1 - share)), first + 1), last)
    reach = int(len(text) * min(share, 1 - share) / 2)
    low, high = max(wanted - reach, first + 1), min(wanted + reach, last)
    place = wanted
    for boundary in ("\n\n", "\n", " "):
        before = text.rfind(boundary, low - len(boundary), wanted) if low >= len(boundary) else -1
        after = text.find(boundary, wanted - len(boundary), high)
        places = [found + len(boundary) for found in (before, after) if found >= 0]
        places = [found for found in places if low <= found <= high]
        if places:
            place = min(places, key=lambda found: abs(found - wanted))
            break
    target = document.spans[0][1]
    head, tail = text[:place], text[place:]
    return Document(document.source, ((head, target),)), Document(document.source, ((tail, target),))


def _valid(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON can spell but UTF-8 can't."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _listed(documents: Sequence[Document]) -> str:
    sources = [document.source for document in documents[:3]]
    return ", ".join(sources) + (" and so on" if len(documents) > 3 else "")


def _shown(value: object) -> str:
    return _short(json.dumps(value, ensure_ascii=False))


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
