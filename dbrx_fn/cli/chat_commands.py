"""The commands of a chat, which begin with a slash."""

from collections.abc import Callable
from pathlib import Path

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import shown
from dbrx_fn.generation.chat_file import cache_beside, load_chat, save_chat
from dbrx_fn.generation.chat_session import ChatSession

QUIT = ("/quit", "/exit", "/bye")
_WITH_CACHE = "--cache "

HELP = '''\
/reset              forgets the conversation, and keeps the system prompt
/undo               takes the last turn back
/system TEXT        sets the system prompt; without TEXT there is none
/save FILE          saves the conversation as JSON
/save --cache FILE  saves the conversation's keys and values too, in FILE.cache
/load FILE          goes on with a saved conversation
/help               shows this
/quit               ends, as Ctrl-D does

A line that ends with \\ goes on in the next one. A message between """ and """ may have many lines, and begin with /.
Ctrl-C stops an answer, or drops what you are typing.'''


def obey(command: str, session: ChatSession, weights: Callable[[], str]) -> str:
    """Carries out a command, other than one that quits.

    Args:
        command: the line.
        session: the conversation.
        weights: returns the model's fingerprint.

    Returns:
        The message for the user.

    Raises:
        DbrxError: if the command is unknown, or can't be carried out. The conversation stays as it was.
    """
    name, _, rest = command.partition(" ")
    rest = rest.strip()
    if rest and name in ("/reset", "/undo", "/help"):
        raise InputError(f"{name} takes nothing behind it, and found {shown(rest)}: leave that out.")
    match name:
        case "/help":
            return HELP
        case "/reset":
            session.messages = ()
            return "The conversation begins anew."
        case "/undo":
            return "The last turn is taken back." if session.undo() else "There is no turn to take back."
        case "/system":
            session.system = rest
            return "The system prompt is set." if rest else "There is no system prompt now."
        case "/save":
            with_cache = rest.startswith(_WITH_CACHE)
            file = _file(name, rest.removeprefix(_WITH_CACHE))
            save_chat(file, session, weights() if with_cache else None)
            beside = f", and what was computed in {cache_beside(file)}" if with_cache else ""
            return f"The conversation is in {file}{beside}."
        case "/load":
            file = _file(name, rest)
            unused = load_chat(file, session, weights)
            said = f"The conversation of {file} goes on, with {len(session.messages)} messages."
            return said if unused is None else f"{said} {cache_beside(file)} isn't used, since {unused}."
    raise InputError(
        f'{shown(name)} is not a command: /help lists them, and a message that begins with / goes between """.'
    )


def _file(name: str, text: str) -> Path:
    if not text.strip():
        raise InputError(f"{name} needs a file's name: put it behind.")
    try:
        return Path(text.strip()).expanduser()
    except RuntimeError as error:
        raise InputError(f"{shown(text)} can't be a file's name ({error}): choose another.") from None
