"""Reads a tokenizer.json with byte-level BPE, of the tokenizers library."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers

from dbrx_fn.errors import TokenizerError
from dbrx_fn.files.json_file import LARGEST_VOCABULARY, shown
from dbrx_fn.text.library_errors import library_errors
from dbrx_fn.text.literal_text import LiteralEncoder, Ranges
from dbrx_fn.text.special_tokens import AddedToken, SpecialTokens, read_special_tokens, read_token
from dbrx_fn.text.tokenizer_class import definition_of
from dbrx_fn.text.tokenizer_limits import check_file
from dbrx_fn.text.tokenizer_settings import Settings, is_token_id
from dbrx_fn.text.vocabulary import BYTES, Encode, Vocabulary, check_ids

_NOT_TAKEN = (
    "split_special_tokens",
    "fast_tokenizer_files",
    "fix_mistral_regex",
    "init_inputs",
    "post_processor",
    "tokenizer_object",
    "tokenizer_padding",
    "tokenizer_truncation",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)
"""Settings with which transformers would encode or decode differently."""


def read_tokenizer_json(path: Path, settings: Settings) -> Vocabulary:
    """Reads the file, and the added tokens of the files beside it.

    Args:
        path: tokenizer.json in the checkpoint's folder.
        settings: tokenizer_config.json there.

    Raises:
        TokenizerError: if a file can't be read, contradicts another, or has unsupported settings.
    """
    settings.refuse(_NOT_TAKEN, "that isn't supported")
    file = Settings(path, LARGEST_VOCABULARY)
    check_file(file)
    file_tokens = _added_tokens(file)
    definition = definition_of(path.parent, settings, file)
    contents = {token.content for token in file_tokens.values()}
    tokens = read_special_tokens(
        path.parent,
        settings,
        file_tokens,
        present=contents if definition.holds_added_tokens else (),
        defaults=definition.defaults,
    )
    if not definition.holds_added_tokens and (left_out := contents - {token.content for token in tokens.added()}):
        raise TokenizerError(
            f"{settings.path}: 'added_tokens_decoder' lacks {shown(min(left_out))} of {path.name}, and GPT2Tokenizer "
            "takes only tokens that are listed there; add it, or write PreTrainedTokenizerFast as the tokenizer_class."
        )
    backend = _backend(path, definition.content, tokens)
    added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
    model = backend.get_vocab(with_added_tokens=False)
    if not model and not added:
        raise TokenizerError(f"{path} has an empty vocabulary; copy the file from the checkpoint again.")
    check_ids((*tokens.claims, (path, {number: token.content for number, token in file_tokens.items()})), model | added)

    # For the library, a token that is special once stays special.
    marked = {token.content for token in tokens.added() if token.special}
    if definition.holds_added_tokens:
        marked |= {token.content for token in file_tokens.values() if token.special}
    ordinary = {number: _bytes_of(token) for token, number in model.items()}
    special: dict[int, bytes] = {}
    for number in added.values():
        # For a normalized token this is the normalized text, by which decoding leaves it out.
        content = backend.id_to_token(number) or ""
        (special if content in marked else ordinary)[number] = content.encode()
    before, behind = _tokens_around(path, backend, [*added, *model])
    if unknown := {*before, *behind} - {*ordinary, *special}:
        raise file.wrong("each id of the post_processor", "a token's", min(unknown))
    return Vocabulary(
        encoder=lambda control: _encoder(path, backend, control),
        ordinary=ordinary,
        special=special,
        added=added,
        marked=frozenset(marked),
        named={name: token.content for name, token in tokens.named.items()},
        before=before,
        behind=behind,
        definition=lambda: backend.to_str().encode(),
    )


def _backend(path: Path, content: str, tokens: SpecialTokens) -> tokenizers.Tokenizer:
    with library_errors(f"{path} can't be read by the tokenizers library", "copy the file from the checkpoint again"):
        backend = tokenizers.Tokenizer.from_str(content)
        # A file may set truncation and padding for training. A prompt must stay whole and unpadded.
        backend.no_truncation()
        backend.no_padding()
        backend.add_tokens([token.made() for token in tokens.added()])
    _check_white_space(path, backend)
    return backend


def _check_white_space(path: Path, backend: tokenizers.Tokenizer) -> None:
    """Checks that the library can't fail at added tokens in a text."""
    added = backend.get_added_tokens_decoder()
    texts = {token.content: backend.id_to_token(number) or "" for number, token in added.items()}
    nothing = next((content for content, text in texts.items() if not text), None)
    if nothing is not None:
        raise TokenizerError(
            f"{path}: its normalizer leaves nothing of the added token {shown(nothing)}, which then is everywhere; set "
            "'normalized' of the token to false."
        )
    stripping = next((token.content for token in added.values() if token.rstrip), None)
    spaced = next((content for content, text in texts.items() if text[0].isspace()), None)
    if stripping is not None and spaced is not None:
        raise TokenizerError(
            f"{path}: the added token {shown(stripping)} has 'rstrip' and {shown(spaced)} begins with white space, so "
            "both can take the same characters; leave 'rstrip' out of the files."
        )


def _added_tokens(file: Settings) -> dict[int, AddedToken]:
    entries = file.value("added_tokens")
    found: dict[int, AddedToken] = {}
    if entries is not None and not isinstance(entries, list):
        raise file.wrong("'added_tokens'", "a list of tokens", entries)
    for place, entry in enumerate(entries or []):
        number = entry.get("id") if isinstance(entry, dict) else None
        if not is_token_id(number) or number in found:
            raise file.wrong(f"'added_tokens' entry {place}", "an object with an 'id' of its own", entry)
        assert isinstance(number, int)
        found[number] = read_token(file, f"'added_tokens' entry {place}", entry)
    return found


def _bytes_of(token: str) -> bytes:
    characters = [BYTES.get(character) for character in token]
    return token.encode() if None in characters else bytes(byte for byte in characters if byte is not None)


def _tokens_around(
    path: Path, backend: tokenizers.Tokenizer, texts: Iterable[str]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the tokens that the post_processor puts before and after a text, found with a short text."""
    remedy = "correct the post_processor, or take the file of a DBRX checkpoint"
    with library_errors(f"{path} can't be applied to a text", remedy):
        short = ("a", " ", *itertools.islice(texts, 64))
        text = next((text for text in short if backend.encode(text, add_special_tokens=False).ids), "")
        plain = backend.encode(text, add_special_tokens=False).ids
        whole = backend.encode(text)
    places = [place for place, masked in enumerate(whole.special_tokens_mask) if not masked]
    start = places[0] if places else len(whole.ids)
    if whole.ids[start : start + len(plain)] != plain or len(places) != len(plain):
        raise TokenizerError(f"{path}: its post_processor doesn't keep the text's tokens as they are; {remedy}.")
    return tuple(whole.ids[:start]), tuple(whole.ids[start + len(plain) :])


def _encoder(path: Path, backend: tokenizers.Tokenizer, control: Mapping[str, int]) -> Encode:
    with library_errors(f"{path} can't be used", "take the file of a DBRX checkpoint"):
        literal_encoder = LiteralEncoder(backend, control)

    def encode(text: str, literal: Ranges) -> list[int]:
        with library_errors(f"{path} can't encode this text", "change the text, or take the file of a DBRX checkpoint"):
            return literal_encoder.encode(text, literal)

    return encode
