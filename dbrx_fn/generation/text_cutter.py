"""Turns a stream of tokens into text, up to a stop token or stop string."""

from collections.abc import Collection, Sequence

from dbrx_fn.text.tokenizer import Tokenizer


class TextCutter:
    """One text in progress. It returns characters when they are complete and certain.

    Args:
        tokenizer: the checkpoint's.
        stop_tokens: ids that end the text. Their text is never returned.
        stop_strings: non-empty strings that end the text. They are never returned.
    """

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Collection[int], stop_strings: Sequence[str]) -> None:
        self._stream = tokenizer.stream()
        self._stop_tokens, self._stop_strings = stop_tokens, stop_strings
        self._held = ""

    def push(self, token: int, *, last: bool) -> tuple[str, bool]:
        """The text that the next token adds, and whether a stop token or string ends the text here.

        Args:
            token: its id.
            last: whether no token follows. Then all text held back is returned.
        """
        stops = token in self._stop_tokens
        new = "" if stops else self._stream.push(token)
        if last or stops:
            new += self._stream.finish()
        text, self._held, found = _cut(self._held + new, self._stop_strings)
        if last or stops or found:
            return text + self._held, stops or found
        return text, False


def _cut(text: str, stop_strings: Sequence[str]) -> tuple[str, str, bool]:
    """Splits text: its certain part, a possible start of a stop string, and whether a stop string came and was cut."""
    first = min((at for at in (text.find(stop) for stop in stop_strings) if at >= 0), default=-1)
    if first >= 0:
        return text[:first], "", True
    longest = max(map(len, stop_strings), default=1)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(stop.startswith(text[start:]) for stop in stop_strings):
            return text[:start], text[start:], False
    return text, "", False
