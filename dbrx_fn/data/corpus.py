"""Reads the documents to train on, and splits off held-out ones."""

import hashlib
import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dbrx_fn.data.data_files import find_files, holds_rows, read_rows, read_text
from dbrx_fn.errors import DbrxError, InputError
from dbrx_fn.files.json_file import shown, shown_path
from dbrx_fn.text.chat_format import CHATML, ChatFormat
from dbrx_fn.text.chat_turns import taught_chats
from dbrx_fn.text.conversation import SAID, mark, read_conversation
from dbrx_fn.text.literal_text import any_of, clipped
from dbrx_fn.text.valid_text import valid_text


@dataclass(frozen=True)
class Document:
    """One text to learn from.

    Attributes:
        source: its file and, in a file of rows, its row, for messages.
        spans: its parts in order, as (text, is_target). A part is either predicted or, like a prompt, only read. Each
            part is tokenized separately, so no token belongs to two parts.
        literal: ranges of characters, in order and across all parts, that must not become control tokens
            (`Tokenizer.encode`).
        is_chat: whether it is a conversation, rendered in the chat format.
    """

    source: str
    spans: tuple[tuple[str, bool], ...]
    literal: tuple[tuple[int, int], ...] = ()
    is_chat: bool = False

    @property
    def text(self) -> str:
        """All parts joined."""
        return "".join(text for text, _ in self.spans)


def read_documents(
    paths: Iterable[str | Path], chat_format: ChatFormat = CHATML, *, control_tokens: bool = False
) -> list[Document]:
    """Reads text files, files of rows, and folders of both.

    - A text file is one document: .txt, .text, .md, .markdown, .rst, .tex, or a name without an ending.
    - A row of a .jsonl, .ndjson or .json file is one document. It has `prompt` (only read) and `completion`
      (predicted); or `messages`, perhaps with `tools`, where each turn of the assistant is predicted together with its
      end (`dbrx_fn.text.chat_turns`); or `text`. Of several of these keys the first counts, in mlx-lm's order. If the
      template renders earlier turns differently later on, a conversation becomes several documents.
    - `"weight": 0` or `"train": false` leaves out a row, or keeps a message of the assistant from being predicted.
    - A folder stands for its files of these kinds (`dbrx_fn.data.data_files.find_files`).

    Documents of white space only are skipped. Line ends are kept, and a byte order mark is removed. Warnings name
    everything that isn't used: keys of rows and messages, files of other kinds, left-out rows.

    Args:
        paths: the files and folders.
        chat_format: the format of `messages`, such as `Tokenizer.chat_format`.
        control_tokens: whether control tokens that a text spells, such as `<|im_end|>`, become tokens. Otherwise they
            are learned as plain characters, with a warning.

    Raises:
        InputError: if a path is missing or can't be read, a file isn't UTF-8 or has another kind, a row is none of the
            above, or there is nothing to learn from.
        TokenizerError: if the checkpoint's chat template can't be rendered or learned from.
    """
    given = [Path(path) for path in paths]
    reader = _Reader(chat_format, control_tokens)
    read = itertools.chain.from_iterable(reader.read(file) for path in given for file in find_files(path))
    documents = [document for document in read if document.text.strip()]
    reader.warn()
    if not documents:
        names = ", ".join(map(shown_path, given)) or "An empty list of paths"
        raise InputError(f"{names} holds no text at all: name files that hold some.")
    return documents


def split(documents: Sequence[Document], share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Splits documents into those to train on and those to hold out.

    A hash of the seed and the text decides, where all white space counts as one space. So copies of a text are always
    on one side, and a document stays on its side when others are added. If one side would be empty, the document
    nearest to it changes sides, with its copies. If all documents are one text, its end is held out.

    Args:
        documents: at least one.
        share: the fraction of documents to hold out, from 0 to less than 1.
        seed: chooses the documents.

    Raises:
        InputError: if the share is out of range, or the only text is one conversation or completion, which can't be
            cut.
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
    """Removes training documents that are held out too. White space doesn't count.

    Returns:
        kept: the documents that aren't held out.
        removed: the number of removed documents.

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


class _Reader:
    """Makes documents from files, and notes what isn't used."""

    def __init__(self, chat_format: ChatFormat, control_tokens: bool) -> None:
        self._chat_format = chat_format
        self._control_tokens = control_tokens
        self._pattern = None if control_tokens else any_of(chat_format.control_tokens)
        # A template that shows the time shows the same time in all documents.
        self._now = datetime.now()
        self._unused: Counter[str] = Counter()
        self._spelled: list[str] = []
        self._kept_out = 0

    def read(self, path: Path) -> Iterator[Document]:
        """The documents of a file."""
        if not holds_rows(path):
            yield self._document(shown_path(path), ((read_text(path), True),))
            return
        for source, row in read_rows(path):
            try:
                yield from self._read_row(row, source, path)
            except DbrxError as error:
                raise type(error)(f"{source}: {error}") from None

    def warn(self) -> None:
        """Warns of everything that wasn't used."""
        if self._unused:
            names = ", ".join(f"{name} ({count})" for name, count in self._unused.most_common(8))
            warnings.warn(f"Not used of the data: {names}.", stacklevel=3)
        if self._kept_out:
            rows = "1 row is" if self._kept_out == 1 else f"{self._kept_out} rows are"
            warnings.warn(f"{rows} left out, since nothing in them is to be learned.", stacklevel=3)
        if self._spelled:
            others = f" and {len(self._spelled) - 1} others" if len(self._spelled) > 1 else ""
            warnings.warn(
                f"{self._spelled[0]}{others} spell control tokens, such as <|im_end|>, which are taken as plain text: "
                "where they are meant to be tokens, let control tokens in (--control-tokens).",
                stacklevel=3,
            )

    def _read_row(self, row: dict[str, Any], source: str, path: Path) -> Iterator[Document]:
        taught = _is_taught(row)
        used = {"weight", "train"}
        documents: list[Document]
        if "prompt" in row and "completion" in row:
            used |= {"prompt", "completion"}
            documents = [self._document(source, ((_text(row, "prompt"), False), (_text(row, "completion"), True)))]
        elif "messages" in row:
            used |= {"messages", "tools"}
            documents = self._read_chat(row["messages"], row.get("tools"), source)
        elif "text" in row:
            used |= {"text"}
            documents = [self._document(source, ((_text(row, "text"), True),))]
        else:
            found = "has no keys" if not row else "has only " + shown(list(row)).strip("[]")
            raise InputError(f"the object {found}, where 'text', 'prompt' and 'completion', or 'messages' is expected.")
        self._unused.update(f"{shown_path(path)}: {shown(key)}" for key in row.keys() - used if row[key] is not None)
        self._kept_out += not (taught and documents)
        if taught:
            yield from documents

    def _document(self, source: str, spans: tuple[tuple[str, bool], ...]) -> Document:
        """A document of raw text."""
        valid = tuple((valid_text(text), target) for text, target in spans)
        document = Document(source, valid)
        if self._control_tokens:
            return document
        if self._pattern is not None and self._pattern.search(document.text):
            self._spelled.append(source)
        return Document(source, valid, ((0, len(document.text)),))

    def _read_chat(self, messages: object, tools: object, source: str) -> list[Document]:
        if not isinstance(messages, list):
            raise InputError(f"'messages' is {shown(messages)} where a list is expected.")
        if tools is not None and not isinstance(tools, list):
            raise InputError(f"'tools' is {shown(tools)} where a list is expected.")
        only_read = [number for number, message in enumerate(messages) if not _is_taught(message, number + 1)]
        bare = [_without(message, ("weight", "train")) for message in messages]
        conversation = read_conversation(bare, self._chat_format, tools=tools, now=self._now)
        conversation.check_used()
        for key, number in conversation.unread_keys().items():
            if key in SAID:
                raise InputError(
                    f"Message {number + 1}: {self._chat_format.source} has no place for '{key}'; take it out, or take "
                    "a template that has."
                )
            self._unused[f"{shown(key)} of messages"] += sum(key in message for message in conversation.messages)
        chats = taught_chats(mark(conversation, control_tokens=self._control_tokens), only_read)
        documents = []
        for taught in chats:
            text, place, spans = taught.chat.text, 0, []
            for start, end in taught.turns:
                spans += [(text[place:start], False), (text[start:end], True)]
                place = end
            # The last part is only read, even if it is empty, since generation ends before it.
            spans = [span for span in spans if span[0]] + [(text[place:], False)]
            documents.append(Document(source, tuple(spans), taught.chat.literal, is_chat=True))
            if taught.chat.literal:
                self._spelled.append(source)
        return documents


def _is_taught(row: object, message: int | None = None) -> bool:
    """Whether a row, or the message with this number, is to be predicted."""
    where = "" if message is None else f"Message {message}: "
    if not isinstance(row, dict):
        return True
    for key, kept, left_out in (("weight", 1, 0), ("train", True, False)):
        value = row.get(key)
        if value is None:
            continue
        if value not in (kept, left_out):
            raise InputError(f"{where}'{key}' is {shown(value)} where {kept} or {left_out} is expected.")
        if not value:
            return False
        if message is not None and row.get("role") != "assistant":
            raise InputError(
                f"{where}'{key}' is {shown(value)}, but only what the assistant says is learned: take it out."
            )
    return True


def _without(message: Any, keys: tuple[str, ...]) -> Any:
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if key not in keys}


def _text(row: dict[str, Any], key: str) -> str:
    text = row[key]
    if not isinstance(text, str):
        raise InputError(f"'{key}' is {shown(text)} where a text is expected.")
    return text


def _content(document: Document) -> bytes:
    return hashlib.sha256(" ".join(document.text.split()).encode()).digest()


def _place(document: Document, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} ".encode() + _content(document)).digest()[:8])


def _cut(document: Document, share: float) -> tuple[Document, Document]:
    """The document without its end, and its end, cut near the share at a paragraph, else a line, else a word."""
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
    return (
        Document(document.source, ((text[:place], target),), clipped(document.literal, 0, place)),
        Document(document.source, ((text[place:], target),), clipped(document.literal, place, len(text))),
    )


def _listed(documents: Sequence[Document]) -> str:
    sources = [document.source for document in documents[:3]]
    return ", ".join(sources) + (" and so on" if len(documents) > 3 else "")
