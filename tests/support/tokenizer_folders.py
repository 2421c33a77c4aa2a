"""Tokenizer folders with settings in random combination, small and of DBRX's kind."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

CORPUS = ["Hello world, this isn't a test.", "naïve café 😀😁", "don't stop  now \n\n", "日本語の文字 1234 12"] * 3
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
NEWER_CL100K_WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
TOKENS = [
    *("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|im|>", "<think>", "<tool>"),
    *("[X]", "word", "<日>", "Hel"),
]
SPACED = ["  ", " b"]
PIECES = [
    *(*TOKENS, *SPACED),
    *(
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "a",
        "Hello",
        " world",
        "HELLO",
        "don't",
        "'LL",
        "12345",
        "é",
        "e\u0301",
        "ﬁ",
        "\u0338",
    ),
    *(
        "İ",
        "😀",
        "👩‍👩",
        "日本",
        "\x00",
        "\x07",
        "\u00a0",
        "\u2028",
        "\ufeff",
        "\u200d",
        "!?",
        ".,",
        "<|",
        "|>",
        "_",
        "x",
    ),
]

Settings = dict[str, Any]


@cache
def trained() -> str:
    """The vocabulary and merges that all folders start from, as the JSON of a model."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.dumps(json.loads(tokenizer.to_str())["model"])


class Maker:
    """Makes one folder from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def maybe(self, chance: float) -> bool:
        return self.random.random() < chance

    def flag(self) -> bool:
        return self.maybe(0.5)

    def text(self) -> str:
        """A text of special tokens, words, spaces and characters that few texts have."""
        return "".join(self.random.choices(PIECES, k=self.random.randrange(12)))

    def write(self, folder: Path) -> Path:
        """Writes a folder that most likely is one that transformers reads."""
        self.content = self.tokenizer()
        self.ids: dict[str, int] = {token["content"]: token["id"] for token in self.content["added_tokens"]}
        self.next = max([len(self.content["model"]["vocab"]) - 1, *self.ids.values()]) + 1
        files: dict[str, Settings] = {"tokenizer_config": self.config()}
        if self.maybe(0.4):
            files["special_tokens_map"] = self.special_map()
        if self.maybe(0.3):
            files["added_tokens"] = self.older_tokens()
        if self.maybe(0.3):
            files["config"] = {"model_type": "dbrx"} if self.flag() else {}
        files["generation_config"] = {"eos_token_id": 5}
        files["tokenizer"] = self.content
        if self.maybe(0.05):
            del files["tokenizer_config"]
        for name, value in files.items():
            (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        return folder

    # tokenizer.json

    def tokenizer(self) -> Settings:
        model = json.loads(trained())
        if self.maybe(0.15):
            # As GPT-2's, whose own vocabulary has a special token.
            model["vocab"]["<|endoftext|>"] = len(model["vocab"])
        if self.maybe(0.1):
            model["unk_token"] = self.random.choice(["a", "<|endoftext|>", "!"])
        model["fuse_unk"] = self.maybe(0.1)
        model["byte_fallback"] = self.maybe(0.1)
        model["ignore_merges"] = self.maybe(0.3)
        tokenizer = {
            "version": "1.0",
            "truncation": self.truncation() if self.maybe(0.1) else None,
            "padding": self.padding() if self.maybe(0.1) else None,
            "added_tokens": [],
            "normalizer": self.normalizer(),
            "pre_tokenizer": self.words(),
            "post_processor": None,
            "decoder": self.byte_level(),
            "model": model,
        }
        place = len(model["vocab"])
        contents = self.random.sample(TOKENS, self.random.randrange(1, 7))
        for content in [*contents, self.random.choice(SPACED)] if self.maybe(0.1) else contents:
            number = model["vocab"].get(content)
            tokenizer["added_tokens"].append({"id": place if number is None else number, **self.token(content)})
            place += number is None
        tokenizer["added_tokens"].sort(key=lambda token: token["id"])
        tokenizer["post_processor"] = self.processor([(t["content"], t["id"]) for t in tokenizer["added_tokens"]])
        return tokenizer

    def token(self, content: str) -> Settings:
        token: Settings = {"content": content}
        token |= {key: self.maybe(0.2) for key in ("single_word", "lstrip", "rstrip")}
        special = self.maybe(0.7)
        return token | {"normalized": self.maybe(0.3), "special": special}

    def truncation(self) -> Settings:
        return {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}

    def padding(self) -> Settings:
        pad = self.random.choice(TOKENS)
        return {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 3,
            "pad_type_id": 0,
            "pad_token": pad,
        }

    def byte_level(self, **given: bool) -> Settings:
        flags = {"add_prefix_space": self.flag(), "trim_offsets": self.flag(), "use_regex": self.flag()}
        return {"type": "ByteLevel"} | flags | given

    def normalizer(self) -> Settings | None:
        simple = ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt"]
        choices: list[Settings] = [
            *({"type": kind} for kind in simple),
            {"type": "Strip", "strip_left": self.flag(), "strip_right": self.flag()},
            {"type": "Prepend", "prepend": self.random.choice([" ", "x", "▁"])},
            {"type": "Replace", "pattern": {"String": self.random.choice([" ", "a"])}, "content": "_"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        ]
        if self.maybe(0.6):
            return None
        if self.maybe(0.7):
            return self.random.choice(choices)
        return {"type": "Sequence", "normalizers": self.random.choices(choices, k=self.random.randrange(1, 4))}

    def words(self) -> Settings | None:
        if self.maybe(0.35):
            return self.byte_level(use_regex=True)
        if self.maybe(0.05):
            return None
        behaviors = ["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
        words = self.random.choice(
            [GPT2_WORDS, CL100K_WORDS, CL100K_WORDS, NEWER_CL100K_WORDS, r"\s+", r"\p{N}", "[A-Z]"]
        )
        split = {
            "type": "Split",
            "pattern": {"Regex": words} if self.maybe(0.9) else {"String": " "},
            "behavior": "Isolated" if self.maybe(0.7) else self.random.choice(behaviors),
            "invert": self.maybe(0.1),
        }
        others: list[Settings] = [
            {"type": "Digits", "individual_digits": self.flag()},
            {"type": "Punctuation", "behavior": self.random.choice(behaviors)},
            {"type": "Whitespace"},
            {"type": "WhitespaceSplit"},
            {"type": "CharDelimiterSplit", "delimiter": "l"},
            {"type": "UnicodeScripts"},
        ]
        steps = [split] if self.maybe(0.9) else []
        if self.maybe(0.3):
            steps.insert(self.random.randrange(len(steps) + 1), self.random.choice(others))
        return {"type": "Sequence", "pretokenizers": [*steps, self.byte_level(use_regex=self.maybe(0.2))]}

    def processor(self, added: list[tuple[str, int]]) -> Settings | None:
        first, last = self.random.choice(added), self.random.choice(added)
        pair = {"sep": list(last), "cls": list(first)}
        around = [{"SpecialToken": {"id": text, "type_id": 0}} for text, _ in (first, last)]
        body = {"Sequence": {"id": "A", "type_id": 0}}
        template = {
            "type": "TemplateProcessing",
            "single": [*around[: self.maybe(0.8)], body, *around[1:][: self.maybe(0.3)]],
            "pair": [body, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in (first, last)},
        }
        choices: list[Settings] = [
            template,
            self.byte_level(),
            {"type": "RobertaProcessing", **pair, "trim_offsets": True, "add_prefix_space": self.flag()},
            {"type": "BertProcessing", **pair},
            {"type": "Sequence", "processors": [self.byte_level(), template]},
            {"type": "Sequence", "processors": [template, self.byte_level()]},
        ]
        return self.random.choice(choices) if self.maybe(0.7) else None

    # The files beside it

    def known(self) -> str:
        return self.random.choice([*self.ids] or TOKENS)

    def any_token(self) -> str:
        return self.known() if self.maybe(0.8) else self.random.choice(TOKENS)

    def named(self, names: list[str]) -> Settings:
        named: Settings = {}
        for name in names:
            if self.maybe(0.5):
                content = self.any_token()
                written = {"__type": "AddedToken", **self.token(content)}
                named[name] = content if self.maybe(0.8) else written
        return named

    def config(self) -> Settings:
        config: Settings = {}
        if self.maybe(0.8):
            classes = ["PreTrainedTokenizerFast"] * 6 + ["GPT2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizerFast"]
            config["tokenizer_class"] = self.random.choice(classes)
        config |= self.named(["bos_token", "eos_token", "unk_token", "pad_token", "image_token"])
        for name in ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "legacy"):
            if self.maybe(0.3):
                config[name] = self.flag()
        for name in ("extra_special_tokens", "additional_special_tokens"):
            if self.maybe(0.2):
                config[name] = [self.any_token() for _ in range(self.random.randrange(3))]
        if self.maybe(0.1):
            config["extra_special_tokens"] = {"sound": self.any_token(), "other_token": self.any_token()}
        if self.maybe(0.35):
            config["added_tokens_decoder"] = self.decoder()
        return config

    def decoder(self) -> Settings:
        entries = {str(number): self.token(content) for content, number in self.ids.items() if self.maybe(0.8)}
        for content in self.random.sample(TOKENS, 2):
            if content not in self.ids and self.flag():
                entries[str(self.take(content))] = self.token(content)
        return {
            number: {key: value for key, value in token.items() if key == "content" or self.maybe(0.9)}
            for number, token in entries.items()
        }

    def take(self, content: str) -> int:
        number = self.ids[content] = self.next
        self.next += 1
        return number

    def special_map(self) -> Settings:
        found: Settings = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "video_token"):
            if self.maybe(0.5):
                content = self.any_token()
                flags = {key: value for key, value in self.token(content).items() if key != "special"}
                found[name] = content if self.flag() else flags
        for name in ("extra_special_tokens", "additional_special_tokens"):
            if self.maybe(0.2):
                found[name] = [self.any_token() for _ in range(self.random.randrange(3))]
        return found

    def older_tokens(self) -> Settings:
        found = {content: number for content, number in self.ids.items() if self.maybe(0.7)}
        for content in self.random.sample(TOKENS, 2):
            if content not in self.ids and self.flag():
                found[content] = self.take(content)
        return found
