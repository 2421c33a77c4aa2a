"""Turns a library's errors, including panics of Rust code, into one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

from dbrx_fn.errors import DbrxError, TokenizerError


@contextmanager
def library_errors(what: str, remedy: str, kind: type[DbrxError] = TokenizerError) -> Iterator[None]:
    """Replaces the library's errors by one of this `kind`, with the text "what (the library's reason); remedy."."""
    try:
        yield
    except kind:
        raise
    except Exception as error:
        raise kind(f"{what} ({_reason(error)}); {remedy}.") from error
    except BaseException as error:
        # PanicException isn't a subclass of Exception, and can't be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what} ({_reason(error)}); {remedy}.") from error


def one_line(text: str) -> str:
    """What a library says as a part of a sentence: printable, and at most 200 characters."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return shorten(printable, 200, placeholder="...").rstrip(".")


def _reason(error: BaseException) -> str:
    return one_line(str(error)) or type(error).__name__
