"""Turns whatever the tokenizers library raises into one sentence, panics of its Rust code included."""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

from dbrx_fn.errors import TokenizerError


@contextmanager
def library_errors(what: str, remedy: str) -> Iterator[None]:
    """Raises a `TokenizerError` in place of the library's errors, in the words "what (the library's); remedy."."""
    try:
        yield
    except TokenizerError:
        raise
    except Exception as error:
        raise TokenizerError(f"{what} ({_reason(error)}); {remedy}.") from error
    except BaseException as error:
        # Not a subclass of Exception, and not importable.
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what} ({_reason(error)}); {remedy}.") from error


def _reason(error: BaseException) -> str:
    printable = "".join(character if character.isprintable() else " " for character in str(error))
    return shorten(printable, 200, placeholder="...").rstrip(".") or type(error).__name__
