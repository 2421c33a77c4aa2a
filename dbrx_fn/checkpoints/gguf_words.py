"""How llama.cpp's tokenizers cut a text into words, by the names in a GGUF file (`tokenizer.ggml.pre`).

Only the ways that byte-level BPE of the tokenizers library can follow exactly are here. llama.cpp's own table is
`llm_tokenizer_bpe` in its src/llama-vocab.cpp.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _like_gpt4(numbers: str) -> str:
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True)
class Words:
    """A way to cut words.

    `pattern`: the expression of a word. `None` means GPT-2's, which ByteLevel has built in.
    `whole`: whether a word that is a token becomes it without merges.
    `begins`: whether a text begins with the BOS token, if the file doesn't say.
    """

    pattern: str | None
    whole: bool = False
    begins: bool = False

    def pre_tokenizer(self) -> dict[str, Any]:
        """The part of a tokenizer.json."""
        bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        if self.pattern is None:
            return bytes_only | {"use_regex": True}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [split, bytes_only | {"use_regex": False}]}


# OpenAI's newer form of the first expression, which cuts alike.
_NEWER = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

DBRX_WORDS = Words(_like_gpt4(r"\p{N}{1,3}"))
_LLAMA3 = Words(_like_gpt4(r"\p{N}{1,3}"), whole=True, begins=True)
_QWEN2 = Words(_like_gpt4(r"\p{N}"))
_GPT2 = Words(None)

WORDS: Mapping[str, Words] = {
    "dbrx": DBRX_WORDS,
    "smaug-bpe": DBRX_WORDS,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), _GPT2),
}
"""Each name's way."""


def is_gpt4(pattern: str) -> bool:
    """Whether an expression cuts words as GPT-4 and DBRX do."""
    return pattern in (DBRX_WORDS.pattern, _NEWER)


def name_of_words(pre_tokenizer: object, *, whole: bool) -> str | None:
    """The name of a tokenizer.json's way to cut words, or `None` if llama.cpp has none that is the same.

    Args:
        pre_tokenizer: that part of the file.
        whole: whether a word that is a token becomes it without merges (`ignore_merges`).
    """
    for name, words in WORDS.items():
        if words.whole == whole and _same(pre_tokenizer, words.pre_tokenizer()):
            return name
    return None


def _same(found: object, known: Mapping[str, Any]) -> bool:
    """Whether both cut alike. `trim_offsets` has no effect on tokens."""
    if not isinstance(found, dict):
        return False
    if found.get("type") == "Sequence" and isinstance(found.get("pretokenizers"), list) and "pretokenizers" in known:
        inner = found["pretokenizers"]
        return len(inner) == 2 and all(map(_same, inner, known["pretokenizers"]))
    defaults: dict[str, dict[str, Any]] = {
        "ByteLevel": {"use_regex": True, "add_prefix_space": True},
        "Split": {"invert": False},
    }
    settings: dict[str, Any] = defaults.get(str(found.get("type")), {}) | found
    if settings.get("pattern") == {"Regex": _NEWER}:
        settings["pattern"] = {"Regex": DBRX_WORDS.pattern}
    return all(settings.get(key) == value for key, value in known.items() if key != "trim_offsets")
