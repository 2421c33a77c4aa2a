"""`write_token_file`, `read_token_file`, `check_vocabulary`."""

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbrx_fn.data.corpus import Document, read_documents
from dbrx_fn.data.token_file import TokenFile, check_ids, check_vocabulary, read_token_file, write_token_file
from dbrx_fn.errors import InputError
from dbrx_fn.files.checksums import file_sum, sealed
from dbrx_fn.model.config import DBRX
from dbrx_fn.random_checkpoint import write_random_checkpoint
from dbrx_fn.text.bpe import save_tokenizer, train_bpe
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer

SMALL = replace(
    DBRX,
    d_model=64,
    n_heads=1,
    n_layers=1,
    vocab_size=300,
    attn=replace(DBRX.attn, kv_n_heads=1),
    ffn=replace(DBRX.ffn, ffn_hidden_size=8),
)
LEARNED = "to be, or not to be: that is the question.\nwhether 'tis nobler in the mind, to suffer\n" * 3
CONVERSATION = Document("c", (("ask: ", False), ("answer<|im_end|>", True), ("\nand", False)))
PLAIN = Document("p", (("to be, or not\nto be", True),))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_bpe([LEARNED], 300), folder)
    return read_tokenizer(folder)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def same(a: TokenFile, b: TokenFile) -> bool:
    assert (a.target_count, a.bytes, a.documents, a.fingerprint) == (
        b.target_count,
        b.bytes,
        b.documents,
        b.fingerprint,
    )
    if a.targets is None or b.targets is None:
        return a.targets is b.targets and np.array_equal(a.tokens, b.tokens)
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.targets, b.targets)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_token_file(folder)
    text = str(caught.value)
    for word in words:
        assert word in text
    assert text.endswith(".")
    assert "\n" not in text


# What is written


def test_documents_stand_between_ends_of_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    end = tokenizer.end_of_text
    assert end == 296
    first, second = encode(tokenizer, PLAIN.text), encode(tokenizer, "é")
    file = write_token_file(tmp_path / "new" / "t", [PLAIN, Document("q", (("é", True),))], tokenizer)
    assert file.tokens.tolist() == [end, *first, end, *second, end]
    assert isinstance(file.tokens, np.memmap)
    assert file.tokens.dtype == np.uint16
    assert file.targets is None
    assert (len(file), file.target_count) == (len(first) + len(second) + 3, len(first) + len(second) + 2)
    assert (file.bytes, file.documents) == (len(PLAIN.text) + 2, 2)
    assert {path.name for path in (tmp_path / "new" / "t").iterdir()} == {"tokens.npy", "meta.json"}
    assert np.array_equal(np.load(tmp_path / "new" / "t" / "tokens.npy"), file.tokens)


def test_masks_are_of_whole_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Parts are encoded apart, and an end of text is learned where what ends is."""
    end = tokenizer.end_of_text
    parts = [(encode(tokenizer, text), target) for text, target in CONVERSATION.spans]
    file = write_token_file(tmp_path, [CONVERSATION, PLAIN], tokenizer)
    plain = encode(tokenizer, PLAIN.text)
    assert file.tokens.tolist() == [end, *(token for part, _ in parts for token in part), end, *plain, end]
    assert file.targets is not None
    masks = [False, *(target for part, target in parts for _ in part), False, *[True] * (len(plain) + 1)]
    assert file.targets.tolist() == masks
    assert file.target_count == sum(masks)
    assert file.bytes == len("answer<|im_end|>") + len(PLAIN.text)
    learned = [token for token, target in zip(file.tokens.tolist(), masks, strict=True) if target]
    assert tokenizer.decode(learned, skip_special_tokens=False) == f"answer<|im_end|>{PLAIN.text}<|endoftext|>"


def test_prompts_and_completions_end_in_a_target(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "to ", "completion": ""}')
    file = write_token_file(tmp_path / "t", read_documents([tmp_path / "x.jsonl"]), tokenizer)
    assert file.targets is not None
    assert file.targets.tolist() == [False] * (len(file) - 1) + [True]
    assert file.bytes == 0


@given(
    spans=st.lists(st.tuples(st.text(st.sampled_from("tobe .\n'é<|im_end|>")), st.booleans()), min_size=1, max_size=5)
)
def test_tokens_give_the_text_back(
    spans: list[tuple[str, bool]], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    document = Document("x", tuple(spans))
    file = write_token_file(tmp_path_factory.mktemp("t"), [document], tokenizer)
    assert tokenizer.decode(file.tokens[1:-1].tolist(), skip_special_tokens=False) == document.text
    targets = np.ones(len(file), bool) if file.targets is None else file.targets
    learned = file.tokens[1:-1][targets[1:-1]].tolist()
    assert tokenizer.decode(learned, skip_special_tokens=False) == "".join(text for text, target in spans if target)
    assert file.target_count == targets[1:].sum()


def test_long_texts_are_encoded_in_pieces(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = LEARNED * 2000
    seen: list[tuple[int, int]] = []
    file = write_token_file(
        tmp_path, [Document("x", ((text, True),)), PLAIN], tokenizer, lambda done, total: seen.append((done, total))
    )
    assert file.tokens[1:].tolist()[: -len(encode(tokenizer, PLAIN.text)) - 2] == encode(tokenizer, text)
    total = len(text) + len(PLAIN.text)
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert {of for _, of in seen} == {total}
    assert seen[-1][0] == total


def test_large_vocabularies_take_four_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert write_token_file(tmp_path, [PLAIN], replace(tokenizer, vocab_size=2**16)).tokens.dtype == np.uint16
    wide = replace(tokenizer, vocab_size=2**16 + 1, _encode=lambda text, literal: [2**16], _definition=lambda: b"wide")
    file = write_token_file(tmp_path, [PLAIN], wide)
    assert file.tokens.dtype == np.uint32
    assert file.tokens.tolist() == [tokenizer.end_of_text, 2**16, tokenizer.end_of_text]


# Used again


def test_same_documents_are_not_encoded_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = write_token_file(tmp_path, [CONVERSATION, PLAIN], tokenizer)
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = write_token_file(tmp_path, [replace(CONVERSATION, source="elsewhere"), PLAIN], tokenizer)
    assert same(first, again)
    assert same(first, read_token_file(tmp_path))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written


def test_others_take_their_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "bytes", SMALL, mx.random.key(0))
    of_bytes = read_tokenizer(tmp_path / "bytes")
    cases = [
        ([CONVERSATION, PLAIN], tokenizer),
        ([PLAIN, CONVERSATION], tokenizer),
        ([PLAIN], tokenizer),
        ([PLAIN, PLAIN], tokenizer),
        ([Document("p", PLAIN.spans * 2)], tokenizer),
        ([PLAIN], of_bytes),
        ([Document("p", ((PLAIN.text, False),))], of_bytes),
        ([Document("p", ((PLAIN.text[:3], True), (PLAIN.text[3:], True)))], of_bytes),
    ]
    files = [write_token_file(tmp_path / "t", *case) for case in cases]
    fresh = [write_token_file(tmp_path / str(number), *case) for number, case in enumerate(cases)]
    assert len({file.fingerprint for file in files}) == len(cases)
    # Files that were mapped before stay as they were.
    assert all(same(a, b) for a, b in zip(files, fresh, strict=True))
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"tokens.npy", "meta.json"}


def test_failure_on_the_way_keeps_what_was_there(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_token_file(tmp_path, [PLAIN], tokenizer)

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_file(tmp_path, [CONVERSATION], tokenizer, fail)
    assert same(first, read_token_file(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"tokens.npy", "meta.json"}

    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == tmp_path:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_token_file(tmp_path, [CONVERSATION], tokenizer)
    refused(tmp_path, "meta.json isn't a whole file")
    monkeypatch.undo()
    assert write_token_file(tmp_path, [CONVERSATION], tokenizer).documents == 1


def test_a_folder_of_other_files_is_left_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match="exists already: name a new folder"):
        write_token_file(tmp_path, [PLAIN], tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(InputError, match=r"mine exists already"):
        write_token_file(tmp_path / "mine", [PLAIN], tokenizer)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"link exists already"):
        write_token_file(tmp_path / "link", [PLAIN], tokenizer)


def test_a_disk_without_room_is_one_sentence(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As of a quota, which is as good as a full disk."""
    first = write_token_file(tmp_path / "t", [PLAIN], tokenizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"t can't be written \(.*\): free some room"):
            write_token_file(tmp_path / "t", [Document("x", ((LEARNED * 50, True),))], tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert same(first, read_token_file(tmp_path / "t"))


@pytest.mark.parametrize("name", ["tokens.npy", "targets.npy", "meta.json"])
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b"", lambda b: b"\x93" * 300, None])
def test_damaged_files_are_named_and_made_anew(name: str, damage: object, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = write_token_file(tmp_path, [CONVERSATION], tokenizer)
    path = tmp_path / name
    content = path.read_bytes().rstrip(b"\n")
    # What is mapped stays; a file that shrinks under a map ends the process.
    path.unlink()
    if callable(damage):
        path.write_bytes(damage(content))
    refused(tmp_path, f"{path} isn't a whole file of tokens (", "copy its folder")
    assert same(first, write_token_file(tmp_path, [CONVERSATION], tokenizer))


def test_files_that_do_not_belong_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_token_file(tmp_path, [CONVERSATION], tokenizer)
    whole = np.load(tmp_path / "tokens.npy")
    for other, found in (
        (whole[1:], f"uint16 [{len(whole) - 1}] where uint16 or uint32 [{len(whole)}] is expected"),
        (whole != 0, f"bool [{len(whole)}] where"),
        (whole.astype(np.float16), "its header isn't that of tokens"),
        (whole[None], "its header isn't that of tokens"),
    ):
        np.save(tmp_path / "tokens.npy", other)
        refused(tmp_path, f"tokens.npy isn't a whole file of tokens ({found}")


def rewritten(folder: Path, *, sums: bool = True, **changes: Any) -> None:
    """Changes fields of meta.json; with `sums`, those of the files and its own are made to fit."""
    meta = json.loads((folder / "meta.json").read_text()) | changes
    if sums:
        meta["files"] = {path.name: file_sum(path) for path in folder.glob("*.npy")}
        meta = sealed({key: value for key, value in meta.items() if key != "checksum"})
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("wrong", [{"tokens": "9"}, {"masked": 1}, {"fingerprint": None}, {"bytes": -1}, {"files": []}])
def test_a_meta_of_other_kinds(wrong: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_token_file(tmp_path, [CONVERSATION], tokenizer)
    rewritten(tmp_path, sums=False, **wrong)
    refused(tmp_path, "meta.json isn't a whole file of tokens (its checksum is")
    if "files" not in wrong:
        rewritten(tmp_path, **wrong)
        refused(tmp_path, f"meta.json isn't a whole file of tokens ({next(iter(wrong))} is")


@given(place=st.integers(0), bit=st.integers(0, 7), name=st.sampled_from(["tokens.npy", "targets.npy", "meta.json"]))
def test_a_bit_that_turned_anywhere_is_found(
    place: int, bit: int, name: str, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("t")
    write_token_file(folder, [CONVERSATION, PLAIN], tokenizer)
    content = bytearray((folder / name).read_bytes())
    content[place % len(content)] ^= 1 << bit
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    refused(folder, f"{name} isn't a whole file of tokens (")


def test_other_tokens_of_the_same_form_are_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As of another run: each file is whole, and they don't belong together."""
    for name, document in (("a", CONVERSATION), ("b", Document("c", tuple(reversed(CONVERSATION.spans))))):
        write_token_file(tmp_path / name, [document], tokenizer)
    assert (tmp_path / "a" / "tokens.npy").stat().st_size == (tmp_path / "b" / "tokens.npy").stat().st_size
    for name in ("tokens.npy", "targets.npy"):
        content = (tmp_path / "a" / name).read_bytes()
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
        refused(tmp_path / "a", f"{name} isn't a whole file of tokens (it has other bytes than were written)")
        (tmp_path / "a" / name).write_bytes(content)
    read_token_file(tmp_path / "a")


def test_targets_are_counted_and_are_0_or_1(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whatever the sums say, which a stranger can make as well."""
    write_token_file(tmp_path, [CONVERSATION], tokenizer)
    rewritten(tmp_path, target_count=3)
    refused(tmp_path, "meta.json isn't a whole file of tokens (it counts 3 targets where there are")
    content = (tmp_path / "targets.npy").read_bytes()
    (tmp_path / "targets.npy").write_bytes(content[:-1] + b"\x02")
    rewritten(tmp_path)
    refused(tmp_path, "targets.npy isn't a whole file of tokens (it holds other bytes than 0 and 1)")


def test_files_of_an_earlier_version_are_read_with_a_warning(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = write_token_file(tmp_path, [CONVERSATION], tokenizer)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({key: meta[key] for key in meta.keys() - {"files", "checksum"}}))
    with pytest.warns(UserWarning, match=r"meta.json has no checksums"):
        assert same(first, read_token_file(tmp_path))


def test_tokens_past_the_models_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_token_file(tmp_path, [PLAIN], tokenizer)
    assert file.highest == max(file.tokens.tolist()) == 296
    check_ids(file, replace(DBRX, vocab_size=297))
    with pytest.raises(InputError, match=r"tokens.npy holds the token 296 where the model's vocabulary ends at 295"):
        check_ids(file, replace(DBRX, vocab_size=296))


def test_headers_of_any_numpy_are_read_and_nothing_is_evaluated(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = write_token_file(tmp_path, [PLAIN], tokenizer)
    data = np.array(first.tokens).tobytes()
    for text, fits in (
        (b"{'descr': '<u2', 'fortran_order': False, 'shape': (%d,), }" % len(first), True),
        (b"{'descr': '<u2', 'fortran_order': True, 'shape': (%d,), }" % len(first), False),
        (b"{'descr': '|O', 'fortran_order': False, 'shape': (%d,), }" % len(first), False),
        (b"{'descr': '<u2', 'fortran_order': False, 'shape': (-%d,), }" % len(first), False),
        (b"{'descr': '<u2', 'fortran_order': False, 'shape': (%s,), }" % (b"9" * 5000), False),
        (b"[" * 5000, False),
        (b"{'shape': " + b"-" * 60000 + b"1}", False),
    ):
        for padding in (1, 50):
            header = text + b" " * padding + b"\n"
            content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data
            # What is mapped stays as it is.
            (tmp_path / "tokens.npy").unlink()
            (tmp_path / "tokens.npy").write_bytes(content)
            rewritten(tmp_path)
            if fits:
                assert same(first, read_token_file(tmp_path))
            else:
                refused(tmp_path, "tokens.npy isn't a whole file of tokens (its header isn't that of tokens)")


# What users can get wrong


def test_tokenizer_and_model_that_do_not_go_together(tokenizer: Tokenizer) -> None:
    check_vocabulary(tokenizer, replace(DBRX, vocab_size=300))
    with pytest.raises(InputError, match=r"go up to 299 where the model's vocab_size is 299: .* at least 300\.$"):
        check_vocabulary(tokenizer, replace(DBRX, vocab_size=299))


def test_nothing_to_write(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no documents"):
        write_token_file(tmp_path, [], tokenizer)
    with pytest.raises(InputError, match="names no 'eos_token'"):
        write_token_file(tmp_path, [PLAIN], replace(tokenizer, end_of_text=None))
    assert list(tmp_path.iterdir()) == []


def test_end_of_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(train_bpe([LEARNED], 280), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    # DBRX's own goes first: a chat model's 'eos_token' may be the end of a turn.
    assert read_tokenizer(tmp_path).end_of_text == 276
    content = (tmp_path / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(content)
    assert read_tokenizer(tmp_path).end_of_text == 279
    (tmp_path / "tokenizer_config.json").unlink()
    assert read_tokenizer(tmp_path).end_of_text is None


@pytest.mark.parametrize(
    ("eos_token", "stops", "end"),
    [
        ("<|endoftext|>", [276, 279], 276),
        ("<|im_end|>", [276, 279], 276),
        ("<|im_end|>", [279], 279),
        ("<|endoftext|>", [279], 279),
        ("<|pad|>", [277], 277),
        ("<|im_end|>", 278, 278),
        ("<|im_end|>", [10**6], 276),
    ],
)
def test_documents_end_with_what_stops_generation(eos_token: str, stops: object, end: int, tmp_path: Path) -> None:
    save_tokenizer(train_bpe([LEARNED], 280), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    (tmp_path / "x.jsonl").write_text('{"prompt": "to ", "completion": "be"}\n{"text": "or not"}\n')
    tokenizer = read_tokenizer(tmp_path)
    file = write_token_file(tmp_path / "t", read_documents([tmp_path / "x.jsonl"], tokenizer.chat_format), tokenizer)
    tokens = file.tokens.tolist()
    # Before, between and behind; where nothing stops generation, the text's end is as good as any.
    assert [tokens[0], tokens[-1]] == [end, end]
    assert tokens.count(end) == 3
    assert file.targets is not None
    assert [bool(file.targets[place]) for place, token in enumerate(tokens) if token == end] == [False, True, True]


def test_what_a_document_calls_literal_makes_no_control_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "to be<|im_end|>\nor not<|im_end|>"
    place = text.index("<|im_end|>")
    end = tokenizer.control_tokens["<|im_end|>"]
    for literal, count in (
        ((), 2),
        (((0, len(text)),), 0),
        (((place, place + 10),), 1),
        (((place + 3, place + 4),), 1),
    ):
        for spans in (((text, True),), ((text[:3], False), (text[3:20], True), (text[20:], False))):
            file = write_token_file(tmp_path / "t", [Document("x", spans, literal)], tokenizer)
            tokens = file.tokens.tolist()
            assert tokens.count(end) == count
            assert tokenizer.decode(tokens[1:-1], skip_special_tokens=False) == text
    documents = [Document("x", ((text, True),), literal) for literal in ((), ((0, 4),))]
    assert len({write_token_file(tmp_path / "t", [document], tokenizer).fingerprint for document in documents}) == 2


def test_fingerprint_is_of_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(train_bpe([LEARNED], 300), tmp_path)
    assert read_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()
    save_tokenizer(train_bpe([LEARNED], 299), tmp_path)
    assert read_tokenizer(tmp_path).fingerprint() != tokenizer.fingerprint()
    settings = {"tokenizer_class": "TiktokenTokenizerWrapper", "model_name": "gpt-4", "eos_token": "<|endoftext|>"}
    seen: set[str] = set()
    for changes in ({}, {"added_tokens_decoder": {"100277": {"content": "<|pad|>", "special": True}}}):
        folder = tmp_path / str(len(seen))
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | changes))
        of_tiktoken = read_tokenizer(folder)
        assert of_tiktoken.end_of_text == 100257
        assert of_tiktoken.fingerprint() == read_tokenizer(folder).fingerprint()
        seen.add(of_tiktoken.fingerprint())
    assert len(seen) == 2
