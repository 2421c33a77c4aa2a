"""The served model, as the readers of requests need it."""

from dataclasses import dataclass

from dbrx_fn.files.json_file import shown
from dbrx_fn.generation.generation_config import GenerationConfig
from dbrx_fn.model.config import Config
from dbrx_fn.serving.fields import FieldError, Fields, wrong_value
from dbrx_fn.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """The served model.

    `name`: what requests call it.
    `adapters`: names of the engine's adapters. A request that gives one as its model is answered with that adapter.
    `created`: when the server began to serve it, in seconds since 1970.
    `capacity`: the longest text that there is room for, in tokens.
    `defaults`: sampling settings for fields that a request leaves out.
    `max_tokens`: default of the field of this name.
    `most_choices`: texts that one request may ask for, over all its prompts.
    """

    name: str
    created: int
    config: Config
    tokenizer: Tokenizer
    capacity: int
    defaults: GenerationConfig
    max_tokens: int
    most_choices: int
    adapters: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may give as their model."""
        return self.name, *self.adapters

    def read_adapter(self, fields: Fields) -> str | None:
        """The adapter that a request names as its model; `None` for the model alone, which it may also leave out.

        Raises:
            FieldError: if it names another.
        """
        name = fields.text("model")
        if name is not None and name not in self.names:
            raise self.unknown(name)
        return None if name == self.name else name

    def unknown(self, name: str) -> FieldError:
        """The error for another model's name."""
        only = f"{self.name!r}, the one model that is served,"
        wrong = wrong_value("model", name, f"one of {', '.join(map(shown, self.names))}" if self.adapters else only)
        return FieldError("model", str(wrong), "model_not_found")

    def piece(self, token: int) -> bytes:
        """The bytes of a token in a text. Control tokens are spelled out."""
        return self.tokenizer.token_bytes(token, skip_special_tokens=False)
