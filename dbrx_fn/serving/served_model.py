"""The served model, as the readers of requests need it."""

from dataclasses import dataclass

from dbrx_fn.generation.generation_config import GenerationConfig
from dbrx_fn.model.config import Config
from dbrx_fn.serving.fields import FieldError, Fields, wrong_value
from dbrx_fn.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """The served model.

    `name`: what requests call it.
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

    def check_meant(self, fields: Fields) -> None:
        """Checks that a request names this model, or none.

        Raises:
            FieldError: if it names another.
        """
        name = fields.text("model")
        if name is not None and name != self.name:
            raise self.unknown(name)

    def unknown(self, name: str) -> FieldError:
        """The error for another model's name."""
        wrong = wrong_value("model", name, f"{self.name!r}, the one model that is served,")
        return FieldError("model", str(wrong), "model_not_found")

    def piece(self, token: int) -> bytes:
        """The bytes of a token in a text. Control tokens are spelled out."""
        return self.tokenizer.token_bytes(token, skip_special_tokens=False)
