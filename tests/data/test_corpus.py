"""`read_documents`, `split`, `without_held_out`."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbrx_fn.data.corpus import Document, read_documents, split, without_held_out
from dbrx_fn.errors import DbrxError, InputError
from dbrx_fn.text.chat import CHATML, ChatFormat, render_chat

SYSTEM = {"role": "system", "content": " Be brief. "}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": " Hello.\n"}
BARE = ChatFormat(default_system=False)
CONTENTS = st.text(st.sampled_from("ab \n\ue000\ue0010é<|im_start|>assistant"), max_size=12)


def lines(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def refused(act: Callable[[], object], *words: str, kind: type[DbrxError] = InputError) -> None:
    with pytest.raises(kind) as caught:
        act()
    text = str(caught.value)
    for word in words:
        assert word in text
    assert text.endswith(".")
    assert "\n" not in text


# Reading


def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes("\ufeffé\r\nx\n".encode())
    (tmp_path / "b").write_bytes(b"y")
    documents = read_documents([str(tmp_path / "b"), tmp_path / "a.md"])
    assert documents == [
        Document(str(tmp_path / "b"), (("y", True),), ((0, 1),)),
        Document(str(tmp_path / "a.md"), (("é\r\nx\n", True),), ((0, 5),)),
    ]


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    for name in ("c.txt", "a.md", "b/z.TEXT", "b/a.txt", "b/skip.py", ".hidden.txt", ".git/x.txt", "empty.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if name == "empty.txt" else name)
    lines(tmp_path / "b.jsonl", {"text": "first"}, {"text": ""}, {"text": "third"})
    with pytest.warns(UserWarning, match=r": files of other kinds are passed over \(1 of \.py\)\.$"):
        documents = read_documents([tmp_path])
    assert [document.text for document in documents] == ["a.md", "b/a.txt", "b/z.TEXT", "first", "third", "c.txt"]
    assert documents[4].source == f"{tmp_path / 'b.jsonl'}, line 3"


def test_lines_of_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    both = {"prompt": "p", "completion": "c", "text": "t"}
    path.write_text(f'\ufeff{{"text": "a\u2028b", "id": 3}}\r\n\n{json.dumps(both)}\n  \n{{"text": "\\ud800."}}')
    with pytest.warns(UserWarning, match=r"Not used of the data: .*x\.jsonl: 'id' \(1\), .*'text' \(1\)\.$"):
        documents = read_documents([path])
    assert [(document.source.removeprefix(f"{path}, "), document.spans) for document in documents] == [
        ("line 1", (("a\u2028b", True),)),
        ("line 3", (("p", False), ("c", True))),
        ("line 5", (("\ufffd.", True),)),
    ]


def test_conversations_teach_what_the_assistant_says(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER]})
    (document,) = read_documents([path], BARE)
    assert document.spans == (
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        (" Hello.\n<|im_end|>", True),
        ("\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        (" Hello.\n<|im_end|>", True),
        ("", False),
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "isn't JSON"),
        (b"[" * 10**5, "isn't JSON"),
        (b"3", "3 is found where a JSON object is expected"),
        (b"{}", "the object has no keys, where 'text'"),
        (b'{"prompt": "a", "b": 1}', "the object has only 'prompt', 'b', where 'text'"),
        (b'{"text": 5}', "'text' is 5 where a text"),
        (b'{"prompt": "a", "completion": null}', "'completion' is None where a text"),
        (b'{"messages": "a"}', "'messages' is 'a' where a list"),
        (b'{"messages": []}', "conversation is empty"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        (
            b'{"messages": [{"role": "assistant", "content": "a"}]}',
            "no message of the assistant behind one of the user",
        ),
        (b'{"text": "a", "text": "b"}', "'text' is there twice"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', "Message 1 has the unknown role 'tool'"),
        (b'{"messages": [{"role": "assistant"}]}', "Message 1: 'content' is missing"),
    ],
)
def test_wrong_lines_are_named(line: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    refused(lambda: read_documents([path]), f"{path}, line 3: ", words)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    refused(lambda: read_documents([]), "holds no text")
    refused(lambda: read_documents([tmp_path / "no.txt"]), f"{tmp_path / 'no.txt'} doesn't exist")
    refused(lambda: read_documents(["a\0b"]), "can't be read")
    refused(lambda: read_documents([tmp_path / ("x" * 300)]), "can't be read (File name too long)")
    refused(lambda: read_documents([tmp_path]), f"{tmp_path} holds no .txt")
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: read_documents([tmp_path / "loop"]), "can't be read (Too many levels of symbolic links)")
    (tmp_path / "loop").unlink()
    (tmp_path / "a.txt").write_bytes("é".encode() + b"x\xff")
    refused(lambda: read_documents([tmp_path]), f"{tmp_path / 'a.txt'} isn't UTF-8 at byte 3")
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b" \n")
    refused(lambda: read_documents([tmp_path]), f"{tmp_path} holds no text at all")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir(mode=0)
    refused(lambda: read_documents([tmp_path]), f"{tmp_path / 'sub'} can't be read (Permission denied)")


# Holding out


def texts(*contents: str) -> list[Document]:
    return [Document(f"{number}.txt", ((content, True),)) for number, content in enumerate(contents)]


def normal(document: Document) -> str:
    return " ".join(document.text.split())


@given(
    contents=st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=4), min_size=1, max_size=12),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_no_document_is_on_both_sides(contents: list[str], share: float, seed: int) -> None:
    documents = texts(*contents)
    if len({normal(document) for document in documents}) == 1:
        return
    train, held_out = split(documents, share, seed)
    assert train
    assert held_out
    assert not {normal(document) for document in train} & {normal(document) for document in held_out}
    assert sorted(train + held_out, key=documents.index) == documents
    assert split(documents, share, seed) == (train, held_out)
    assert without_held_out(train, held_out) == (train, 0)
    assert without_held_out([*held_out, *train], held_out) == (train, len(held_out))


def test_share_and_seed_decide() -> None:
    documents = texts(*map(str, range(2000)))
    held_out = split(documents, 0.1, 0)[1]
    assert 150 < len(held_out) < 250
    assert set(held_out) < set(split(documents, 0.2, 0)[1])
    assert len(set(held_out) & set(split(documents, 0.1, 1)[1])) < 60
    # Others that join don't change its side.
    assert set(split(documents[:1000], 0.1, 0)[1]) == set(held_out) & set(documents[:1000])
    assert split(documents, 0, 0) == (documents, [])


@given(text=st.text(st.sampled_from("ab \n"), max_size=60), share=st.floats(0.01, 0.99))
def test_one_text_is_cut(text: str, share: float) -> None:
    text = f"a{text}b"
    (head,), (tail,) = split(texts(text), share, 0)
    assert head.text + tail.text == text
    assert head.text.strip()
    assert tail.text.strip()
    assert (head.source, tail.source) == ("0.txt", "0.txt")


def test_one_text_is_cut_at_a_boundary_near_the_share() -> None:
    paragraphs = "".join(f"{number} of\nthem.\n\n" for number in range(1000))
    (head,), (tail,) = split(texts(paragraphs), 0.1, 0)
    assert head.text.endswith("\n\n")
    assert 0.09 < len(tail.text) / len(paragraphs) < 0.11
    (head,), (tail,) = split(texts(paragraphs.replace("\n\n", "\n"), paragraphs.replace("\n\n", "\n")), 0.1, 0)
    assert head.text.endswith("\n")
    assert 0.09 < len(tail.text) / len(head.text + tail.text) < 0.11
    assert split(texts("word " * 20), 0.1, 0)[1][0].text == "word word "


def test_what_cannot_be_split() -> None:
    for share in (-0.1, 1.0, float("nan")):
        refused(lambda: split(texts("a", "b"), share, 0), "share to hold out is")  # noqa: B023
    refused(lambda: split(texts(" a \n"), 0.5, 0), "0.txt is the only text and can't be cut")
    chat = Document("x.jsonl, line 1", (("prompt", False), ("completion", True)))
    refused(lambda: split([chat, chat], 0.5, 0), "x.jsonl, line 1 is the only text and can't be cut")
    refused(lambda: without_held_out(texts("a b", " a\nb"), texts("a b")), "0.txt, 1.txt holds nothing")


def test_default_format_is_dbrxs(tmp_path: Path) -> None:
    messages: list[dict[str, Any]] = [USER, ASSISTANT]
    (document,) = read_documents([lines(tmp_path / "x.jsonl", {"messages": messages})])
    assert document.text == render_chat(messages, CHATML, add_generation_prompt=False)
    assert document.text.startswith("<|im_start|>system\nYou are DBRX")
