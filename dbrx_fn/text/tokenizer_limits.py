"""Checks a tokenizer.json before the tokenizers library reads it.

The library accepts any file. It panics at some contents, and takes unbounded time or memory for others. So only the
parts of tokenizers of DBRX's kind are accepted, within bounds.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dbrx_fn.errors import TokenizerError
from dbrx_fn.files.json_file import shown
from dbrx_fn.text.regex_cost import RegexCostError, check_regex
from dbrx_fn.text.tokenizer_settings import Settings, is_token_id
from dbrx_fn.text.vocabulary import BYTES

_LARGEST_ID = 2**22 - 1
"""The library takes memory for all ids up to the largest. The largest known vocabulary has 260 thousand."""
_MOST_STEPS = 32
"""The most normalizers, or pre-tokenizers, in one file. The most known are 9."""
_MOST_GROWTH = 16
"""The most times that a text's length may grow before it is tokenized."""
_MOST_AROUND = 64
"""The most special tokens around one text."""

Step = Mapping[str, Any]


def check_file(file: Settings) -> None:
    """Checks that the library can safely read the content of a tokenizer.json.

    Raises:
        TokenizerError: if a part has an unsupported type, or exceeds a bound.
    """
    normalizers = list(_steps(file, "normalizer", "normalizers"))
    cutters = list(_steps(file, "pre_tokenizer", "pretokenizers"))
    _check_model(file, byte_level=any(step["type"] == "ByteLevel" for step in (*normalizers, *cutters)))
    growth = 1
    for part, step, growths in [
        *(("normalizer", step, _NORMALIZERS) for step in normalizers),
        *(("pre_tokenizer", step, _CUTTERS) for step in cutters),
    ]:
        kind = step["type"]
        if kind not in growths:
            raise file.wrong(f"the {part}", "of the kinds " + ", ".join(growths), kind)
        growth *= growths[kind](file, step)
    if growth > _MOST_GROWTH:
        raise TokenizerError(
            f"{file.path}: its normalizer and pre_tokenizer can make a text {growth} times as long, more than "
            f"{_MOST_GROWTH} times; take the file of a DBRX checkpoint."
        )
    for step in _steps(file, "post_processor", "processors"):
        _check_processor(file, step)
    decoder = file.value("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise TokenizerError(
            f"{file.path} must have a ByteLevel decoder, as every DBRX tokenizer has; take the file of a DBRX "
            "checkpoint."
        )


def _check_model(file: Settings, *, byte_level: bool) -> None:
    model = file.value("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        found = model.get("type") if isinstance(model, dict) else model
        raise file.wrong("the 'type' of the model", "BPE, as every DBRX tokenizer's is", found)
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise file.wrong("the model", "an object with a 'vocab' and a list of 'merges'", model)
    for name, number in vocabulary.items():
        if not is_token_id(number) or number > _LARGEST_ID:
            raise file.wrong(f"the id of {shown(name)}", f"a whole number from 0 to {_LARGEST_ID}", number)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise file.wrong("each id in the model's 'vocab'", "one token's", "an id that two tokens have")
    if model.get("dropout"):
        raise TokenizerError(
            f"{file.path}: 'dropout' of the model is {shown(model['dropout'])}, which makes encoding random; set it to "
            "null."
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise file.wrong(f"'{key}' of the model", "null, as in every byte-level tokenizer", model[key])
    unknown = model.get("unk_token")
    if unknown is not None and not isinstance(unknown, str):
        raise file.wrong("'unk_token' of the model", "a text, or null", unknown)
    if unknown is not None and unknown not in vocabulary and not (byte_level and vocabulary.keys() >= BYTES.keys()):
        raise file.wrong("'unk_token' of the model", "a token of its 'vocab', or null", unknown)


def _steps(file: Settings, part: str, key: str) -> Iterator[Step]:
    """Yields the steps of a part of the file. Sequences may be nested."""
    waiting, seen = [file.value(part)], 0
    while waiting:
        step = waiting.pop()
        if step is None:
            continue
        seen += 1
        if seen > _MOST_STEPS:
            raise file.wrong(f"the {part}", f"of at most {_MOST_STEPS} steps", "more")
        inner = step.get(key) if isinstance(step, dict) else None
        if isinstance(step, dict) and step.get("type") == "Sequence" and isinstance(inner, list):
            waiting += reversed(inner)
        elif isinstance(step, dict) and isinstance(step.get("type"), str) and step["type"] != "Sequence":
            yield step
        else:
            raise file.wrong(f"the {part}", "null, or an object with a known 'type'", step)


def _same(file: Settings, step: Step) -> int:
    return 1


def _double(file: Settings, step: Step) -> int:
    """Growth of 2: byte-level steps write most bytes as two; BERT's put spaces around Chinese characters."""
    return 2


def _prepended(file: Settings, step: Step) -> int:
    return 1 + len(_text(file, step, "prepend").encode())


def _replaced(file: Settings, step: Step) -> int:
    content = len(_text(file, step, "content").encode("utf-8", "replace"))
    string, empty = _pattern(file, step)
    if empty:
        # The library fails if the empty match is at the end of the text.
        raise file.wrong("'pattern' of Replace", "one that matches a character at least", step["pattern"])
    return max(1, -(-content // max(1, len(string.encode("utf-8", "replace")))))


def _cut_at(file: Settings, step: Step) -> int:
    _pattern(file, step)
    return 1


def _pattern(file: Settings, step: Step) -> tuple[str, bool]:
    """Returns a step's search text, if it isn't an expression, and whether it can match the empty text."""
    pattern = step.get("pattern")
    kind, value = next(iter(pattern.items())) if isinstance(pattern, dict) and len(pattern) == 1 else (None, None)
    if kind not in ("String", "Regex") or not isinstance(value, str) or not value:
        raise file.wrong(
            f"'pattern' of {step['type']}", "an object with one 'String' or 'Regex' that isn't empty", pattern
        )
    if kind == "String":
        return value, False
    try:
        return "", check_regex(value)
    except RegexCostError as error:
        raise TokenizerError(
            f"{file.path}: the expression {shown(value)} of {step['type']} may take too long ({error}); take the file "
            "of a DBRX checkpoint."
        ) from error


def _text(file: Settings, step: Step, key: str) -> str:
    value = step.get(key)
    if not isinstance(value, str):
        raise file.wrong(f"'{key}' of {step['type']}", "a text", value)
    return value


def _check_processor(file: Settings, step: Step) -> None:
    kind = step["type"]
    if kind in ("ByteLevel", "BertProcessing", "RobertaProcessing"):
        return
    if kind != "TemplateProcessing":
        known = "ByteLevel, TemplateProcessing, BertProcessing, RobertaProcessing"
        raise file.wrong("the post_processor", f"of the kinds {known}", kind)
    single = step.get("single")
    pieces = single if isinstance(single, list) and all(isinstance(piece, dict) for piece in single) else []
    texts = [piece["Sequence"] for piece in pieces if "Sequence" in piece]
    if len(texts) != 1 or not isinstance(texts[0], dict) or texts[0].get("id") != "A" or len(pieces) > _MOST_AROUND:
        raise file.wrong(
            "'single' of TemplateProcessing", f"the sequence A once, with at most {_MOST_AROUND} tokens around", single
        )
    known_tokens = step.get("special_tokens")
    if not isinstance(known_tokens, dict) or any(
        not isinstance(token, dict) or not isinstance(token.get("ids"), list) or len(token["ids"]) > _MOST_AROUND
        for token in known_tokens.values()
    ):
        raise file.wrong("'special_tokens' of TemplateProcessing", "an object of tokens with their 'ids'", known_tokens)


_NORMALIZERS: Mapping[str, Callable[[Settings, Step], int]] = {
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt"), _same),
    "Prepend": _prepended,
    "Replace": _replaced,
    **dict.fromkeys(("ByteLevel", "BertNormalizer"), _double),
}
"""How many times each normalizer can lengthen a text. The first ones do so only once, even if they are repeated."""

_CUTTERS: Mapping[str, Callable[[Settings, Step], int]] = {
    **dict.fromkeys(("Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit"), _same),
    **dict.fromkeys(("UnicodeScripts", "BertPreTokenizer"), _same),
    "Split": _cut_at,
    "ByteLevel": _double,
}
