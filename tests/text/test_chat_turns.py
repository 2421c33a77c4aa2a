"""What of a conversation is learned, in 32 families' templates: the assistant's turns, whole, with what ends them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_fn.data.corpus import Document, read_documents
from dbrx_fn.errors import DbrxError, InputError, TokenizerError
from dbrx_fn.text.chat import CHATML, ChatFormat, render_chat
from tests.templates.families import FAMILIES, Family

LEARNABLE = [family for family in FAMILIES if family.ends is not None]
BUILT_IN = Family("built-in", (), (), "<|im_end|>")
TURNS = (("one", "uno"), ("two and\n\ntwo", "dos y dos"), ("three", "tres"))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Bye."},
]
# Texts that a template may strip at their ends, and nothing else.
WORDS = st.text(st.sampled_from("abc \n.é<|>"), max_size=10).map(lambda text: f"x{text}y")


def read(folder: Path, row: dict[str, Any], chat_format: ChatFormat = CHATML) -> list[Document]:
    (folder / "x.jsonl").write_text(json.dumps(row))
    return read_documents([folder / "x.jsonl"], chat_format)


def format_of(family: Family) -> ChatFormat:
    return CHATML if family is BUILT_IN else family.chat_format


def turns_of(documents: list[Document]) -> list[tuple[str, str]]:
    """What is predicted, each with all the text before it."""
    found = []
    for document in documents:
        before = ""
        for text, target in document.spans:
            if target:
                found.append((before, text))
            before += text
    return found


def check(documents: list[Document], messages: list[dict[str, Any]], family: Family, tools: Any = None) -> list[str]:
    """Each turn follows its prompt, and ends with what ends it; returns the turns."""
    chat_format = format_of(family)
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    found = turns_of(documents)
    prompts = [render_chat(messages[:number], chat_format, tools=tools) for number in numbers]
    assert sorted(before for before, _ in found) == sorted(prompts)
    turns = dict(found)
    for prompt in prompts:
        ends = [text for text in chat_format.ends if text in turns[prompt]]
        assert len(ends) == 1
        assert family.ends is not None
        assert turns[prompt].endswith(family.ends) or ends[0] in ("<|call|>",)
        assert turns[prompt].count(ends[0]) == 1
    return [turns[prompt] for prompt in prompts]


@pytest.mark.parametrize("family", [BUILT_IN, *LEARNABLE], ids=lambda family: family.name)
def test_turns_are_learned_whole(family: Family, tmp_path: Path) -> None:
    messages = family.conversation(*TURNS)
    turns = check(read(tmp_path, {"messages": messages}, format_of(family)), messages, family)
    for (_, said), turn in zip(TURNS, turns, strict=True):
        assert family.ends is not None
        assert said in turn
        assert turn.endswith(family.ends)
        # Nothing of another message.
        assert not any(word in turn for user, other in TURNS for word in (user, other) if other != said)


@pytest.mark.parametrize("family", [BUILT_IN, *LEARNABLE], ids=lambda family: family.name)
@settings(max_examples=20)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_whatever_is_said(
    family: Family, turns: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    messages = family.conversation(*turns)
    documents = read(tmp_path_factory.mktemp("chat"), {"messages": messages}, format_of(family))
    for (_, said), turn in zip(turns, check(documents, messages, family), strict=True):
        assert said in turn


@pytest.mark.parametrize("family", [family for family in LEARNABLE if family.tools], ids=lambda family: family.name)
def test_calls_of_tools_are_learned(family: Family, tmp_path: Path) -> None:
    turns = check(
        read(tmp_path, {"messages": WITH_TOOLS, "tools": TOOLS}, family.chat_format), WITH_TOOLS, family, TOOLS
    )
    assert all(text in turns[0] for text in ("add", '"a": 1', '"b": 2'))
    assert "It is 3." in turns[1]
    assert "Bye." in turns[2]
    assert not any("What is" in turn or "Thanks" in turn or "Adds two" in turn for turn in turns)


@pytest.mark.parametrize("family", [family for family in LEARNABLE if family.reasoning], ids=lambda family: family.name)
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_learned_where_it_is_generated(family: Family, key: str, tmp_path: Path) -> None:
    """The templates leave it out of earlier turns, so each turn is learned in a document of its own."""
    messages = family.conversation(*TURNS)
    for message in messages:
        if message["role"] == "assistant":
            message[key] = f"thought of {message['content']}"
    documents = read(tmp_path, {"messages": messages}, family.chat_format)
    assert len(documents) == 3
    for (_, said), turn in zip(TURNS, check(documents, messages, family), strict=True):
        assert turn.index(f"thought of {said}") < turn.rindex(said)
    assert [text.text.count("thought of") for text in documents] == [1, 1, 1]


@pytest.mark.parametrize("family", LEARNABLE, ids=lambda family: family.name)
def test_a_template_that_rewrites_nothing_makes_one_document(family: Family, tmp_path: Path) -> None:
    rewrites = family.name in ("qwen3", "harmony")
    messages = family.conversation(*TURNS)
    assert len(read(tmp_path, {"messages": messages}, family.chat_format)) == (3 if rewrites else 1)


# Refused


def refused(
    folder: Path, row: dict[str, Any], chat_format: ChatFormat, *words: str, kind: type = TokenizerError
) -> None:
    with pytest.raises(kind) as caught:
        read(folder, row, chat_format)
    assert str(caught.value).startswith(f"{folder / 'x.jsonl'}, line 1: ")
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value).endswith(".")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.ends is None], ids=lambda family: family.name
)
def test_what_a_family_cannot_teach(family: Family, tmp_path: Path) -> None:
    words = {
        "deepseek_r1": ("message 3 would be generated behind", "<think>", "but is written as", "give 'prompt' and"),
        "falcon": ("message 3 ends with", "Falcon: uno", "nothing that stops generation (<|endoftext|> would)"),
    }
    refused(tmp_path, {"messages": family.conversation(*TURNS)}, family.chat_format, *words[family.name])


def test_a_system_message_that_comes_and_goes(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "mistral_v3_tools")
    messages = [{"role": "system", "content": "Be brief."}, *family.conversation(*TURNS)]
    assert "Be brief." in render_chat(messages[:2], family.chat_format)
    refused(tmp_path, {"messages": messages}, family.chat_format, "message 3 would be generated behind", "Be brief.")


SIMPLE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\nBODY<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONE = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "uno"}]}


def simple(body: str, **more: Any) -> ChatFormat:
    return ChatFormat(SIMPLE.replace("BODY", body), **more)


@pytest.mark.parametrize(
    ("chat_format", "words"),
    [
        (simple("{{ m.content }}", stop_tokens=("<|endoftext|>",)), ("message 2 ends with", "(<|endoftext|> would)")),
        (simple("{{ m.content }}", stop_tokens=()), ("message 2 ends with", "(no token would)", "eos_token_id")),
        (simple("{{ m.content }}<|im_end|> and more"), ("message 2 goes on with 'and more' behind <|im_end|>",)),
        (
            simple("{% if loop.last %}{{ m.content }}{% endif %}"),
            (
                "message 2 would be generated behind ",
                "one<|im_end|>",
            ),
        ),
        (ChatFormat("{{ messages[0].content }}"), ("message 2 ends with 'one' and nothing that stops",)),
        (ChatFormat("{{ 1 / 0 }}"), ("can't be rendered (division by zero)",)),
        (ChatFormat("{{ raise_exception('no') if messages | length == 1 }}"), ("can't be rendered (no)",)),
    ],
)
def test_templates_that_cannot_be_learned_from(chat_format: ChatFormat, words: tuple[str, ...], tmp_path: Path) -> None:
    refused(tmp_path, ONE, chat_format, *words)


@pytest.mark.parametrize(
    ("body", "turn"),
    [
        ("{{ m.content }}\n", "uno\n<|im_end|>"),
        ("{{ m.content }}<|im_end|><|endoftext|>", "uno<|im_end|>"),
        ("\n>> {{ m.content | upper }}", "\n>> UNO<|im_end|>"),
        ("{% generation %}{{ m.content }}{% endgeneration %}", "uno<|im_end|>"),
        ("{% if m.role == 'assistant' %}said: {% endif %}{{ m.content }}", "said: uno<|im_end|>"),
        ("{{ m.content * 2 }}", "unouno<|im_end|>"),
    ],
)
def test_all_that_a_template_puts_into_a_turn_is_learned(body: str, turn: str, tmp_path: Path) -> None:
    assert turns_of(read(tmp_path, ONE, simple(body)))[0][1] == turn


# Rows


def test_turns_of_weight_nothing_are_only_read(tmp_path: Path) -> None:
    messages = CHAT = Family("chatml", (), (), "").conversation(*TURNS)
    whole = turns_of(read(tmp_path, {"messages": messages}))
    for key, value in (("weight", 0), ("weight", 0.0), ("train", False)):
        messages = [message | ({key: value} if number == 4 else {}) for number, message in enumerate(CHAT)]
        (document,) = read(tmp_path, {"messages": messages})
        assert turns_of([document]) == [whole[0], whole[2]]
    kept = [message | {"weight": 1, "train": True} if message["role"] == "assistant" else message for message in CHAT]
    assert turns_of(read(tmp_path, {"messages": kept})) == whole


def test_rows_of_weight_nothing_are_left_out_aloud(tmp_path: Path) -> None:
    nothing = [message | {"weight": 0} for message in ONE["messages"]]
    rows = (
        {"text": "a", "weight": 0},
        {"prompt": "p", "completion": "c", "train": False},
        {"messages": nothing},
        {"text": "b"},
    )
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match=r"^3 rows are left out, since nothing in them is to be learned\.$"):
        documents = read_documents([tmp_path / "x.jsonl"])
    assert [document.text for document in documents] == ["b"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": 0.5}, "'weight' is 0.5 where 1 or 0 is expected"),
        ({"train": "no"}, "'train' is 'no' where True or False is expected"),
        ({"tools": TOOLS}, "has no place for tools"),
        ({"tools": "[]"}, "'tools' is '[]' where a list is expected"),
        (
            {"messages": [*ONE["messages"], {"role": "user", "content": "a", "weight": 1}]},
            "only what the assistant says",
        ),
        (
            {"messages": [*ONE["messages"], {"role": "assistant", "content": "a", "weight": 2}]},
            "Message 3: 'weight' is 2",
        ),
        ({"messages": [*ONE["messages"], {"role": "tool", "content": "a"}]}, "unknown role 'tool'"),
        ({"messages": [ONE["messages"][0], {"role": "assistant", "tool_calls": [CALL]}]}, "no place for 'tool_calls'"),
        (
            {"messages": [ONE["messages"][0], ONE["messages"][1] | {"reasoning_content": "hm"}]},
            "no place for 'reasoning_content'",
        ),
    ],
)
def test_what_a_row_asks_for_is_done_or_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    for chat_format in (CHATML, simple("{{ m.content }}")):
        if "unknown role" in words and chat_format.template is not None:
            continue
        refused(tmp_path, ONE | change, chat_format, words, kind=InputError)


def test_keys_that_the_template_does_not_read_are_told(tmp_path: Path) -> None:
    messages = [ONE["messages"][0] | {"id": 7, "name": None}, ONE["messages"][1] | {"date": "today"}]
    with pytest.warns(
        UserWarning, match=r"^Not used of the data: 'id' of messages \(1\), 'date' of messages \(1\), .*'url' \(1\)\.$"
    ):
        read(tmp_path, {"messages": messages, "url": "x"}, simple("{{ m.content }}"))
    # Read by its name, or with all others.
    read(tmp_path, {"messages": messages}, simple("{{ m.content }}{{ m.id }}{{ m.date }}"))
    read(tmp_path, {"messages": messages}, simple("{{ m | tojson }}"))


def test_messages_that_the_template_leaves_out_are_refused(tmp_path: Path) -> None:
    deaf = simple("{% if m.role != 'system' %}{{ m.content }}{% endif %}").template
    deaf = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}<|im_end|>{% endfor %}"
    for role in ("system", "tool", "developer"):
        messages = [*ONE["messages"], {"role": role, "content": "Be brief."}, *ONE["messages"]]
        refused(
            tmp_path,
            {"messages": messages},
            ChatFormat(deaf),
            f"leaves out message 3, of the role '{role}'",
            kind=InputError,
        )
    with pytest.raises(InputError, match="leaves out message 1, of the role 'system'"):
        render_chat(ONE["messages"], ChatFormat(deaf), system="Be brief.")


def test_conversations_of_very_many_turns_are_refused_in_time(tmp_path: Path) -> None:
    for count in (1000, 100_000):
        row = {"messages": ONE["messages"] * count}
        refused(
            tmp_path, row, CHATML, f"{2 * count} messages and {count} turns", "cut it into several", kind=InputError
        )
    assert len(turns_of(read(tmp_path, {"messages": ONE["messages"] * 100}))) == 100


def test_content_in_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "u"}, {"type": "text", "text": "no"}]
    row = {"messages": [ONE["messages"][0], {"role": "assistant", "content": parts}]}
    reads_parts = next(family for family in FAMILIES if family.name == "parts").chat_format
    for chat_format in (CHATML, simple("{{ m.content }}"), reads_parts):
        assert turns_of(read(tmp_path, row, chat_format)) == turns_of(read(tmp_path, ONE, chat_format))
    listed = simple("{{ m.content if m.content is string else m.content | map(attribute='text') | join('+') }}")
    assert turns_of(read(tmp_path, row, listed))[0][1] == "u+no<|im_end|>"
    image = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ONE["messages"][1]]}
    refused(tmp_path, image, reads_parts, "DBRX reads nothing but text", kind=InputError)


def test_null_is_as_good_as_absent(tmp_path: Path) -> None:
    null = {"tool_calls": None, "name": None, "weight": None, "train": None, "reasoning_content": None}
    row = {"messages": [message | null for message in ONE["messages"]], "tools": None, "weight": None, "train": None}
    for chat_format in (CHATML, *(family.chat_format for family in LEARNABLE)):
        assert read(tmp_path, row, chat_format) == read(tmp_path, ONE, chat_format)


# Control tokens


def test_what_is_said_in_data_makes_no_control_token(tmp_path: Path) -> None:
    said = "uno<|im_end|>\n<|im_start|>user\n"
    row = {"messages": [ONE["messages"][0], {"role": "assistant", "content": said}]}
    for chat_format in (CHATML, simple("{{ m.content }}")):
        with pytest.warns(UserWarning, match=r"x\.jsonl, line 1 spell control tokens, such as .* as plain text: "):
            (document,) = read(tmp_path, row, chat_format)
        assert turns_of([document])[0][1] == f"{said}<|im_end|>"
        text = document.text
        assert [text[start:end] for start, end in document.literal] == ["<|im_end|>", "<|im_start|>"]
        place = text.index(said) + 3
        assert document.literal[0] == (place, place + len("<|im_end|>"))
    # Let in, the first ends the turn.
    with pytest.raises(TokenizerError, match=r"goes on with 'user' behind <\|im_end\|>, which stops generation"):
        read_documents([tmp_path / "x.jsonl"], simple("{{ m.content }}"), control_tokens=True)


def test_raw_text_makes_none_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        '{"prompt": "<|im_start|>", "completion": "a"}\n{"text": "<|pad|>"}\n{"text": "b"}'
    )
    with pytest.warns(UserWarning, match=r"x\.jsonl, line 1 and 1 others spell control tokens"):
        documents = read_documents([tmp_path / "x.jsonl"])
    assert [document.literal for document in documents] == [((0, 13),), ((0, 7),), ((0, 1),)]
    let_in = read_documents([tmp_path / "x.jsonl"], control_tokens=True)
    assert let_in == [replace(document, literal=()) for document in documents]


def test_every_refusal_is_a_dbrx_error() -> None:
    assert issubclass(TokenizerError, DbrxError)
