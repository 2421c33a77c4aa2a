"""Text that UTF-8 can hold. JSON can spell lone surrogates, halves of characters, and then Python's texts hold them."""


def valid_text(text: str) -> str:
    """The text with U+FFFD for each lone surrogate. A pair of them becomes its character.

    A template's text may be of a subclass. Its own methods aren't called.
    """
    return str.__str__(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
