"""Prompts that can't fit are refused in the memory of a piece, and all others have the tokens of the whole."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.errors import InputError
from dbrx_fn.text.prompt_length import encode_prompt
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer

LONG = 10 * 2**20
TEXTS = {
    "one line": "To be, or not to be, that is the question. ",
    "Windows lines": "To be, or not to be.\r\n",
    "paragraphs": "To be, or not to be.\n\n",
    "one word": "a",
    "spaces": " ",
    "special tokens": "<|im_end|>",
    "Chinese": "日本語の文字",
}
# MiB; the tokenizers library takes 2,000 for the whole of such a prompt.
MOST_MEMORY = 200


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return read_tokenizer(SMALL)


@pytest.mark.parametrize("unit", TEXTS.values(), ids=TEXTS.keys())
def test_a_prompt_that_fits_has_the_tokens_of_the_whole(unit: str, tokenizer: Tokenizer) -> None:
    text = unit * (200_000 // len(unit))
    tokens = tokenizer.encode(text)
    for most in (len(tokens), len(tokens) + 1, 2**30):
        assert encode_prompt(tokenizer, text, most) == tokens


@pytest.mark.parametrize("unit", TEXTS.values(), ids=TEXTS.keys())
def test_a_prompt_that_cannot_fit_is_refused(unit: str, tokenizer: Tokenizer) -> None:
    text = unit * (LONG // len(unit))
    with pytest.raises(InputError, match="has more than 512 tokens, which is what the model's context holds"):
        encode_prompt(tokenizer, text, 512)


def test_ranges_and_special_tokens_are_passed_on(tokenizer: Tokenizer) -> None:
    text = "a<|im_end|>"
    plain = tokenizer.encode(text, add_special_tokens=False, literal=[(0, len(text))])
    assert encode_prompt(tokenizer, text, 99, add_special_tokens=False, literal=[(0, len(text))]) == plain


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak memory")
def test_the_memory_of_a_prompt_that_cannot_fit(measured: Callable[[str, float], float]) -> None:
    script = """if True:
        import sys
        from dbrx_fn.errors import InputError
        from dbrx_fn.checkpoints.hub import SMALL
        from dbrx_fn.text.prompt_length import encode_prompt
        from dbrx_fn.text.tokenizer import read_tokenizer
        from tests.support.load_damaged import forget_peak, peak_memory

        tokenizer = read_tokenizer(SMALL)
        for unit in sys.argv[1:]:
            text = unit * (10 * 2**20 // len(unit))
            forget_peak()
            before = peak_memory()
            try:
                encode_prompt(tokenizer, text, 32_768)
            except InputError:
                print(peak_memory() - before)
    """
    command = [sys.executable, "-c", script, *TEXTS.values()]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = [int(line) for line in ended.stdout.split()]
    assert len(grown) == len(TEXTS)
    assert measured("MiB for a prompt of 10 MB that doesn't fit", max(grown) / 2**20) < MOST_MEMORY
