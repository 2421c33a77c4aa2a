"""A conversation with a model, turn by turn. Only what is new since the last turn is computed.

The whole conversation is rendered and encoded at each turn, since a template may write earlier turns in another way
later on. The cache is cut back to the tokens that are the same as before, and the model reads the others.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dbrx_fn.errors import InputError
from dbrx_fn.generation.sampling import GREEDY, Key, Sampling
from dbrx_fn.generation.speculation import Speculation
from dbrx_fn.generation.stream import Piece, stream_text
from dbrx_fn.model.cache import Cache
from dbrx_fn.model.cache_rows import rewind
from dbrx_fn.model.config import Config
from dbrx_fn.model.shapes import CHUNK_SIZE
from dbrx_fn.model.tree import Params
from dbrx_fn.text.chat import encode_chat
from dbrx_fn.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Held:
    """What a session has computed: a cache of one row, and the tokens that it holds."""

    tokens: tuple[int, ...]
    cache: Cache


class ChatSession:
    """A conversation in progress.

    Attributes:
        system: the system prompt; `None` for the model's default one, blank for none at all.
        messages: the turns, each a message of the user and one of the assistant.
        held: the cache and its tokens; `None` before the first turn.
        prompt_tokens: in the last turn, number of tokens of the entire conversation before the answer.
        new_tokens: how many of these had to be computed.
    """

    def __init__(self, params: Params, config: Config, tokenizer: Tokenizer, system: str | None = None) -> None:
        self.params, self.config, self.tokenizer = params, config, tokenizer
        self.system = system
        self.messages: tuple[Mapping[str, Any], ...] = ()
        self.held: Held | None = None
        self.prompt_tokens = self.new_tokens = 0

    def answer(
        self,
        text: str,
        *,
        max_tokens: int = 100,
        sampling: Sampling = GREEDY,
        key: Key | None = None,
        stop_tokens: frozenset[int] | None = None,
        stop_strings: Sequence[str] = (),
        chunk_size: int = CHUNK_SIZE,
        speculation: Speculation | None = None,
    ) -> Generator[Piece]:
        """Yields the answer to a message. If the caller closes it early, the text so far becomes the answer.

        Args:
            text: the user's message. Control tokens spelled in it are plain text.
            max_tokens: as in `stream_text`, like all that follows.

        Raises:
            InputError: if the conversation no longer fits the model's context. It stays as it was.
            DbrxError: as `encode_chat` and `stream_text`. The conversation stays as it was.
        """
        asked = (*self.messages, {"role": "user", "content": text})
        prompt = encode_chat(self.tokenizer, asked, system=self.system, most=self.config.max_seq_len)
        if len(prompt) > self.config.max_seq_len:
            raise InputError(
                f"With this message the conversation has {len(prompt)} tokens and the model's context holds"
                f" {self.config.max_seq_len}: shorten it, take turns back, or begin a new conversation."
            )
        known = self._take_known(prompt)
        self.prompt_tokens, self.new_tokens = len(prompt), len(prompt) - (known.lengths[0] if known else 0)
        stream = stream_text(
            self.params,
            self.config,
            self.tokenizer,
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            key=key,
            stop_tokens=stop_tokens,
            stop_strings=stop_strings,
            chunk_size=chunk_size,
            cache=known,
            speculation=speculation,
        )
        # A second reference to the cache would make each write a copy.
        del known
        made: list[Piece] = []
        try:
            for piece in stream:
                made.append(piece)
                yield piece
        except GeneratorExit:
            stream.close()
        said = {"role": "assistant", "content": "".join(piece.text for piece in made)}
        cache, tokens = stream.cache, [*prompt, *(piece.token for piece in made)]
        length = min(cache.lengths[0], len(tokens))
        self.held = Held(tuple(tokens[:length]), rewind(cache, [length]))
        self.messages = (*asked, said)

    def undo(self) -> bool:
        """Takes the last turn back: the user's last message and all after it. Returns whether there was one."""
        turns = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if turns:
            self.messages = self.messages[: turns[-1]]
        return bool(turns)

    def _take_known(self, prompt: Sequence[int]) -> Cache | None:
        """A cache of the prompt's first tokens, without at least the last one. The session gives up its own."""
        held, self.held = self.held, None
        if held is None:
            return None
        same = 0
        for ours, theirs in zip(held.tokens, prompt[:-1], strict=False):
            if ours != theirs:
                break
            same += 1
        return rewind(held.cache, [same])
